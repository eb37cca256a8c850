"""DICOM attributes as conditions name them: found in a header, decoded to a type, and how much of a value may be told.

A name is a keyword (``SliceThickness``), a tag (``(0018,0050)``), a private tag (``(0029,1010)`` or
``(0029,xx10,SIEMENS CSA HEADER)``), or a path through sequences joined by dots.
"""

from __future__ import annotations

import difflib
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any

from pydicom import Dataset
from pydicom.datadict import DicomDictionary, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.errors import BytesLengthException
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.valuerep import DA, DT, TM

from caregrid.errors import ConditionError

#: What a value of a kind is decoded to: number → float, age → float (years), date/time/datetime → the same, text → str.
_KIND_BY_VR = {
    **dict.fromkeys(("DS", "IS", "FL", "FD", "SS", "US", "SL", "UL", "SV", "UV", "US or SS"), "number"),
    **dict.fromkeys(("CS", "LO", "SH", "ST", "LT", "UT", "UC", "UI", "UR", "AE", "PN"), "text"),
    "AS": "age",
    "DA": "date",
    "TM": "time",
    "DT": "datetime",
}

#: Query attributes (PS3.4 C.3.4) that no object carries; counted over what was received.
COUNTED = {
    "ModalitiesInStudy": "study",
    "NumberOfStudyRelatedSeries": "study",
    "NumberOfStudyRelatedInstances": "study",
    "NumberOfSeriesRelatedInstances": "series",
}

#: Technical texts whose value may be told; numbers outside the patient module may be told too. Everything else is never shown.
_OPEN_TEXTS = frozenset(
    (
        *(
            "Modality",
            "ModalitiesInStudy",
            "BodyPartExamined",
            "Laterality",
            "ImageLaterality",
            "ViewPosition",
            "PatientPosition",
        ),
        *("ImageType", "PhotometricInterpretation", "ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType"),
        *("ConversionType", "PresentationIntentType", "Manufacturer", "ConvolutionKernel", "FilterType", "SOPClassUID"),
        *("LossyImageCompression", "BurnedInAnnotation", "VolumetricProperties", "AcquisitionType", "TransferSyntaxUID"),
    )
)
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_.+ -]{0,64}\Z")
_CLOSED_WORDS = re.compile(
    r"Patient|Accession|Birth|Address|Telephone|Insurance|Admission|Visit|Physician|Person|Operator|Comment|Death|Ethnic"
    r"|Occupation|Religious|Allerg|Alert|Medical|Pregnan|Smoking|(?:ID|Identifier|UID)$"
)

_CLOSED_VRS = ("PN", "LT", "UT", "ST", "AS")

_TAG = re.compile(r"\(([0-9A-Fa-f]{4}),\s*([0-9A-Fa-f]{4})\)\Z")
_BLOCK_TAG = re.compile(r"\(([0-9A-Fa-f]{4}),\s*[xX]{2}([0-9A-Fa-f]{2}),([^)]{1,64})\)\Z")
_KEYWORDS: tuple[str, ...] = tuple(row[4] for row in DicomDictionary.values() if row[4])
_AGE = re.compile(r"(\d{1,3})([DWMY])\Z")
_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0}

#: What pydicom and the decoders below raise on bytes that do not fit their VR. (OSError and EOFError: pydicom reads the bytes of
#: a broken sequence as a file in memory; the data set itself was read before. RecursionError: sequences nested without end.)
_UNDECODABLE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError, struct.error),
    *(BytesLengthException, OSError, EOFError, RecursionError),
)
_ITEMS_LOOKED_AT = 10_000
_TEXT_LOOKED_AT = 1024


@dataclass(frozen=True)
class Step:
    """One tag of a path. With a creator, element is the offset in the block that the private creator holds."""

    group: int
    element: int
    creator: str = ""

    def found_in(self, header: Dataset) -> int | None:
        """The full tag in this header, or None when absent."""
        if not self.creator:
            tag = self.group << 16 | self.element
            return tag if tag in header else None
        try:
            tag = header.private_block(self.group, self.creator).get_tag(self.element)
        except (KeyError, ValueError):
            return None
        return int(tag) if tag in header else None


