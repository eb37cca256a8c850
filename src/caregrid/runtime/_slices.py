"""What each slice of a series says about itself, read from headers alone, before any pixel is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from caregrid.errors import VolumeRefused
from caregrid.runtime import _frames, _plain_pixels, pixels
from caregrid.runtime._damage import DAMAGE
from caregrid.runtime._plain_pixels import PlainPixels

#: Only these are read from each header; the rest, and the pixels, stay on disk.
_KEYWORDS = [
    "AcquisitionNumber",
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "DiffusionBValue",
    "EchoNumbers",
    "EchoTime",
    "FrameOfReferenceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SharedFunctionalGroupsSequence",
    "SOPClassUID",
    "SOPInstanceUID",
    "TemporalPositionIdentifier",
    "TriggerTime",
]

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_MOSAIC_TAG = 0x0019100A

_TAGS: list[BaseTag] = [Tag(keyword) for keyword in _KEYWORDS] + [Tag(_MOSAIC_TAG)]

#: Attributes that tell volumes in one series apart: (refusal code, functional group, keyword).
_DIMENSIONS = (
    ("multi-echo", "MREchoSequence", "EffectiveEchoTime"),
    ("multi-echo", "", "EchoNumbers"),
    ("multi-echo", "", "EchoTime"),
    ("temporal", "FrameContentSequence", "TemporalPositionIndex"),
    ("temporal", "", "TemporalPositionIdentifier"),
    ("temporal", "", "TriggerTime"),
    ("multiple-stacks", "FrameContentSequence", "StackID"),
    ("mixed-diffusion", "MRDiffusionSequence", "DiffusionBValue"),
    ("mixed-diffusion", "", "DiffusionBValue"),
    ("temporal", "", "AcquisitionNumber"),
    ("mixed-image-type", "", "ImageType"),
)


@dataclass(frozen=True)
class Slice:
    """One slice: a single-frame object or one frame of a multi-frame one. Positions and spacing in mm (LPS).

    plain: where its pixels lie in the file, when they can be taken from there as they are.
    """

    path: Path
    sop_instance_uid: str
    frame: int
    frames_in_object: int
    series_instance_uid: str
    frame_of_reference_uid: str
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: tuple[float, float]
    matrix: tuple[int, int]
    scale: tuple[float, float]
    has_lut: bool
    compressed: bool
    stored: np.dtype[Any]
    dimensions: dict[tuple[str, str], Any]
    plain: PlainPixels | None


@dataclass(frozen=True)
class _Header:
    """What is read of one file."""

    path: Path
    dataset: Dataset
    uid: str
    plain: PlainPixels | None


def read_slices(paths: Sequence[Path]) -> tuple[list[Slice], tuple[str, ...]]:
    """The slices of all ``paths``, repeated files dropped, with what was corrected. Raises VolumeRefused."""
    if not paths:
        raise VolumeRefused(code="too-few-slices", reason="no file was given")
    headers = [_read_header(path) for path in sorted(paths)]
    headers, corrections = _without_repeats(headers)
    return [one for header in headers for one in _slices_of(header)], corrections


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            return _Header(path, dataset, str(dataset.get("SOPInstanceUID") or ""), _plain_pixels.find(file, dataset))
    except DAMAGE as error:
        raise VolumeRefused(code="not-an-image", reason=f"{path.name} is not readable DICOM ({type(error).__name__})") from error


def _without_repeats(headers: list[_Header]) -> tuple[list[_Header], tuple[str, ...]]:
    """Drops second copies of an instance; two different objects under one UID are refused."""
    kept: dict[str, _Header] = {}
    dropped = 0
    for header in headers:
        uid = header.uid or str(header.path)
        if uid not in kept:
            kept[uid] = header
        elif _same_object(kept[uid].path, header.path):
            dropped += 1
        else:
            raise VolumeRefused(code="duplicate-instance", reason=f"two different objects carry SOP Instance UID {uid}")
    said = (f"duplicate-instance: {dropped} repeated file(s) dropped",) if dropped else ()
    return list(kept.values()), said


def _same_object(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes() or bool(dcmread(first) == dcmread(second))


def _check_image(path: Path, header: Dataset) -> None:
    if header.get("SOPClassUID") in _SEGMENTATIONS:
        raise VolumeRefused(code="not-an-image", reason=f"{path.name} is a segmentation")
    if not header.get("Rows") or not header.get("Columns"):
        raise VolumeRefused(code="not-an-image", reason=f"{path.name} has no pixels")
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise VolumeRefused(code="colour", reason=f"{path.name} is a colour picture")
    kind = _image_type(header)
    if "MOSAIC" in kind or _MOSAIC_TAG in header:
        raise VolumeRefused(code="mosaic", reason=f"{path.name} is a mosaic: many slices tiled in one picture")
    if "LOCALIZER" in kind:
        raise VolumeRefused(code="no-geometry", reason=f"{path.name} is a localizer")
    frames, described = _frames.frame_count(header), len(header.get("PerFrameFunctionalGroupsSequence") or [])
    if frames > 1 and described < frames:
        raise VolumeRefused(code="no-geometry", reason=f"{path.name} has {frames} frames and says of {described} where they lie")


def _image_type(header: Dataset) -> tuple[str, ...]:
    kind = header.get("ImageType") or ()
    return (kind,) if isinstance(kind, str) else tuple(str(part) for part in kind)


def _slices_of(header: _Header) -> list[Slice]:
    path, dataset = header.path, header.dataset
    try:
        _check_image(path, dataset)
        compressed = pixels.is_compressed(dataset)
        return [_slice(header, frame, compressed) for frame in range(1, _frames.frame_count(dataset) + 1)]
    except DAMAGE as error:
        reason = f"the header of {path.name} is damaged ({type(error).__name__})"
        raise VolumeRefused(code="not-an-image", reason=reason) from error


def _slice(read: _Header, frame: int, compressed: bool) -> Slice:
    path, header = read.path, read.dataset
    position = _numbers(header, frame, "PlanePositionSequence", "ImagePositionPatient", 3, path)
    orientation = _numbers(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient", 6, path)
    spacing = _numbers(header, frame, "PixelMeasuresSequence", "PixelSpacing", 2, path)
    _check_geometry(path, orientation, spacing)
    return Slice(
        path=path,
        sop_instance_uid=read.uid,
        frame=frame,
        frames_in_object=_frames.frame_count(header),
        series_instance_uid=str(header.get("SeriesInstanceUID", "")),
        frame_of_reference_uid=str(header.get("FrameOfReferenceUID", "")),
        position=position,
        orientation=orientation,
        spacing=(float(spacing[0]), float(spacing[1])),
        matrix=(int(header.Rows), int(header.Columns)),
        scale=pixels.rescale(header, frame),
        has_lut=bool(header.get("ModalityLUTSequence")),
        compressed=compressed,
        stored=_stored_type(header),
        dimensions=_dimensions(header, frame),
        plain=read.plain,
    )


def _numbers(header: Dataset, frame: int, group: str, keyword: str, count: int, path: Path) -> NDArray[np.float64]:
    stated = _frames.value(header, frame, group, keyword)
    try:
        numbers = np.array([float(number) for number in stated], dtype=np.float64)
    except (TypeError, ValueError):
        raise VolumeRefused(code="no-geometry", reason=f"{path.name} has no usable {keyword}") from None
    if numbers.shape != (count,) or not np.all(np.isfinite(numbers)):
        raise VolumeRefused(code="no-geometry", reason=f"{path.name} has no usable {keyword}")
    return numbers


def _check_geometry(path: Path, orientation: NDArray[np.float64], spacing: NDArray[np.float64]) -> None:
    along_row, along_column = orientation[:3], orientation[3:]
    lengths = np.array([np.linalg.norm(along_row), np.linalg.norm(along_column)])
    if np.any(np.abs(lengths - 1.0) > 1e-2) or abs(float(along_row @ along_column)) > 1e-2:
        raise VolumeRefused(
            code="no-geometry", reason=f"{path.name}: ImageOrientationPatient is not two unit vectors at right angles"
        )
    if np.any(spacing <= 0):
        raise VolumeRefused(code="no-geometry", reason=f"{path.name}: PixelSpacing is not positive")


def _stored_type(header: Dataset) -> np.dtype[Any]:
    bits = int(header.get("BitsAllocated") or 16)
    if header.get("PixelRepresentation") is None and bits > 16:
        return np.dtype(f"f{bits // 8}")
    signed = int(header.get("PixelRepresentation") or 0) == 1
    return np.dtype(f"{'i' if signed else 'u'}{(bits + 7) // 8}")


def _dimensions(header: Dataset, frame: int) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for code, group, keyword in _DIMENSIONS:
        item = _frames.macro(header, frame, group) if group else header
        value = item.get(keyword) if item is not None and keyword in item else None
        if value is not None and value != "":
            found[(code, keyword)] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, float | int):
        return round(float(value), 3)
    return str(value)
