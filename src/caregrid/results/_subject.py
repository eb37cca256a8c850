"""What a check is handed, and how to walk references and content trees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from pydicom.dataelem import DataElement, RawDataElement
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
_REFERENCED_INSTANCE = 0x00081155
#: Unknown or not stated (implicit VR): only the dictionary says what it is.
_MAY_BE_SEQUENCE = frozenset({"SQ", "UN", None})

#: Not references to what the result is about.
_ELSEWHERE = (*_EVIDENCE, "PredecessorDocumentsSequence", "ReferencedStudySequence", "ContributingEquipmentSequence")


#: An element whose value nobody has asked for yet is raw.
Element = DataElement | RawDataElement


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

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """Every element of the object that is not a sequence, in items too, as it stands in the file."""
        return tuple(element for _, element in elements(self.dataset))


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
    for owner, element in elements(dataset):
        if element.tag == _REFERENCED_INSTANCE and owner.get("ReferencedSOPClassUID") != (but or None):
            yield from uids(element)


def elements(dataset: Dataset) -> Iterator[tuple[Dataset, Element]]:
    """Every element that is not a sequence, in items too, with the item it stands in.

    Values are not turned into Python objects: in a long study that takes longer than all checks together.
    """
    waiting = [dataset]
    while waiting:
        owner = waiting.pop()
        for tag in owner.keys():  # noqa: SIM118 - iterating the data set itself would convert every value
            element = owner.get_item(tag)
            if element.VR in _MAY_BE_SEQUENCE:
                element = owner[tag]
            if element.VR == "SQ":
                waiting.extend(element.value)
            else:
                yield owner, element


def uids(element: Element) -> list[str]:
    """The values of a UI element, raw or not, without their padding (PS3.5 6.2)."""
    value = element.value
    if isinstance(value, bytes):
        return [part.rstrip("\0 ") for part in value.decode("iso8859").split("\\")] if value else []
    if not value:
        return []
    return [value] if isinstance(value, str) else [str(part) for part in value]


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
