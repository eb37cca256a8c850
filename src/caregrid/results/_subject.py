"""What a check is handed, and how to walk references and content trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydicom.dataset import Dataset

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
SR = "1.2.840.10008.5.1.4.1.1.88.34"
SC = "1.2.840.10008.5.1.4.1.1.7"
KO = "1.2.840.10008.5.1.4.1.1.88.59"

#: SOP Class of every result caregrid writes → its Modality.
MODALITIES = {SEG: "SEG", SR: "SR", SC: "OT", KO: "KO"}

_EVIDENCE = (
    "ReferencedSeriesSequence",
    "StudiesContainingOtherReferencedInstancesSequence",
    "CurrentRequestedProcedureEvidenceSequence",
    "PertinentOtherEvidenceSequence",
    "SourceImageSequence",
)
#: Not references to what the result is about.
_ELSEWHERE = (*_EVIDENCE, "PredecessorDocumentsSequence", "ReferencedStudySequence", "ContributingEquipmentSequence")


@dataclass(frozen=True)
class Subject:
    """A result being checked. raw: its bytes; sources: headers of what was read; companions: results of the same run."""

    dataset: Dataset
    raw: bytes
    sources: tuple[Dataset, ...] = ()
    companions: tuple[Dataset, ...] = ()

    @property
    def sop_class(self) -> str:
        """SOP Class UID as text, empty when missing."""
        return str(self.dataset.get("SOPClassUID", ""))


#: A check yields one sentence per fault.
Check = Callable[[Subject], Iterator[str]]


def listed(dataset: Dataset, but: str = "") -> set[str]:
    """SOP Instance UIDs the object lists as evidence or source, leaving out those of the SOP Class ``but``."""
    found: set[str] = set()
    for keyword in _EVIDENCE:
        for item in dataset.get(keyword) or []:
            found.update(_instances(item, but))
    return found


def named(dataset: Dataset, but: str = "") -> set[str]:
    """SOP Instance UIDs the body of the object refers to, its content tree or its functional groups, without class ``but``."""
    found: set[str] = set()
    for element in dataset:
        if element.VR == "SQ" and element.keyword not in _ELSEWHERE:
            for item in element.value:
                found.update(_instances(item, but))
    return found


def _instances(dataset: Dataset, but: str) -> Iterator[str]:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _instances(item, but)
        elif element.keyword == "ReferencedSOPInstanceUID" and dataset.get("ReferencedSOPClassUID") != (but or None):
            yield str(element.value)


def code(dataset: Dataset, keyword: str) -> tuple[str, str]:
    """(value, scheme) of the first item of a code sequence; empty texts when there is none."""
    items = dataset.get(keyword) or []
    if not items:
        return ("", "")
    return (str(items[0].get("CodeValue", "")), str(items[0].get("CodingSchemeDesignator", "")))


def name(item: Dataset) -> str:
    """Code value of a content item's concept name."""
    return code(item, "ConceptNameCodeSequence")[0]


def children(item: Dataset, concept: str = "") -> list[Dataset]:
    """Content items below ``item``, all or those called ``concept``."""
    items = item.get("ContentSequence") or []
    return [child for child in items if not concept or name(child) == concept]


def first(item: Dataset, concept: str) -> Dataset | None:
    """The first content item below ``item`` that is called ``concept``."""
    return next(iter(children(item, concept)), None)
