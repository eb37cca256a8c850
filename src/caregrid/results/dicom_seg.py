"""DICOM Segmentation (PS3.3 A.51), BINARY: the masks of the findings on the geometry of their source series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from caregrid.domain.findings import Findings, Segment
from caregrid.errors import ResultInvalid
from caregrid.results._common import (
    ResultContext,
    algorithm_identification,
    coded,
    finish,
    series_arguments,
    tracking_uid,
)

FORMAT = "dicom_seg"

#: sRGB colours of the segments in turn; viewers take them as a recommendation.
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#008080")


def write(context: ResultContext, findings: Findings) -> list[Dataset]:
    """One SEG per source series that has a mask with a voxel set; an empty list when there is none.

    Pictures that do not lie in a patient space (X-rays, ultrasound) get one SEG per picture. Segments on a cine are left out
    (see unwritable). Raises ResultInvalid when a mask does not have the shape of its source.
    """
    made: list[Dataset] = []
    for uid, segments in _by_series(findings).items():
        sources = _sources(context, findings, segments, uid)
        if _in_space(sources):
            made.append(_segmentation(context, findings, segments, sources, len(made) + 1, uid))
        elif not _is_cine(sources):
            for place, source in enumerate(sources):
                here = [replace(one, mask=_stack(one)[place : place + 1]) for one in segments if _stack(one)[place].any()]
                if here:
                    part = f"{uid}/{source.SOPInstanceUID}"
                    made.append(_segmentation(context, findings, here, [source], len(made) + 1, part))
    return made


def unwritable(context: ResultContext, findings: Findings) -> tuple[str, ...]:
    """Labels of segments that no SEG is written for: DICOM viewers and highdicom place a SEG frame by its position in the
    patient, and the frames of a cine have none. Such a finding is carried by the SR (frames) and by a picture.
    """
    if not any(_frames(header) > 1 for header in context.headers):
        return ()
    return tuple(
        segment.label
        for uid, segments in _by_series(findings).items()
        if _is_cine(_sources(context, findings, segments, uid))
        for segment in segments
    )


def _by_series(findings: Findings) -> dict[str, list[Segment]]:
    series: dict[str, list[Segment]] = {}
    for segment in findings.segments:
        if segment.mask.any():
            series.setdefault(segment.source_series, []).append(segment)
    return series


def _sources(context: ResultContext, findings: Findings, segments: list[Segment], series: str) -> list[Dataset]:
    sources = source_order([header for header in context.used(findings) if header.SeriesInstanceUID == series])
    _check_shape(sources, segments, series)
    _state_spacing(sources)
    return sources


def _state_spacing(sources: list[Dataset]) -> None:
    """Make Spacing Between Slices the distance there is: sources leave it out or say the thickness, and the SEG copies it."""
    if len(sources) < 2 or not _in_space(sources):
        return
    positions = np.array([one.ImagePositionPatient for one in sources], float)
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    even = bool(np.ptp(steps) <= 0.01 * steps.mean())
    for one in sources:
        one.pop("SpacingBetweenSlices", None)
        if even:
            one.SpacingBetweenSlices = round(float(steps.mean()), 6)


def _in_space(sources: list[Dataset]) -> bool:
    """Whether the sources lie in a patient space: a frame of reference, and a position per slice or frame."""
    positioned = all("ImagePositionPatient" in one or "PerFrameFunctionalGroupsSequence" in one for one in sources)
    return positioned and all(one.get("FrameOfReferenceUID") for one in sources)


def _is_cine(sources: list[Dataset]) -> bool:
    return not _in_space(sources) and any(_frames(one) > 1 for one in sources)


def _frames(header: Dataset) -> int:
    return int(header.get("NumberOfFrames", 1) or 1)


def _segmentation(
    context: ResultContext, findings: Findings, segments: list[Segment], sources: list[Dataset], number: int, part: str
) -> Dataset:
    study = str(context.identity.StudyInstanceUID)
    dataset = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=_pixels(segments)[_frame_order(sources)],
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(context, findings, segment, index, study) for index, segment in enumerate(segments, start=1)
        ],
        content_label=_content_label(context.manifest.name),
        content_description=context.manifest.title[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        **series_arguments(context, FORMAT, number, part),
    )
    if not _in_space(sources):
        dataset.PatientOrientation = sources[0].get("PatientOrientation") or []  # type 2C without plane orientation
    return finish(dataset, context)


def source_order(headers: Sequence[Dataset]) -> list[Dataset]:
    """Source instances in the order of a mask's first axis: along the slice normal, or as given when none lies in the patient."""
    if len(headers) < 2 or any("ImagePositionPatient" not in header for header in headers):
        return list(headers)
    row, column = np.split(np.asarray(headers[0].ImageOrientationPatient, float), 2)
    normal = np.cross(row, column)
    return sorted(headers, key=lambda header: float(np.dot(normal, np.asarray(header.ImagePositionPatient, float))))


