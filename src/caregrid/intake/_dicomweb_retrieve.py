"""WADO-RS (PS3.18 10.4): objects, frames and pictures, streamed from the files they lie in."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pydicom
from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from caregrid.errors import InputRefused, NoFrames, PixelsUndecodable
from caregrid.intake import _dicomweb_metadata as metadata
from caregrid.intake._dicomweb_accept import Acceptable
from caregrid.intake._dicomweb_index import Kept
from caregrid.intake._dicomweb_multipart import encode
from caregrid.intake._dicomweb_pixels import OCTETS, PixelFile, check_decodable
from caregrid.runtime.pixels import display_image

DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"

_BLOCK = 1 << 20
_THUMBNAIL_PIXELS = 200

#: Rewriting these to Explicit VR Little Endian changes no pixel value.
_PLAIN = (ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)


class _NotAcceptable(HTTPException):
    def __init__(self, why: str) -> None:
        super().__init__(406, why)


# whole objects ------------------------------------------------------------------------------------------------------


def objects(kept: Sequence[Kept], folder: Path, ranges: Sequence[Acceptable]) -> Response:
    """The objects as one multipart body, each in its stored transfer syntax or in the one asked for. Raises HTTPException 406.

    A range without a transfer syntax takes what is stored: nothing is decoded that the client did not ask to have decoded.
    """
    choices = [_choose(each, ranges) for each in kept]
    try:
        first = _object(folder, kept[0], choices[0])
    except PixelsUndecodable as error:
        raise _NotAcceptable(error.message) from None
    if not any(each.multipart and each.takes(DICOM) for each in ranges):
        if len(kept) != 1:
            raise _NotAcceptable("Several objects are only sent as multipart/related")
        return StreamingResponse(first, media_type=f"{DICOM}; transfer-syntax={choices[0]}")
    parts = (
        (f"{DICOM}; transfer-syntax={syntax}", "", _object(folder, each, syntax) if number else first)
        for number, (each, syntax) in enumerate(zip(kept, choices, strict=True))
    )
    return _multipart(DICOM, parts)


def _choose(kept: Kept, ranges: Sequence[Acceptable]) -> str:
    """The transfer syntax to send an object in."""
    stored = kept.transfer_syntax_uid
    for each in ranges:
        if not each.takes(DICOM):
            continue
        if each.transfer_syntax in ("", "*", stored):
            return stored
        if each.transfer_syntax == ExplicitVRLittleEndian and _convertible(UID(stored)):
            return str(ExplicitVRLittleEndian)
    raise _NotAcceptable(f"An object is stored as {UID(stored).name} and cannot be given in what you accept")


def _convertible(syntax: UID) -> bool:
    if syntax in _PLAIN:
        return True
    if syntax == ExplicitVRBigEndian:
        return False
    try:
        check_decodable(syntax)
    except PixelsUndecodable:
        return False
    return True


def _object(folder: Path, kept: Kept, wanted: str) -> Iterator[bytes]:
    """The bytes of an object in a transfer syntax. Raises PixelsUndecodable, before the first byte is asked for."""
    path = folder / kept.path
    return _file(path) if wanted == kept.transfer_syntax_uid else _blocks(_explicit(path))


def _file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from _blocks(file)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _explicit(path: Path) -> IO[bytes]:
    """The object rewritten as Explicit VR Little Endian under the same UIDs. Raises PixelsUndecodable."""
    dataset = pydicom.dcmread(path)
    syntax = dataset.file_meta.TransferSyntaxUID
    rewritten = io.BytesIO()
    try:
        if syntax in _PLAIN:
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        else:
            dataset.decompress(as_rgb=False, generate_instance_uid=False)
        dataset.save_as(rewritten, enforce_file_format=True, implicit_vr=False, little_endian=True)
    except Exception as error:
        # Decoders are C libraries behind plug-ins, and the data set was never checked element by element.
        raise PixelsUndecodable(transfer_syntax=syntax, reason="the object cannot be rewritten") from error
    rewritten.seek(0)
    return rewritten


def _multipart(media: str, parts: Iterator[tuple[str, str, Iterator[bytes]]]) -> Response:
    boundary = secrets.token_hex(16)
    return StreamingResponse(encode(boundary, parts), media_type=f'multipart/related; type="{media}"; boundary={boundary}')


# metadata and bulk --------------------------------------------------------------------------------------------------


def metadata_of(kept: Sequence[Kept], folder: Path, root: str, ranges: Sequence[Acceptable]) -> Response:
    """The objects as DICOM JSON, bulk data by address below ``root``."""
    if not any(each.takes(DICOM_JSON) or each.takes("application/json") for each in ranges):
        raise _NotAcceptable(f"Metadata is {DICOM_JSON}")

    def array() -> Iterator[bytes]:
        for number, each in enumerate(kept):
            yield b"," if number else b"["
            yield metadata.as_json(folder / each.path, address_of(each, root))
        yield b"]"

    return StreamingResponse(array(), media_type=DICOM_JSON)


def address_of(kept: Kept, root: str) -> str:
    """Where an object is retrieved from."""
    return f"{root}/studies/{kept.study_instance_uid}/series/{kept.series_instance_uid}/instances/{kept.sop_instance_uid}"


def bulk(kept: Kept, folder: Path, place: str, ranges: Sequence[Acceptable]) -> Response:
    """The binary value at ``place`` of an object. Raises HTTPException 404."""
    path = folder / kept.path
    if place.upper() in ("7FE00008", "7FE00009", "7FE00010"):
        return _bulk_pixels(path, place.upper(), ranges)
    value = metadata.bulk_value(path, place)
    if value is None:
        raise HTTPException(404, "The object has no bulk data there")
    return _octets([(OCTETS, value)], ranges, OCTETS)


def _bulk_pixels(path: Path, tag: str, ranges: Sequence[Acceptable]) -> Response:
    try:
        with PixelFile(path) as pixels:
            if pixels.tag != tag:
                raise NoFrames
            numbers = list(range(1, pixels.frames + 1))
            native = pixels.native and pixels.syntax != ExplicitVRBigEndian
    except NoFrames:
        raise HTTPException(404, "The object has no such pixel data") from None
    return _native_pixels(path, ranges) if native else _frames(path, numbers, ranges)


def _native_pixels(path: Path, ranges: Sequence[Acceptable]) -> Response:
    def content() -> Iterator[bytes]:
        with PixelFile(path) as pixels:
            yield from pixels.raw()

    if not any(each.multipart and each.takes(OCTETS) for each in ranges):
        return StreamingResponse(content(), media_type=OCTETS)
    return _multipart(OCTETS, iter([(OCTETS, "", content())]))


# frames -------------------------------------------------------------------------------------------------------------


def frames(kept: Kept, folder: Path, numbers: Sequence[int], ranges: Sequence[Acceptable]) -> Response:
    """The frames asked for, as stored where the client takes that, else decoded. Raises HTTPException 404, 406."""
    return _frames(folder / kept.path, numbers, ranges)


def _frames(path: Path, numbers: Sequence[int], ranges: Sequence[Acceptable]) -> Response:
    try:
        with PixelFile(path) as pixels:
            if not numbers or min(numbers) < 1 or max(numbers) > pixels.frames:
                raise HTTPException(404, "The object has no such frame")
            media, as_stored = _choose_frame(pixels, ranges)
            syntax = pixels.sent_syntax if as_stored else str(ExplicitVRLittleEndian)
            first = pixels.stored(numbers[0]) if as_stored else pixels.decoded(numbers[0])
    except NoFrames:
        raise HTTPException(404, "The object has no such frame") from None
    except PixelsUndecodable as error:
        raise _NotAcceptable(error.message) from None
    kind = f"{media}; transfer-syntax={syntax}"
    if not any(each.multipart and each.takes(media) for each in ranges):
        return _one_frame(first, numbers, kind)

    def parts() -> Iterator[tuple[str, str, Iterator[bytes]]]:
        with PixelFile(path) as pixels:
            for place, number in enumerate(numbers):
                content = first if place == 0 else (pixels.stored(number) if as_stored else pixels.decoded(number))
                yield kind, "", iter([content])

    return _multipart(media, parts())


def _one_frame(content: bytes, numbers: Sequence[int], kind: str) -> Response:
    if len(numbers) != 1:
        raise _NotAcceptable("Several frames are only sent as multipart/related")
    return Response(content, media_type=kind)


def _choose_frame(pixels: PixelFile, ranges: Sequence[Acceptable]) -> tuple[str, bool]:
    """(media type, whether as stored) for the frames of an object."""
    for each in ranges:
        stored_syntax = each.transfer_syntax in ("", "*", pixels.sent_syntax)
        if pixels.native:
            if each.takes(OCTETS) and each.transfer_syntax in ("", "*", str(ExplicitVRLittleEndian)):
                return OCTETS, True
            continue
        if each.takes(pixels.media_type) and stored_syntax and each.media != OCTETS:
            return pixels.media_type, True
        if each.media == OCTETS and each.transfer_syntax in ("*", pixels.sent_syntax):
            return OCTETS, True
        if each.takes(OCTETS) and each.transfer_syntax in ("", str(ExplicitVRLittleEndian)):
            return OCTETS, False
    raise _NotAcceptable(f"The frames are {pixels.media_type}, transfer syntax {pixels.sent_syntax}")


def _octets(values: Sequence[tuple[str, bytes]], ranges: Sequence[Acceptable], media: str) -> Response:
    if not any(each.multipart and each.takes(media) for each in ranges):
        return Response(values[0][1], media_type=values[0][0])
    return _multipart(media, ((kind, "", iter([value])) for kind, value in values))


# pictures -----------------------------------------------------------------------------------------------------------


def picture(
    kept: Kept,
    folder: Path,
    ranges: Sequence[Acceptable],
    frame: int = 0,
    window: tuple[float, float] | None = None,
    viewport: tuple[int, int] | None = None,
) -> Response:
    """A frame as PNG or JPEG for people to look at; frame 0 is the middle one. Raises HTTPException 404, 406."""
    form = next((kind for each in ranges for kind in ("image/png", "image/jpeg") if each.takes(kind)), None)
    if form is None:
        raise _NotAcceptable("Pictures are image/png or image/jpeg")
    path = folder / kept.path
    try:
        with PixelFile(path) as pixels:
            number = frame or (pixels.frames + 1) // 2
        image = Image.fromarray(display_image(pydicom.dcmread(path), number, window))
    except NoFrames:
        raise HTTPException(404, "The object is no image") from None
    except InputRefused as error:
        raise _NotAcceptable(error.message) from None
    if viewport:
        image.thumbnail(viewport)
    encoded = io.BytesIO()
    image.save(encoded, "PNG" if form == "image/png" else "JPEG")
    return Response(encoded.getvalue(), media_type=form)


def thumbnail(kept: Kept, folder: Path, ranges: Sequence[Acceptable]) -> Response:
    """A small picture of an object's middle frame. Raises HTTPException 404, 406."""
    return picture(kept, folder, ranges, viewport=(_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
