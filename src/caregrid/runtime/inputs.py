"""Turns a study's files into what a manifest asks for: the right series, in the form wanted, or a refusal saying why for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset

from caregrid.domain.algorithm import InputSpec
from caregrid.domain.images import AlgorithmInput, Cine, Image, SeriesInput, Volume
from caregrid.errors import InputRefused, NoSuitableInput
from caregrid.runtime import _frames, _where, pixels
from caregrid.runtime._damage import DAMAGE
from caregrid.runtime._plain import plain_header
from caregrid.runtime.volumes import read_volume

#: Corrections an input may allow; without them such a series is refused.
CORRECTIONS = ("gantry-tilt", "longest-run")

_CENTIMETRES = 3


@dataclass(frozen=True)
class _Candidate:
    """One series of the study: its files, its first header, and how many pictures it holds (frames counted)."""

    uid: str
    files: tuple[Path, ...]
    header: Dataset
    attributes: dict[str, Any]
    pictures: int


def prepare(
    specs: Sequence[InputSpec],
    files_by_series: Mapping[str, Sequence[Path]],
    parameters: Mapping[str, Any],
    package: Path,
    corrections: Mapping[str, Collection[str]] | None = None,
) -> AlgorithmInput:
    """The named inputs of ``specs`` out of the series of one study.

    files_by_series: Series Instance UID → its files. corrections: input name → which of CORRECTIONS may be made on its volumes,
    None: as each of ``specs`` says.
    An optional input that nothing fits is empty. Where several series fit and one is wanted, the one with most pictures is taken;
    if it is refused the next is tried, and the first refusal is raised when none is left.
    Raises NoSuitableInput (why not, per series), VolumeRefused, PixelsUndecodable.
    """
    candidates, unread = _candidates(files_by_series)
    allowed = corrections if corrections is not None else {spec.name: spec.corrections for spec in specs}
    series = {spec.name: _chosen(spec, candidates, unread, allowed.get(spec.name, ())) for spec in specs}
    return AlgorithmInput(series=series, parameters=dict(parameters), package=package)


def _candidates(files_by_series: Mapping[str, Sequence[Path]]) -> tuple[list[_Candidate], list[str]]:
    found, unread = [], []
    for uid, files in sorted(files_by_series.items()):
        try:
            found.append(_candidate(uid, tuple(Path(file) for file in files)))
        except DAMAGE as error:
            unread.append(f"series {uid}: no readable file ({type(error).__name__})")
    return found, unread


def _candidate(uid: str, files: tuple[Path, ...]) -> _Candidate:
    header = dcmread(files[0], stop_before_pixels=True)
    frames = _frames.frame_count(header)
    pictures = len(files) if frames == 1 else sum(_frame_count_of(file) for file in files)
    return _Candidate(uid=uid, files=files, header=header, attributes=plain_header(header), pictures=pictures)


def _frame_count_of(file: Path) -> int:
    return _frames.frame_count(dcmread(file, specific_tags=["NumberOfFrames"], stop_before_pixels=True))


def _chosen(
    spec: InputSpec, candidates: list[_Candidate], unread: list[str], corrections: Collection[str]
) -> tuple[SeriesInput, ...]:
    reasons = list(unread)
    fitting = []
    for candidate in candidates:
        reason = _why_not(spec, candidate)
        if reason:
            reasons.append(f"series {candidate.uid}: {reason}")
        else:
            fitting.append(candidate)
    if not fitting:
        if spec.optional:
            return ()
        raise NoSuitableInput(input=spec.name, reason="; ".join(reasons) or "the study has no series")
    fitting.sort(key=lambda candidate: (-candidate.pictures, candidate.uid))
    return _read(spec, fitting, corrections)


def _why_not(spec: InputSpec, candidate: _Candidate) -> str:
    modality = str(candidate.attributes.get("Modality") or "")
    if spec.modality and modality not in spec.modality:
        return f"Modality is {modality or 'absent'}, not {' or '.join(spec.modality)}"
    if candidate.pictures < spec.minimum_instances:
        return f"{candidate.pictures} image(s), {spec.minimum_instances} needed"
    if spec.form == "cine" and _frames.frame_count(candidate.header) < 2:
        return "no run of frames"
    return _where.check(spec.where, candidate.attributes)


def _read(spec: InputSpec, fitting: list[_Candidate], corrections: Collection[str]) -> tuple[SeriesInput, ...]:
    """All sound series where many are wanted, else the first sound one."""
    read: list[SeriesInput] = []
    refused: InputRefused | None = None
    for candidate in fitting:
        try:
            read.append(_series_input(spec, candidate, corrections))
        except InputRefused as error:
            refused = refused or error
            continue
        except DAMAGE as error:
            reason = f"series {candidate.uid}: a header is damaged ({type(error).__name__})"
            refused = refused or NoSuitableInput(input=spec.name, reason=reason)
            continue
        if not spec.many:
            break
    if not read and refused is not None and not spec.optional:
        raise refused
    return tuple(read)


def _series_input(spec: InputSpec, candidate: _Candidate, corrections: Collection[str]) -> SeriesInput:
    volume: Volume | None = None
    images: tuple[Image, ...] = ()
    cines: tuple[Cine, ...] = ()
    if spec.form == "volume":
        volume = read_volume(candidate.files, correct_tilt="gantry-tilt" in corrections, longest_run="longest-run" in corrections)
    elif spec.form == "images":
        images = tuple(image for file in candidate.files for image in _images(file))
    elif spec.form == "cine":
        cines = tuple(_cines(candidate.files))
    return SeriesInput(
        name=spec.name,
        form=spec.form,
        modality=str(candidate.attributes.get("Modality") or ""),
        series_instance_uid=candidate.uid,
        attributes=candidate.attributes,
        files=candidate.files,
        volume=volume,
        images=images,
        cines=cines,
    )


def _images(file: Path) -> Iterable[Image]:
    """Every frame: RGB as stored, grey in modality units (MONOCHROME1 is not inverted; the attributes say which it is)."""
    dataset = dcmread(file)
    count = _frames.frame_count(dataset)
    for frame in range(1, count + 1):
        yield Image(
            array=pixels.modality_values(dataset, frame if count > 1 else None),
            sop_instance_uid=str(dataset.get("SOPInstanceUID", "")),
            frame_number=frame,
            spacing=_pixel_spacing(dataset, frame),
        )


def _pixel_spacing(dataset: Dataset, frame: int) -> tuple[float, float] | None:
    """Rows and columns in mm: at the patient where stated, else at the detector or the film, else from the ultrasound region."""
    stated = _frames.value(dataset, frame, "PixelMeasuresSequence", "PixelSpacing")
    for value in (stated, dataset.get("ImagerPixelSpacing"), dataset.get("NominalScannedPixelSpacing")):
        if value is not None and not isinstance(value, str) and len(value) == 2 and min(value) > 0:
            return (float(value[0]), float(value[1]))
    measured = [region for region in _regions(dataset) if region[4] is not None and region[5] is not None]
    if len(measured) == 1 and measured[0][4] is not None and measured[0][5] is not None:
        return (measured[0][5], measured[0][4])
    return None


def _cines(files: Sequence[Path]) -> Iterable[Cine]:
    for file in files:
        if _frame_count_of(file) < 2:
            continue
        dataset = dcmread(file)
        yield Cine(
            array=_cine_frames(dataset),
            sop_instance_uid=str(dataset.get("SOPInstanceUID", "")),
            frame_seconds=_frame_seconds(dataset),
            regions=_regions(dataset),
        )


def _cine_frames(dataset: Dataset) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Colour at 8 bits; 8-bit grey as stored; deeper grey through the object's window, frame by frame."""
    if pixels.is_colour(dataset):
        return pixels.as_uint8(pixels.decode(dataset))
    stored = pixels.decode(dataset)
    if stored.dtype == np.uint8 and str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME2":
        return stored
    return np.stack([pixels.display_image(dataset, frame) for frame in range(1, len(stored) + 1)])