def _frame_order(sources: list[Dataset]) -> NDArray[np.intp]:
    """Which place of the mask's first axis each source frame has: frames of one object need not lie in order."""
    if len(sources) != 1 or not _in_space(sources) or _frames(sources[0]) == 1:
        return np.arange(sum(_frames(one) for one in sources))
    shared = sources[0].get("SharedFunctionalGroupsSequence") or [Dataset()]
    groups = sources[0].PerFrameFunctionalGroupsSequence
    orientation = _plane(shared[0], groups[0], "PlaneOrientationSequence", "ImageOrientationPatient")
    normal = np.cross(orientation[:3], orientation[3:])
    along = [_plane(shared[0], one, "PlanePositionSequence", "ImagePositionPatient") @ normal for one in groups]
    return np.argsort(np.argsort(along, kind="stable"), kind="stable")


def _plane(shared: Dataset, group: Dataset, sequence: str, keyword: str) -> NDArray[np.float64]:
    return np.asarray((group.get(sequence) or shared[sequence].value)[0][keyword].value, float)


def _check_shape(sources: list[Dataset], segments: list[Segment], series: str) -> None:
    if not sources:
        raise ResultInvalid(kind=FORMAT, reason=f"no instance of series {series} was read, yet a segment lies on it")
    wanted = (sum(_frames(header) for header in sources), int(sources[0].Rows), int(sources[0].Columns))
    for segment in segments:
        shape = _stack(segment).shape
        if shape != wanted:
            raise ResultInvalid(kind=FORMAT, reason=f"segment {segment.label} has shape {shape}, its source {wanted}")


def _stack(segment: Segment) -> NDArray[np.bool_]:
    """The mask as (slices or frames, rows, columns)."""
    return np.ascontiguousarray(segment.mask if segment.mask.ndim == 3 else segment.mask[np.newaxis])


def _pixels(segments: list[Segment]) -> NDArray[np.uint8]:
    """A label map (frames, rows, columns) when no segments overlap, else (frames, rows, columns, segments)."""
    masks = [_stack(segment) for segment in segments]
    if len(masks) > 255:
        return np.stack(masks, axis=-1).astype(np.uint8)
    labels = np.zeros(masks[0].shape, np.uint8)
    # Slice by slice: one slice fits the processor's cache, a whole mask does not.
    for place, picture in enumerate(labels):
        for index, mask in enumerate(masks, start=1):
            here = mask[place]
            if not here.any():
                continue
            if picture[here].any():
                return np.stack(masks, axis=-1).astype(np.uint8)
            picture[here] = index
    return labels


def _description(
    context: ResultContext, findings: Findings, segment: Segment, number: int, study: str
) -> hd.seg.SegmentDescription:
    tracking_id = tracking_of(findings, segment)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.label[:64],
        segmented_property_category=coded(segment.category),
        segmented_property_type=coded(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm_identification(context.manifest),
        tracking_id=tracking_id,
        tracking_uid=tracking_uid(study, context.manifest.name, tracking_id),
        anatomic_regions=[coded(segment.site)] if segment.site else None,
        display_color=hd.color.CIELabColor.from_string(_COLOURS[(number - 1) % len(_COLOURS)]),
    )


def tracking_of(findings: Findings, segment: Segment) -> str:
    """Tracking ID of a segment: that of the first finding it shows, else its own label."""
    shown = (finding.tracking_id for finding in findings.findings if finding.segment == segment.label)
    return next(shown, segment.label)


def _content_label(name: str) -> str:
    """A CS of at most 16 characters."""
    return "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name.upper())[:16]
