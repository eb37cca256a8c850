"""Section 6.1 of the checklist: what every result must satisfy. Each check yields one sentence per fault, without values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO

from pydicom import config, dcmread
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.valuerep import PersonName

from caregrid.results._common import IDENTITY_TYPE_2, TEXT_VRS, copy_identity, texts
from caregrid.results._subject import (
    KO,
    MODALITIES,
    SC,
    SEG,
    SR,
    Check,
    Element,
    Subject,
    elements,
    listed,
    named,
    uids,
)

_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+")
_FLATTENED = frozenset({"SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ContentSequence"})
_IDENTITY = ("StudyInstanceUID", *IDENTITY_TYPE_2, "IssuerOfPatientID")


def check_identity(subject: Subject) -> Iterator[str]:
    """Patient and study are the source's (6.1.1)."""
    if not subject.dataset.get("StudyInstanceUID"):
        yield "StudyInstanceUID is missing"
    if not subject.sources:
        return
    mine, theirs = copy_identity(subject.dataset), copy_identity(subject.sources[0])
    for keyword in _IDENTITY:
        if str(mine.get(keyword, "") or "") != str(theirs.get(keyword, "") or ""):
            yield f"{keyword} is not the source's"


def check_uids(subject: Subject) -> Iterator[str]:
    """Every UID is well formed; series and instance are new (6.1.2)."""
    for element in subject.elements:
        if element.VR == "UI":
            yield from (
                f"{keyword_for_tag(element.tag)} is not a UID"
                for value in uids(element)
                if len(value) > 64 or not _UID.fullmatch(value)
            )
    if any(subject.dataset.get("SeriesInstanceUID") == header.SeriesInstanceUID for header in subject.sources):
        yield "SeriesInstanceUID is a source series"
    if any(subject.dataset.get("SOPInstanceUID") == header.SOPInstanceUID for header in subject.sources):
        yield "SOPInstanceUID is a source instance"


def check_result_class(subject: Subject) -> Iterator[str]:
    """SOP Class is one we make (6.1.3)."""
    if subject.sop_class not in MODALITIES:
        yield "SOPClassUID is not a result class"


def check_class(subject: Subject) -> Iterator[str]:
    """The file meta says the same as the data set, in an encoding every receiver takes (6.1.3)."""
    dataset = subject.dataset
    if dataset.file_meta.get("MediaStorageSOPClassUID") != dataset.get("SOPClassUID"):
        yield "the file meta names another SOP Class"
    if dataset.file_meta.get("MediaStorageSOPInstanceUID") != dataset.get("SOPInstanceUID"):
        yield "the file meta names another SOP Instance"
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_little_endian or syntax.is_deflated:
        yield "the transfer syntax is not one every receiver takes"


def check_character_set(subject: Subject) -> Iterator[str]:
    """All text decodes with the character set declared (6.1.4)."""
    copy = dcmread(BytesIO(subject.raw), stop_before_pixels=True)
    for tag in list(copy.keys()):
        # ASCII reads the same in every character set, so what holds nothing else need not be decoded.
        if copy.get_item(tag).VR == "SQ" and all(
            _is_ascii(element) for item in subject.dataset[tag].value for _, element in elements(item)
        ):
            del copy[tag]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with config.strict_reading():
                copy.decode()
                text = list(texts(copy))
        except (UnicodeError, LookupError, Warning, ValueError):
            yield "text does not decode with SpecificCharacterSet"
            return
    if "SpecificCharacterSet" not in copy and not all(part.isascii() for part in text):
        yield "text is not ASCII and SpecificCharacterSet is missing"


def _is_ascii(element: Element) -> bool:
    """Whether a text is plain ASCII, without an escape to another character set; true of what is no text."""
    if element.VR not in TEXT_VRS:
        return True
    value = element.value
    if isinstance(value, bytes):
        return value.isascii() and b"\x1b" not in value
    text = str(value) if isinstance(value, str | PersonName) or value is None else "".join(str(part) for part in value)
    return text.isascii() and "\x1b" not in text


def check_series(subject: Subject) -> Iterator[str]:
    """Modality fits the class; numbers are numeric and clash with no source series (6.1.5)."""
    dataset = subject.dataset
    wanted = MODALITIES.get(subject.sop_class)
    if wanted and dataset.get("Modality") != wanted:
        yield f"Modality is not {wanted}"
    for keyword in ("SeriesNumber", "InstanceNumber"):
        if not str(dataset.get(keyword, "")).isdigit():
            yield f"{keyword} is not a number"
    if any(str(header.get("SeriesNumber", "")) == str(dataset.get("SeriesNumber")) for header in subject.sources):
        yield "SeriesNumber is a source series's"


