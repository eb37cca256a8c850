"""Frames read from where they lie in a file, without loading the object: as stored, or decoded when a client asks for that."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from caregrid.errors import NoFrames, PixelsUndecodable

#: Media types of compressed frames (PS3.18 tables 8.7.3-2 and -5).
MEDIA_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.53": "image/jpeg",
    "1.2.840.10008.1.2.4.55": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.92": "image/jpx",
    "1.2.840.10008.1.2.4.93": "image/jpx",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
    "1.2.840.10008.1.2.4.100": "video/mpeg2",
    "1.2.840.10008.1.2.4.101": "video/mpeg2",
    "1.2.840.10008.1.2.4.102": "video/mp4",
    "1.2.840.10008.1.2.4.103": "video/mp4",
}
OCTETS = "application/octet-stream"

_UNDEFINED = 0xFFFFFFFF
_PIXEL_VRS = {0x0008: "OF", 0x0009: "OD", 0x0010: "OW"}
_NEEDED = [
    "Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation", "PhotometricInterpretation",
    "PlanarConfiguration", "NumberOfFrames", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip


class PixelFile:
    """``with PixelFile(path) as pixels``: a stored object's frames, numbered from 1. Raises NoFrames."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("rb")
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PixelFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _read_header(self) -> None:
        dataset: pydicom.Dataset = pydicom.dcmread(self._file, stop_before_pixels=True, specific_tags=list(_NEEDED))
        self.syntax = UID(dataset.file_meta.TransferSyntaxUID)
        if self.syntax == DeflatedExplicitVRLittleEndian:
            self._file, dataset = _inflated(self._file)
        self._find_pixels()
        self.dataset = dataset
        self.frames = _whole_number(dataset, "NumberOfFrames", 1) or 1
        self.native = self.length != _UNDEFINED
        samples = _whole_number(dataset, "SamplesPerPixel", 1)
        pixels = _whole_number(dataset, "Rows", 0) * _whole_number(dataset, "Columns", 0) * samples
        self.bits = pixels * _whole_number(dataset, "BitsAllocated", 0)
        if str(dataset.get("PhotometricInterpretation", "")) == "YBR_FULL_422" and self.native:
            self.bits = self.bits * 2 // 3
        if self.bits <= 0 or self.frames < 0:
            raise NoFrames

    def _find_pixels(self) -> None:
        """Read the element header the parser stopped at."""
        order = ">" if self.syntax == ExplicitVRBigEndian else "<"
        head = self._file.read(8)
        if len(head) < 8:
            raise NoFrames
        group, element = struct.unpack(order + "HH", head[:4])
        if group != 0x7FE0 or element not in _PIXEL_VRS:
            raise NoFrames
        self.tag, self.vr = f"{group:04X}{element:04X}", _PIXEL_VRS[element]
        if self.syntax == ImplicitVRLittleEndian:
            (self.length,) = struct.unpack("<L", head[4:])
        else:
            self.vr = head[4:6].decode("ascii", "replace")
            rest = self._file.read(4)
            if len(rest) < 4:
                raise NoFrames
            (self.length,) = struct.unpack(order + "L", rest)
        self.start = self._file.tell()

    @property
    def media_type(self) -> str:
        """The media type of a frame as stored."""
        return OCTETS if self.native else MEDIA_TYPES.get(self.syntax, OCTETS)

    @property
    def sent_syntax(self) -> str:
        """The transfer syntax of a frame as stored: uncompressed frames are little endian however they lie."""
        return str(ExplicitVRLittleEndian if self.native else self.syntax)

    def stored(self, number: int) -> bytes:
        """Frame ``number`` as stored; uncompressed ones in little endian. Raises NoFrames when the file ends before it."""
        if not self.native:
            return self._encapsulated(number)
        frame = self._one_bit(number) if self.bits % 8 else self._slice((number - 1) * self.bits // 8, self.bits // 8)
        if self.syntax == ExplicitVRBigEndian and self.dataset.get("BitsAllocated", 8) > 8:
            return np.frombuffer(frame, f">u{self.dataset.BitsAllocated // 8}").byteswap().tobytes()
        return frame

    def _slice(self, first: int, length: int) -> bytes:
        self._file.seek(self.start + first)
        content = self._file.read(length)
        if len(content) < length:
            raise NoFrames
        return content

    def _one_bit(self, number: int) -> bytes:
        """A frame of single bits that need not begin at a byte, packed from its first bit."""
        first = (number - 1) * self.bits
        length = (first + self.bits + 7) // 8 - first // 8
        bits = np.unpackbits(np.frombuffer(self._slice(first // 8, length), np.uint8), bitorder="little")
        return np.packbits(bits[first % 8 : first % 8 + self.bits], bitorder="little").tobytes()

    def _encapsulated(self, number: int) -> bytes:
        self._file.seek(self.start)
        extended = None
        if "ExtendedOffsetTable" in self.dataset and "ExtendedOffsetTableLengths" in self.dataset:
            extended = (self.dataset.ExtendedOffsetTable, self.dataset.ExtendedOffsetTableLengths)
        try:
            return get_frame(self._file, number - 1, extended_offsets=extended, number_of_frames=self.frames)
        except (ValueError, EOFError, IndexError, struct.error) as error:
            raise NoFrames from error

    def decoded(self, number: int) -> bytes:
        """Frame ``number`` uncompressed, little endian, colour as stored. Raises PixelsUndecodable."""
        if self.native:
            return self.stored(number)
        check_decodable(self.syntax)
        try:
            array = pixel_array(self._path, index=number - 1, raw=True)
        except Exception as error:
            # Decoders are C libraries behind plug-ins; on broken pixels they raise whatever they like.
            raise PixelsUndecodable(transfer_syntax=self.syntax, reason="a frame is broken") from error
        return little_endian(array)

    def raw(self) -> Iterator[bytes]:
        """The whole native value, in pieces."""
        self._file.seek(self.start)
        left = self.length
        while left > 0:
            piece = self._file.read(min(left, 1 << 20))
            if not piece:
                return
            left -= len(piece)
            yield piece


def _whole_number(dataset: pydicom.Dataset, keyword: str, otherwise: int) -> int:
    try:
        return int(dataset.get(keyword, otherwise) or otherwise)
    except (ValueError, TypeError):
        raise NoFrames from None


def _inflated(file: IO[bytes]) -> tuple[IO[bytes], pydicom.Dataset]:
    """A deflated object as an explicit little endian data set, positioned at its pixel data."""
    file.seek(0)
    plain = io.BytesIO()
    whole = pydicom.dcmread(file)
    file.close()
    whole.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    whole.save_as(plain)
    plain.seek(0)
    return plain, pydicom.dcmread(plain, stop_before_pixels=True, specific_tags=list(_NEEDED))


def check_decodable(syntax: UID) -> None:
    """Raise PixelsUndecodable unless this machine has a decoder for ``syntax``."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise PixelsUndecodable(transfer_syntax=syntax, reason="there is no decoder for it here")


def little_endian(array: np.ndarray[Any, Any]) -> bytes:
    """The values of ``array`` as bytes, lowest first."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
