"""Section 6.4 of the checklist: secondary captures and rejection notes."""

from __future__ import annotations

from collections.abc import Iterator

from caregrid.results._subject import KO, SC, Check, Subject, code, listed, named
from caregrid.results.dicom_kos import REASONS


def check_capture(subject: Subject) -> Iterator[str]:
    """Burned-in text is declared; where it came from is said (6.4)."""
    if subject.sop_class != SC:
        return
    dataset = subject.dataset
    if dataset.get("BurnedInAnnotation") != "YES":
        yield "BurnedInAnnotation is not YES"
    for keyword in ("ConversionType", "DerivationDescription", "SourceImageSequence"):
        if not dataset.get(keyword):
            yield f"{keyword} is missing"
    if "not for primary diagnosis" not in str(dataset.get("ImageComments", "")):
        yield "ImageComments does not say that the picture is not for primary diagnosis"
    size = int(dataset.get("Rows", 0)) * int(dataset.get("Columns", 0)) * int(dataset.get("SamplesPerPixel", 0))
    if len(dataset.get("PixelData") or b"") != size + size % 2:
        yield "PixelData does not have the length the picture needs"


def check_rejection(subject: Subject) -> Iterator[str]:
    """The title is a rejection note and the evidence is exactly what is rejected (6.4)."""
    if subject.sop_class != KO:
        return
    value, scheme = code(subject.dataset, "ConceptNameCodeSequence")
    if value not in REASONS or scheme != "DCM":
        yield "the title is not a rejection note"
    if not named(subject.dataset) or named(subject.dataset) != listed(subject.dataset):
        yield "the evidence is not exactly what is rejected"


CHECKS: tuple[tuple[str, str, Check], ...] = (("A", "6.4", check_capture), ("A", "6.4", check_rejection))