def _frame_seconds(dataset: Dataset) -> float | None:
    """Seconds between frames: FrameTime, the mean of FrameTimeVector, or one over CineRate (PS3.3 C.7.6.5)."""
    frame_time = _positive(dataset.get("FrameTime"))
    if frame_time is not None:
        return frame_time / 1000.0
    vector = dataset.get("FrameTimeVector")
    if vector is not None and not isinstance(vector, str | float) and len(vector) > 1:
        # The first entry is the time before the first frame.
        mean = _positive(np.mean([float(step) for step in vector[1:]]))
        if mean is not None:
            return mean / 1000.0
    for keyword in ("CineRate", "RecommendedDisplayFrameRate"):
        rate = _positive(dataset.get(keyword))
        if rate is not None:
            return 1.0 / rate
    return None


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number > 0 else None


def _regions(dataset: Dataset) -> tuple[tuple[int, int, int, int, float | None, float | None], ...]:
    """Ultrasound regions; deltas in mm where the region is measured in centimetres (PS3.3 C.8.5.5.1.15)."""
    found = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        corners = [item.get(f"RegionLocation{corner}") for corner in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
        if any(corner is None for corner in corners):
            continue
        x0, y0, x1, y1 = (int(corner) for corner in corners)
        found.append((x0, y0, x1, y1, _delta(item, "X"), _delta(item, "Y")))
    return tuple(found)


def _delta(item: Dataset, axis: str) -> float | None:
    if item.get(f"PhysicalUnits{axis}Direction") != _CENTIMETRES:
        return None
    delta = item.get(f"PhysicalDelta{axis}")
    return None if delta is None else abs(float(delta)) * 10.0