def check_equipment(subject: Subject) -> Iterator[str]:
    """The engine, and each algorithm as contributing equipment with its Device UID (6.1.6)."""
    for keyword in ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber"):
        if not subject.dataset.get(keyword):
            yield f"{keyword} is missing"
    needed = (
        "PurposeOfReferenceCodeSequence",
        "Manufacturer",
        "ManufacturerModelName",
        "SoftwareVersions",
        "DeviceUID",
        "ContributionDateTime",
    )
    equipment = subject.dataset.get("ContributingEquipmentSequence", [])
    if not any(all(item.get(keyword) for keyword in needed) for item in equipment):
        yield "ContributingEquipmentSequence has no complete item for the algorithm"


def check_times(subject: Subject) -> Iterator[str]:
    """Start of analysis and creation are there (6.1.7)."""
    for keyword in ("ContentDate", "ContentTime", "InstanceCreationDate", "InstanceCreationTime"):
        if not subject.dataset.get(keyword):
            yield f"{keyword} is missing"


def check_timezone(subject: Subject) -> Iterator[str]:
    """The offset is said (6.1.7)."""
    if not re.fullmatch(r"[+-]\d{4}", str(subject.dataset.get("TimezoneOffsetFromUTC", ""))):
        yield "TimezoneOffsetFromUTC is missing"


def check_references(subject: Subject) -> Iterator[str]:
    """What the body refers to is listed, and only what was used is (6.1.8)."""
    evidence, body = listed(subject.dataset), named(subject.dataset)
    if subject.sop_class != SC and not body <= evidence:
        yield f"{len(body - evidence)} referenced instance(s) are not listed as evidence"
    if not subject.sources or subject.sop_class == KO:
        return
    used = {str(header.SOPInstanceUID) for header in subject.sources}
    own = {str(item.SOPInstanceUID) for item in subject.companions}
    unknown = "" if own else SEG  # without the companions, a report's own SEG cannot be told from another
    foreign = (listed(subject.dataset, but=unknown) | named(subject.dataset, but=unknown)) - used - own
    if foreign:
        yield f"{len(foreign)} referenced instance(s) were not used"
    if subject.sop_class == SR and not used <= evidence:
        yield f"{len(used - evidence)} used instance(s) are not listed"


def check_description(subject: Subject) -> Iterator[str]:
    """Series Description says AI, in at most 64 characters (6.1.10)."""
    text = str(subject.dataset.get("SeriesDescription", ""))
    if "AI" not in text.split() or len(text) > 64:
        yield "SeriesDescription does not say AI in at most 64 characters"


def check_iod(subject: Subject) -> Iterator[str]:
    """Type 1 and 2 attributes of the mandatory modules of the IOD, in items too (6.1.9; tables that come with highdicom).

    Content trees and functional groups are left to 6.2, 6.3 and the tools: the tables flatten alternatives there into one list.
    """
    from highdicom._standard_utils import get_iod_module_map, get_module_attribute_map, get_sop_class_iod_map

    iod = get_sop_class_iod_map().get(subject.sop_class)
    if iod is None:
        return
    for module in get_iod_module_map()[iod]:
        if module["usage"] != "M" or module["key"] == "sr-document-content":
            continue
        for attribute in get_module_attribute_map()[module["key"]]:
            if attribute["type"] in ("1", "2") and not _FLATTENED.intersection(attribute["path"]):
                yield from _missing(subject.dataset, attribute["path"], attribute["keyword"], attribute["type"])


def _missing(dataset: Dataset, path: Sequence[str], keyword: str, kind: str) -> Iterator[str]:
    if path:
        for item in dataset.get(path[0]) or []:
            yield from _missing(item, path[1:], keyword, kind)
        return
    if keyword not in dataset:
        yield f"{keyword} (type {kind}) is missing"
    elif kind == "1" and dataset[keyword].is_empty:
        yield f"{keyword} (type 1) is empty"


#: (level, line of the checklist, check). Level A holds the object back, level B is a warning.
CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("A", "6.1.1", check_identity),
    ("A", "6.1.2", check_uids),
    ("A", "6.1.3", check_result_class),
    ("A", "6.1.3", check_class),
    ("A", "6.1.4", check_character_set),
    ("A", "6.1.5", check_series),
    ("A", "6.1.6", check_equipment),
    ("A", "6.1.7", check_times),
    ("B", "6.1.7", check_timezone),
    ("A", "6.1.8", check_references),
    ("A", "6.1.9", check_iod),
    ("B", "6.1.10", check_description),
)
