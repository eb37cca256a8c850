"""The one reader that makes a volume of a series: it checks the geometry and refuses by name rather than build a wrong grid.

Refusal codes are explained in docs/reference/volumes.md. Coordinates are DICOM's patient coordinates (LPS, mm).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from caregrid.domain.images import Volume
from caregrid.errors import PixelsUndecodable, VolumeRefused
from caregrid.runtime import pixels
from caregrid.runtime._slices import Slice, read_slices

#: Every code VolumeRefused carries when read_volume raises it.
CODES = (
    "not-an-image",
    "colour",
    "mosaic",
    "no-geometry",
    "duplicate-instance",
    "mixed-series",
    "mixed-frame-of-reference",
    "mixed-matrix",
    "mixed-orientation",
    "multi-echo",
    "temporal",
    "multiple-stacks",
    "mixed-diffusion",
    "mixed-image-type",
    "duplicate-position",
    "too-few-slices",
    "gap",
    "variable-spacing",
    "gantry-tilt",
    "shifted-slices",
    "truncated-pixels",
)

#: Slices count as evenly spaced when no step and no position is further off than this.
SPACING_MM = 0.05
SPACING_SHARE = 0.01

#: Where one of these varies, the series holds several volumes even when no position is filled twice.
_NAMES_A_VOLUME = ("EchoNumbers", "TemporalPositionIdentifier", "TemporalPositionIndex", "StackID")

#: Direction cosines may differ by this much between slices: about what six written decimals and rounding scanners need.
_COSINE = 1e-3


def read_volume(paths: Sequence[Path], *, correct_tilt: bool = False, longest_run: bool = False) -> Volume:
    """The volume the files of one series make, slices along the normal of the image plane (PS3.3 C.7.6.2.1.1), modality units.

    paths: single-frame objects, or enhanced multi-frame ones, in any order; the same set gives the same volume.
    correct_tilt: shear a gantry-tilted, evenly spaced stack back onto a right-angled grid (linear interpolation, taller matrix).
    longest_run: where slices are missing, keep the longest evenly spaced run. What was corrected is in ``Volume.corrections``.
    Raises VolumeRefused with a code of CODES and a reason, or PixelsUndecodable.
    """
    slices, corrections = read_slices(paths)
    _check_uniform(slices)
    _check_dimensions(slices)
    _check_enough(slices)
    normal = _normal(slices)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    _check_positions(slices, normal)
    slices, corrections = _spaced(slices, normal, longest_run, corrections)
    tilt = _tilt(slices, normal, correct_tilt)
    array, affine = _read_pixels(slices), _affine(slices)
    if tilt is not None:
        array, affine, said = _untilted(array, affine, normal, tilt)
        corrections = (*corrections, said)
    return _volume(slices, array, affine, corrections)


def _volume(slices: list[Slice], array: NDArray[Any], affine: NDArray[np.float64], corrections: tuple[str, ...]) -> Volume:
    uids = tuple(one.sop_instance_uid for one in slices)
    multi_frame = slices[0].frames_in_object > 1 and len(set(uids)) == 1
    return Volume(
        array=array,
        affine=affine,
        sop_instance_uids=uids[:1] if multi_frame else uids,
        frame_numbers=tuple(one.frame for one in slices),
        series_instance_uid=slices[0].series_instance_uid,
        frame_of_reference_uid=slices[0].frame_of_reference_uid,
        corrections=corrections,
    )


def _refuse(code: str, reason: str) -> VolumeRefused:
    return VolumeRefused(code=code, reason=reason)


def _check_uniform(slices: list[Slice]) -> None:
    """One series, one frame of reference, one matrix, one orientation."""
    if len(series := {one.series_instance_uid for one in slices}) > 1:
        raise _refuse("mixed-series", f"the files belong to {len(series)} series")
    if len(frames := {one.frame_of_reference_uid for one in slices}) > 1:
        raise _refuse("mixed-frame-of-reference", f"the slices lie in {len(frames)} frames of reference")
    if len(matrices := {one.matrix for one in slices}) > 1:
        sizes = ", ".join(f"{rows}×{columns}" for rows, columns in sorted(matrices))
        raise _refuse("mixed-matrix", f"the slices have different sizes: {sizes}")
    spacings = np.array([one.spacing for one in slices])
    # One part in a thousand moves the last of 512 columns by half a pixel.
    if np.any(np.ptp(spacings, axis=0) > 1e-3 * spacings.min(axis=0)):
        raise _refuse("mixed-matrix", "the slices have different PixelSpacing")
    orientations = np.array([one.orientation for one in slices])
    odd = np.any(np.abs(orientations - np.median(orientations, axis=0)) > _COSINE, axis=1)
    if odd.any():
        raise _refuse("mixed-orientation", f"{int(odd.sum())} of {len(slices)} slices are turned differently from the others")


def _check_dimensions(slices: list[Slice]) -> None:
    """Refuses several volumes in one series. An attribute that merely varies along the stack is not yet a second volume."""
    places = Counter(tuple(np.round(one.position, 2)) for one in slices)
    repeated = sum(count - 1 for count in places.values())
    # One slice sent twice is a mishap; most places filled again is another volume.
    several = sum(count > 1 for count in places.values()) > len(places) / 2
    for code, keyword in _dimension_names(slices):
        values = {one.dimensions.get((code, keyword)) for one in slices}
        if len(values) > 1 and (several or keyword in _NAMES_A_VOLUME):
            raise _refuse(code, f"{len(values)} volumes in one series, told apart by {keyword}")
    if several and len(set(places.values())) == 1:
        raise _refuse("temporal", f"{repeated // len(places) + 1} volumes in one series, and no attribute tells them apart")
    if repeated:
        raise _refuse("duplicate-position", f"{repeated} slice(s) lie where another one already lies")


def _dimension_names(slices: list[Slice]) -> list[tuple[str, str]]:
    names: dict[tuple[str, str], None] = {}
    for one in slices:
        names.update(dict.fromkeys(one.dimensions))
    return list(names)


def _check_enough(slices: list[Slice]) -> None:
    if len(slices) < 2:
        raise _refuse("too-few-slices", "one slice alone has no third dimension")


def _normal(slices: list[Slice]) -> NDArray[np.float64]:
    mean = np.mean([one.orientation for one in slices], axis=0)
    normal = np.cross(mean[:3], mean[3:])
    return np.asarray(normal / np.linalg.norm(normal))


def _along(slices: list[Slice], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([one.position @ normal for one in slices])


def _check_positions(slices: list[Slice], normal: NDArray[np.float64]) -> None:
    """Two slices in the same plane, moved sideways or not, are no stack."""
    steps = np.diff(_along(slices, normal))
    close = steps < min(0.01, 0.1 * float(np.median(steps)))
    if close.any() or not np.median(steps) > 0:
        raise _refuse("duplicate-position", f"{max(1, int(close.sum()))} slice(s) lie in the plane of another one")


def _tolerance(step: float) -> float:
    # For micrometre steps 0.05 mm would be everything, so a tenth of a step is the most.
    return min(max(SPACING_MM, SPACING_SHARE * step), 0.1 * step)


def _is_even(along: NDArray[np.float64]) -> bool:
    """Whether steps, and positions against the straight line from first to last, are within tolerance."""
    step = float(along[-1] - along[0]) / (len(along) - 1)
    straight = along[0] + step * np.arange(len(along))
    limit = _tolerance(step)
    return bool(np.all(np.abs(np.diff(along) - step) <= limit) and np.all(np.abs(along - straight) <= limit))


def _spaced(
    slices: list[Slice], normal: NDArray[np.float64], longest_run: bool, corrections: tuple[str, ...]
) -> tuple[list[Slice], tuple[str, ...]]:
    along = _along(slices, normal)
    if _is_even(along):
        return slices, corrections
    steps = np.diff(along)
    base = float(steps.min())
    multiples = np.rint(steps / base)
    whole = np.abs(steps - multiples * base) <= np.maximum(_tolerance(base), SPACING_SHARE * steps)
    if not whole.all() or multiples.max() == 1:
        raise _refuse("variable-spacing", f"the distance between slices varies from {steps.min():.2f} to {steps.max():.2f} mm")
    missing = int((multiples - 1).sum())
    if not longest_run:
        place = int(np.argmax(multiples > 1)) + 1
        raise _refuse(
            "gap", f"{missing} slice(s) missing at steps of {base:.2f} mm, the first after slice {place} of {len(slices)}"
        )
    kept = _longest(slices, multiples)
    if len(kept) < 2 or not _is_even(_along(kept, normal)):
        raise _refuse("gap", f"{missing} slice(s) missing and no evenly spaced run is left")
    return kept, (*corrections, f"longest-run: kept {len(kept)} of {len(slices)} slices, {missing} missing")


def _longest(slices: list[Slice], multiples: NDArray[np.float64]) -> list[Slice]:
    breaks = [0, *(int(place) + 1 for place in np.flatnonzero(multiples > 1)), len(slices)]
    runs = [slices[start:end] for start, end in pairwise(breaks)]
    return max(runs, key=len)


def _tilt(slices: list[Slice], normal: NDArray[np.float64], correct: bool) -> NDArray[np.float64] | None:
    """The sideways step per slice (mm, LPS) of a tilted stack, None for a straight one."""
    positions = np.array([one.position for one in slices])
    offsets = positions - positions[0]
    sideways = offsets - np.outer(offsets @ normal, normal)
    extent = float(np.linalg.norm(offsets[-1]))
    step = sideways[-1] / (len(slices) - 1)
    uneven = np.linalg.norm(sideways - np.outer(np.arange(len(slices)), step), axis=1)
    if float(uneven.max()) > max(0.1, 1e-3 * extent):
        raise _refuse("shifted-slices", f"slices are moved sideways against each other by up to {uneven.max():.2f} mm")
    if float(np.linalg.norm(sideways[-1])) <= max(0.1, 1e-3 * extent):
        return None
    rise = float(offsets[-1] @ normal) / (len(slices) - 1)
    degrees = float(np.degrees(np.arctan2(np.linalg.norm(step), rise)))
    if not correct:
        raise _refuse("gantry-tilt", f"the stack leans by {degrees:.1f}° against the normal of its slices")
    return np.asarray(step)


def _affine(slices: list[Slice]) -> NDArray[np.float64]:
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, 0] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 1] = first.orientation[3:] * first.spacing[0]
    affine[:3, 2] = first.orientation[:3] * first.spacing[1]
    affine[:3, 3] = first.position
    return affine


def _untilted(
    array: NDArray[Any], affine: NDArray[np.float64], normal: NDArray[np.float64], step: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[np.float64], str]:
    """Shears the stack back: slice k is moved by k sideways steps, the matrix grown so that nothing is cut off."""
    from scipy.ndimage import shift

    down, across = affine[:3, 1], affine[:3, 2]
    per_slice = np.array([step @ down / (down @ down), step @ across / (across @ across)])
    total = per_slice * (len(array) - 1)
    before, grow = np.ceil(np.maximum(-total, 0)).astype(int), np.ceil(np.abs(total)).astype(int)
    empty = float(array.min())
    shape = (len(array), array.shape[1] + int(grow[0]), array.shape[2] + int(grow[1]))
    out = np.full(shape, empty, dtype=array.dtype)
    for number, one in enumerate(array):
        canvas = np.full(shape[1:], empty, dtype=np.float32)
        canvas[before[0] : before[0] + one.shape[0], before[1] : before[1] + one.shape[1]] = one
        moved = shift(canvas, per_slice * number, order=1, mode="constant", cval=empty)
        out[number] = np.rint(moved) if out.dtype.kind == "i" else moved
    straight = affine.copy()
    straight[:3, 0] = normal * float(affine[:3, 0] @ normal)
    straight[:3, 3] = affine[:3, 3] - before[0] * down - before[1] * across
    degrees = float(np.degrees(np.arctan2(np.linalg.norm(step), float(affine[:3, 0] @ normal))))
    return out, straight, f"gantry-tilt: sheared back by {degrees:.1f}°, linear interpolation between rows"


def _read_pixels(slices: list[Slice]) -> NDArray[Any]:
    """Fills one preallocated array with stored values, then turns it into modality units, in place where it fits int16."""
    with_lut = any(one.has_lut for one in slices)
    stored = np.dtype(np.float32) if with_lut else np.result_type(*{one.stored for one in slices})
    out = np.empty((len(slices), *slices[0].matrix), dtype=stored)
    by_path: dict[Path, list[int]] = {}
    for number, one in enumerate(slices):
        by_path.setdefault(one.path, []).append(number)
    # Reading releases the interpreter, and of the decoders only Pillow's JPEG; for the others reading overlaps with decoding.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda numbers: _fill(out, slices, numbers, with_lut), by_path.values()))
        if with_lut:
            return pixels.compact(out)
        return _modality_units(out, [one.scale for one in slices], pool)


def _fill(out: NDArray[Any], slices: list[Slice], numbers: list[int], with_lut: bool) -> None:
    first = slices[numbers[0]]
    if first.plain is not None and out.dtype == first.stored and first.plain.read_into(out[numbers[0]], first.path):
        return
    dataset = dcmread(first.path)
    several = first.frames_in_object > 1
    for number in numbers:
        one = slices[number]
        frame = one.frame if several else None
        try:
            out[number] = pixels.modality_values(dataset, frame) if with_lut else pixels.decode(dataset, frame)
        except PixelsUndecodable as error:
            if error.details.get("code") != "truncated":
                raise
            raise _refuse("truncated-pixels", f"{one.path.name}: {error.details['reason']}") from error


def _modality_units(out: NDArray[Any], scales: list[tuple[float, float]], pool: ThreadPoolExecutor) -> NDArray[Any]:
    """Rescaled in place where the stored type has 16 bits and every value fits int16; ``out`` is used up."""
    whole = out.dtype.kind in "iu" and all(pool.map(_fits, out, scales))
    if whole and out.dtype.itemsize == 2:
        result = out.view(np.int16)
        list(pool.map(_rescale, result, scales))
        return result
    result = np.empty(out.shape, dtype=np.int16 if whole else np.float32)
    for number, (slope, intercept) in enumerate(scales):
        result[number] = pixels.scaled(out[number], slope, intercept)
    return result


def _fits(one: NDArray[Any], scale: tuple[float, float]) -> bool:
    return pixels.fits_int16(int(one.min()), int(one.max()), *scale)


def _rescale(one: NDArray[np.int16], scale: tuple[float, float]) -> None:
    """Arithmetic modulo 2^16 is right here: the true result is known to fit."""
    slope, intercept = _int16(scale[0]), _int16(scale[1])
    if slope != 1:
        one *= slope
    if intercept != 0:
        one += intercept


def _int16(number: float) -> np.int16:
    return np.int16((int(number) + 0x8000) % 0x10000 - 0x8000)
