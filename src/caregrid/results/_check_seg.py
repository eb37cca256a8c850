"""Section 6.2 of the checklist: segmentations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydicom.dataset import Dataset

from caregrid.results._subject import SEG, Check, Subject, code

_SEGMENTATION = ("113076", "DCM")
_SOURCE_IMAGE = ("121322", "DCM")
_TOLERANCE_MM = 0.01
_TOLERANCE_COSINE = 1e-4
_TOLERANCE_SPACING = 1e-4


def check_segments(subject: Subject) -> Iterator[str]:
    """Number, label, codes, algorithm of each segment (6.2.1)."""
    segments = subject.dataset.get("SegmentSequence") or []
    if not segments:
        yield "there is no segment"
    if [int(item.get("SegmentNumber", 0)) for item in segments] != list(range(1, len(segments) + 1)):
        yield "segments are not numbered from 1"
    for number, item in enumerate(segments, start=1):
        yield from (f"segment {number}: {fault}" for fault in _segment_faults(item))


def _segment_faults(item: Dataset) -> Iterator[str]:
    if not item.get("SegmentLabel"):
        yield "SegmentLabel is missing"
    for keyword in ("SegmentedPropertyCategoryCodeSequence", "SegmentedPropertyTypeCodeSequence"):
        if not all(code(item, keyword)):
            yield f"{keyword} has no code"
    if item.get("SegmentAlgorithmType") != "AUTOMATIC":
        yield "SegmentAlgorithmType is not AUTOMATIC"
    if not item.get("SegmentAlgorithmName"):
        yield "SegmentAlgorithmName is missing"
    algorithms = item.get("SegmentationAlgorithmIdentificationSequence") or []
    if not algorithms:
        yield "SegmentationAlgorithmIdentificationSequence is missing"
    for algorithm in algorithms:
        if not all(code(algorithm, "AlgorithmFamilyCodeSequence")):
            yield "AlgorithmFamilyCodeSequence has no code"
        if not algorithm.get("AlgorithmName") or not algorithm.get("AlgorithmVersion"):
            yield "the algorithm has no name or no version"


def check_tracking(subject: Subject) -> Iterator[str]:
    """Tracking ID and UID of each segment (6.2.6)."""
    for item in subject.dataset.get("SegmentSequence") or []:
        if not item.get("TrackingID") or not item.get("TrackingUID"):
            yield f"segment {item.get('SegmentNumber', '?')} has no Tracking ID and UID"


def check_frames(subject: Subject) -> Iterator[str]:
    """Every frame says what it was derived from (6.2.2)."""
    dataset = subject.dataset
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != int(dataset.get("NumberOfFrames", 0) or 0):
        yield "NumberOfFrames is not the number of functional groups"
    for number, group in enumerate(groups, start=1):
        derivations = group.get("DerivationImageSequence") or _shared(dataset).get("DerivationImageSequence") or []
        if not derivations or code(derivations[0], "DerivationCodeSequence") != _SEGMENTATION:
            yield f"frame {number} is not said to be derived by segmentation (113076)"
            return
        sources = derivations[0].get("SourceImageSequence") or []
        if not sources or code(sources[0], "PurposeOfReferenceCodeSequence") != _SOURCE_IMAGE:
            yield f"frame {number} has no source image (121322)"
            return


def check_geometry(subject: Subject) -> Iterator[str]:
    """Frame of reference, place and orientation of every frame are those of its source instance (6.2.2)."""
    dataset = subject.dataset
    by_uid = {str(header.SOPInstanceUID): header for header in subject.sources}
    shared = _shared(dataset)
    numbers, mine, theirs = [], [], []
    for number, group in enumerate(dataset.get("PerFrameFunctionalGroupsSequence") or [], start=1):
        source = by_uid.get(_source_uid(dataset, group))
        if source is None or "ImagePositionPatient" not in source:
            continue
        if dataset.get("FrameOfReferenceUID") != source.get("FrameOfReferenceUID"):
            yield "FrameOfReferenceUID is not the source's"
            return
        numbers.append(number)
        mine.append(_plane(shared, group))
        theirs.append([*source.ImagePositionPatient, *source.ImageOrientationPatient, *source.PixelSpacing])
    if not numbers:
        return
    # All frames in one comparison: a thousand small ones take longer than all other checks together.
    off = np.abs(np.array(mine, float) - np.array(theirs, float))
    limits = np.array([_TOLERANCE_MM] * 3 + [_TOLERANCE_COSINE] * 6 + [np.inf] * 2)
    spacing = off[:, 9:] > _TOLERANCE_SPACING * np.array(theirs, float)[:, 9:]
    wrong = ~(off <= limits).all(axis=1) | spacing.any(axis=1)
    if wrong.any():
        yield f"frame {numbers[int(np.argmax(wrong))]} does not lie where its source lies"


def _plane(shared: Dataset, group: Dataset) -> list[float]:
    """Position, orientation and spacing of a frame, eleven numbers; not a number where one is missing."""
    wanted = (
        ("PlanePositionSequence", "ImagePositionPatient", 3),
        ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        ("PixelMeasuresSequence", "PixelSpacing", 2),
    )
    found: list[float] = []
    for sequence, keyword, count in wanted:
        values = _attribute(shared, group, sequence, keyword)
        found += values if len(values) == count else [float("nan")] * count
    return found


def _source_uid(dataset: Dataset, group: Dataset) -> str:
    for derivation in group.get("DerivationImageSequence") or _shared(dataset).get("DerivationImageSequence") or []:
        for item in derivation.get("SourceImageSequence") or []:
            return str(item.get("ReferencedSOPInstanceUID", ""))
    return ""


def _attribute(shared: Dataset, group: Dataset, sequence: str, keyword: str) -> list[float]:
    items = group.get(sequence) or shared.get(sequence) or []
    return [float(value) for value in (items[0].get(keyword) or [])] if items else []


def _shared(dataset: Dataset) -> Dataset:
    groups = dataset.get("SharedFunctionalGroupsSequence") or []
    return groups[0] if groups else Dataset()


def check_series_reference(subject: Subject) -> Iterator[str]:
    """ReferencedSeriesSequence is there: viewers find the images by it (6.2.3)."""
    if not subject.dataset.get("ReferencedSeriesSequence"):
        yield "ReferencedSeriesSequence is missing"


def check_pixels(subject: Subject) -> Iterator[str]:
    """Binary as declared, all of it there, and not empty (6.2.5)."""
    dataset = subject.dataset
    if dataset.get("SegmentationType") != "BINARY" or dataset.get("BitsAllocated") != 1:
        yield "the pixels are not BINARY of one bit"
        return
    bits = int(dataset.get("NumberOfFrames", 0) or 0) * int(dataset.get("Rows", 0)) * int(dataset.get("Columns", 0))
    pixels = dataset.get("PixelData") or b""
    if len(pixels) != (bits + 7) // 8 + ((bits + 7) // 8) % 2:
        yield "PixelData does not have the length its frames need"
    elif not any(pixels):
        yield "no voxel is set"


def _only_seg(check: Check) -> Check:
    def checked(subject: Subject) -> Iterator[str]:
        if subject.sop_class == SEG:
            yield from check(subject)

    return checked


geometry, pixels = _only_seg(check_geometry), _only_seg(check_pixels)

CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("A", "6.2.1", _only_seg(check_segments)),
    ("A", "6.2.2", _only_seg(check_frames)),
    ("A", "6.2.2", geometry),
    ("A", "6.2.3", _only_seg(check_series_reference)),
    ("A", "6.2.5", pixels),
    ("A", "6.2.6", _only_seg(check_tracking)),
)
