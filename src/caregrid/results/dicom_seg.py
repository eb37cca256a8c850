"""DICOM Segmentation (PS3.3 A.51), BINARY: the masks of the findings on the geometry of their source series."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from caregrid.domain.findings import Findings, Segment
from caregrid.errors import ResultInvalid
from caregrid.results._common import ResultContext, algorithm_identification, coded, finish, series_arguments, tracking_uid

FORMAT = "dicom_seg"

#: sRGB colours of the segments in turn; viewers take them as a recommendation.
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#fabebe", "#008080")


def write(context: ResultContext, findings: Findings) -> list[Dataset]:
    """One SEG per source series that has a mask with a voxel set; an empty list when there is none.

    Raises ResultInvalid when a mask does not have the shape of its source.
    """
    series = dict.fromkeys(segment.source_series for segment in findings.segments if segment.mask.any())
    made = []
    for number, uid in enumerate(series, start=1):
        segments = [segment for segment in findings.segments if segment.source_series == uid and segment.mask.any()]
        made.append(_segmentation(context, findings, segments, uid, number))
    return made


def _segmentation(context: ResultContext, findings: Findings, segments: list[Segment], series: str, number: int) -> Dataset:
    sources = source_order([header for header in context.used(findings) if header.SeriesInstanceUID == series])
    _check_shape(sources, segments, series)
    study = str(context.identity.StudyInstanceUID)
    dataset = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=_pixels(segments),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(context, findings, segment, index, study) for index, segment in enumerate(segments, start=1)
        ],
        content_label=_content_label(context.manifest.name),
        content_description=context.manifest.title[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        **series_arguments(context, FORMAT, number, series),
    )
    return finish(dataset, context)


def source_order(headers: Sequence[Dataset]) -> list[Dataset]:
    """Source instances in the order of a mask's first axis: along the slice normal, or as given when none lies in the patient."""
    if len(headers) < 2 or any("ImagePositionPatient" not in header for header in headers):
        return list(headers)
    row, column = np.split(np.asarray(headers[0].ImageOrientationPatient, float), 2)
    normal = np.cross(row, column)
    return sorted(headers, key=lambda header: float(np.dot(normal, np.asarray(header.ImagePositionPatient, float))))


def _check_shape(sources: list[Dataset], segments: list[Segment], series: str) -> None:
    if not sources:
        raise ResultInvalid(kind=FORMAT, reason=f"no instance of series {series} was read, yet a segment lies on it")
    frames = sum(int(header.get("NumberOfFrames", 1) or 1) for header in sources)
    wanted = (frames, int(sources[0].Rows), int(sources[0].Columns))
    for segment in segments:
        shape = segment.mask.shape if segment.mask.ndim == 3 else (1, *segment.mask.shape)
        if shape != wanted:
            raise ResultInvalid(kind=FORMAT, reason=f"segment {segment.label} has shape {shape}, its source {wanted}")


def _pixels(segments: list[Segment]) -> NDArray[np.uint8]:
    """A label map (frames, rows, columns) when no segments overlap, else (frames, rows, columns, segments)."""
    masks = [np.ascontiguousarray(segment.mask if segment.mask.ndim == 3 else segment.mask[np.newaxis]) for segment in segments]
    labels = masks[0].astype(np.uint8)
    for index, mask in enumerate(masks[1:], start=2):
        if index > 255 or np.logical_and(labels, mask).any():
            return np.stack(masks, axis=-1).astype(np.uint8)
        labels += np.multiply(mask, index, dtype=np.uint8)
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
