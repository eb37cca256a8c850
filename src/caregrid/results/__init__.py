"""Slot: one file per result format or destination. A format writes; a destination sends; neither decides."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache

from highdicom import _standard_utils
from pydicom.dataset import Dataset

from caregrid.domain.findings import Findings
from caregrid.results import dicom_sc, dicom_seg, dicom_sr
from caregrid.results._apart import Apart
from caregrid.results._common import Predecessor, ResultContext, Reviewer, Sent, make_uid, read_header, tracking_uid
from caregrid.results._validation import Validation, validate
from caregrid.results.dicom_seg import unwritable

__all__ = [
    "Apart",
    "Predecessor",
    "ResultContext",
    "Reviewer",
    "Sent",
    "Validation",
    "each_result",
    "make_uid",
    "read_header",
    "tracking_uid",
    "unwritable",
    "validate",
    "warm_up",
    "write_results",
]


def warm_up() -> None:
    """Load the tables the writers need (about half a second), so that the first result does not wait for it.

    highdicom looks through its tables again for every slice of a source, a millisecond each time, and always for the same
    few answers: from here on they are remembered. And what is loaded by now stays: the garbage collector need not look through
    it again and again while a result of ten thousand small data sets is made.
    """
    if not hasattr(_standard_utils.is_attribute_in_iod, "remembers"):
        _standard_utils.is_attribute_in_iod = _remembering(_standard_utils.is_attribute_in_iod)
    _standard_utils.is_attribute_in_iod("ContentDate", "1.2.840.10008.5.1.4.1.1.66.4")
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


def _remembering(ask: Callable[..., bool]) -> Callable[..., bool]:
    remembered = lru_cache(4096)(lambda attribute, sop_class, path: ask(attribute, sop_class, list(path) or None))

    def asked(attribute: str, sop_class_uid: str, exclude_path_elements: Sequence[str] | None = None) -> bool:
        return remembered(attribute, str(sop_class_uid), tuple(exclude_path_elements or ()))

    asked.remembers = remembered  # type: ignore[attr-defined]
    return asked


def write_results(
    context: ResultContext, findings: Findings, formats: Collection[str], segmentations: Sequence[Dataset] = ()
) -> list[tuple[str, Dataset]]:
    """Every object of the formats asked for, as (format, data set): SEG first, so that the SR can reference its segments.

    segmentations: SEG objects already written, for an SR that is written later (verified by a clinician) without new ones.
    Raises KeyError for a format the slot does not have, ResultInvalid when the findings do not fit their source.
    """
    return list(each_result(context, findings, formats, segmentations))


def each_result(
    context: ResultContext, findings: Findings, formats: Collection[str], segmentations: Sequence[Dataset] = ()
) -> Iterator[tuple[str, Dataset]]:
    """As ``write_results``, one by one as they are ready: an object can be stored and checked while the next is made."""
    unknown = set(formats) - {dicom_seg.FORMAT, dicom_sr.FORMAT, dicom_sc.FORMAT}
    if unknown:
        raise KeyError(f"there is no result format {', '.join(sorted(unknown))}")
    written = dicom_seg.write(context, findings) if dicom_seg.FORMAT in formats else []
    yield from ((dicom_seg.FORMAT, dataset) for dataset in written)
    if dicom_sr.FORMAT in formats:
        yield from ((dicom_sr.FORMAT, dataset) for dataset in dicom_sr.write(context, findings, written or segmentations))
    if dicom_sc.FORMAT in formats:
        yield from ((dicom_sc.FORMAT, dataset) for dataset in dicom_sc.write(context, findings))