@dataclass(frozen=True)
class Attribute:
    """A parsed name. kind: number, age, date, time, datetime, text, unknown (private), opaque (only present or absent).

    vr: "" when not known. disclosure: open (value and wanted value may be told), constant (only the wanted), closed (neither).
    """

    name: str
    steps: tuple[Step, ...]
    kind: str
    disclosure: str
    vr: str = ""


@dataclass(frozen=True)
class Reading:
    """Decoded values in order; without any, ``problem`` says why: absent, empty, or not readable as its type."""

    values: tuple[Any, ...] = ()
    problem: str = ""
    there: bool = False


@lru_cache(maxsize=4096)
def attribute(name: str) -> Attribute:
    """Parse a name. Raises ConditionError for an unknown keyword (with a suggestion) or a malformed tag or path."""
    parts = _split(name)
    steps, vrs, kept = [], [], []
    for part in parts:
        step, vr, word = _step(name, part)
        steps.append(step)
        vrs.append(vr)
        kept.append(word)
    if any(vr not in ("SQ", "") for vr in vrs[:-1]):
        inside = next(word for word, vr in zip(kept, vrs, strict=True) if vr != "SQ")
        raise ConditionError(condition=name, reason=f"{inside} is not a sequence, so nothing lies inside it")
    kind = "unknown" if vrs[-1] == "" else _KIND_BY_VR.get(vrs[-1], "opaque")
    return Attribute(".".join(kept), tuple(steps), kind, _disclosure(kept, vrs, steps, kind), vrs[-1])


def _split(name: str) -> list[str]:
    parts = re.findall(r"\([^)]*\)|[^.()]+", name)
    if not parts or ".".join(parts) != name or len(parts) > 8:
        raise ConditionError(condition=name, reason=f"{name!r} is not a DICOM keyword, a tag like (0018,0050), or a path of them")
    return parts


def _step(name: str, part: str) -> tuple[Step, str, str]:
    """The step, its VR ("" when not known) and the word it is shown as."""
    if found := _BLOCK_TAG.match(part):
        group = int(found[1], 16)
        if group % 2 == 0:
            raise ConditionError(condition=name, reason=f"{part}: only private (odd) groups have a creator")
        return Step(group, int(found[2], 16), found[3].strip()), "", part
    if found := _TAG.match(part):
        group, element = int(found[1], 16), int(found[2], 16)
        tag = group << 16 | element
        word = keyword_for_tag(tag)
        return Step(group, element), dictionary_VR(tag) if word else "", word or part
    tag_of = tag_for_keyword(part) if part else None
    if tag_of is not None:
        return Step(tag_of >> 16, tag_of & 0xFFFF), dictionary_VR(tag_of), part
    if part in COUNTED:
        return Step(0, 0), "CS" if part == "ModalitiesInStudy" else "IS", part
    what = "a tag like (0018,0050)" if part.startswith("(") else "a DICOM keyword"
    raise ConditionError(condition=name, reason=f"{part} is not {what}{did_you_mean(part, _KEYWORDS)}")


def did_you_mean(word: str, known: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    """A hint for a mistyped word: ``; did you mean X?``, or nothing when nothing is close."""
    choices = list(known)
    lowered = {each.lower(): each for each in choices}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6 if len(choices) < 100 else 0.7)
    return f"; did you mean {lowered[close[0]]}?" if close else ""


def _disclosure(words: list[str], vrs: list[str], steps: list[Step], kind: str) -> str:
    if words[-1] in _OPEN_TEXTS and not any(_CLOSED_WORDS.search(word) for word in words[:-1]):
        return "open"
    in_patient_group = any(step.group == 0x0010 for step in steps)
    if in_patient_group or vrs[-1] in _CLOSED_VRS or any(_CLOSED_WORDS.search(word) for word in words):
        return "closed"
    return "open" if kind == "number" else "constant"


