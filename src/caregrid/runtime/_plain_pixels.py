"""Uncompressed grey pixels taken straight from the file into a volume: no data set is made of them, no copy in between.

What is not plain in every respect is left to caregrid.runtime.pixels, which decodes it or names what is wrong with it.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from caregrid.runtime import _frames

#: Tag and VR of Pixel Data with a length of 32 bits (PS3.5 7.1.2); the length alone follows the tag in implicit VR (7.1.3).
_EXPLICIT, _IMPLICIT = struct.Struct("<HH2sHI"), struct.Struct("<HHI")
_PIXEL_DATA = (0x7FE0, 0x0010)


@dataclass(frozen=True)
class PlainPixels:
    """Where the pixels of a single-frame object lie. unused_bits: high bits of each value that mean nothing."""

    offset: int
    unused_bits: int

    def read_into(self, out: NDArray[Any], path: Path) -> bool:
        """Fill ``out`` (rows, columns), whose type is the stored one; False when the file has become shorter."""
        with path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            # One read may give less than asked for; then the rest is missing or the slow way has to find out.
            if os.readv(file.fileno(), [out.data]) != out.nbytes:
                return False
        if self.unused_bits:
            np.left_shift(out, self.unused_bits, out=out)
            np.right_shift(out, self.unused_bits, out=out)
        return True


def find(file: BinaryIO, header: Dataset) -> PlainPixels | None:
    """Where the pixels lie in ``file``, which stands right after ``header``; None when they are not plain and whole."""
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    if syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian) or not _is_plain(header):
        return None
    allocated, stored = int(header.BitsAllocated), int(header.get("BitsStored") or 0)
    length = _length(file, explicit=syntax == ExplicitVRLittleEndian)
    needed = int(header.Rows) * int(header.Columns) * allocated // 8
    offset = file.tell()
    if not 0 < stored <= allocated or length != needed + needed % 2 or offset + needed > os.fstat(file.fileno()).st_size:
        return None
    return PlainPixels(offset, allocated - stored)


def _is_plain(header: Dataset) -> bool:
    """One frame of grey in 8 or 16 bits, its meaning stated. Anything odd in the header is the slow way's to judge."""
    return (
        sys.byteorder == "little"
        and header.get("BitsAllocated") in (8, 16)
        and header.get("SamplesPerPixel") == 1
        and header.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
        and header.get("PixelRepresentation") in (0, 1)
        and isinstance(header.get("Rows"), int)
        and isinstance(header.get("Columns"), int)
        and isinstance(header.get("BitsStored"), int)
        and not _frames.is_enhanced(header)
        and _frames.frame_count(header) == 1
        and not header.get("ModalityLUTSequence")
    )


def _length(file: BinaryIO, explicit: bool) -> int:
    """The length of the Pixel Data element that comes next; -1 when something else does."""
    form = _EXPLICIT if explicit else _IMPLICIT
    raw = file.read(form.size)
    if len(raw) != form.size:
        return -1
    parts = form.unpack(raw)
    fits = parts[:2] == _PIXEL_DATA and (not explicit or parts[2] in (b"OW", b"OB"))
    return int(parts[-1]) if fits else -1