def shown(attr: Attribute, values: tuple[Any, ...]) -> str:
    """The values as a reason may print them, or "" when they must not be told."""
    if attr.disclosure != "open" or not values:
        return ""
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values[:6]]
    if not all(_PLAIN_TEXT.match(text) for text in texts):
        return ""
    return "\\".join(texts) + ("\\…" if len(values) > 6 else "")


def read(header: Dataset, attr: Attribute, counted: Mapping[str, tuple[Any, ...]] | None = None) -> Reading:
    """The attribute's decoded values in ``header``; never raises on what a data set may hold."""
    if attr.name in COUNTED:
        values = (counted or {}).get(attr.name, ())
        return Reading(values, "" if values else "absent", bool(values))
    levels: list[Dataset] = [header]
    try:
        for step in attr.steps[:-1]:
            levels = list(_items(levels, step))
    except _UNDECODABLE:
        return Reading(problem="its sequence is not readable")
    readings = [_read_one(level, attr) for level in levels]
    there = any(each.there for each in readings)
    values = tuple(value for each in readings for value in each.values)
    if values:
        return Reading(values, "", True)
    problems = [each.problem for each in readings if each.problem != "absent"]
    return Reading((), problems[0] if problems else "absent", there)


def _items(levels: list[Dataset], step: Step) -> Iterator[Dataset]:
    count = 0
    for level in levels:
        tag = step.found_in(level)
        value = level[tag].value if tag is not None else None
        for item in value if isinstance(value, Sequence) else ():
            count += 1
            if count > _ITEMS_LOOKED_AT:
                return
            yield item


def _read_one(header: Dataset, attr: Attribute) -> Reading:
    try:
        tag = attr.steps[-1].found_in(header)
        if tag is None:
            return Reading(problem="absent")
        value = header[tag].value
        if isinstance(value, Sequence):
            return Reading(problem="a sequence" if len(value) else "empty", there=len(value) > 0)
        parts = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
        parts = [part for part in parts if part is not None and part not in ("", b"")]
        if not parts:
            return Reading(problem="empty")
        if attr.kind == "opaque":
            return Reading(problem="binary", there=True)
        return Reading(tuple(_decoded(attr.kind, part) for part in parts), "", True)
    except _UNDECODABLE:
        return Reading(problem=f"not readable as a {attr.kind}" if attr.kind != "unknown" else "not readable", there=True)


def _decoded(kind: str, part: Any) -> Any:
    if kind == "text":
        return _text(part)
    if kind == "unknown":
        return _number(part) if isinstance(part, (int, float)) else _text(part)
    return _DECODERS[kind](part)


def _text(part: Any) -> str:
    if isinstance(part, Dataset):
        raise ValueError("a data set is not text")
    # A private attribute sent as UN carries bytes; plain ASCII is what the great majority of scanners put there.
    text = part.decode("ascii") if isinstance(part, bytes) else str(part)
    return text.strip(" \0")[:_TEXT_LOOKED_AT]


def _number(part: Any) -> float:
    number = float(part)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def age_in_years(part: Any) -> float:
    """An age string (PS3.5 6.2 AS, ``045Y``) in years."""
    found = _AGE.match(str(part).strip(" \0").upper())
    if not found:
        raise ValueError("not an age")
    return int(found[1]) / _PER_YEAR[found[2]]


def _date(part: Any) -> date:
    value = part if isinstance(part, date) else DA(str(part).strip(" \0"))
    if value is None:
        raise ValueError("empty")
    return date(value.year, value.month, value.day)


def _time(part: Any) -> time:
    value = part if isinstance(part, time) else TM(str(part).strip(" \0"))
    if value is None:
        raise ValueError("empty")
    return time(value.hour, value.minute, value.second, value.microsecond)


def _datetime(part: Any) -> datetime:
    value = part if isinstance(part, datetime) else DT(str(part).strip(" \0"))
    if value is None:
        raise ValueError("empty")
    # Conditions compare the clock on the wall where the image was made, so an offset is left out.
    return datetime(value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond)


_DECODERS = {"number": _number, "age": age_in_years, "date": _date, "time": _time, "datetime": _datetime}
