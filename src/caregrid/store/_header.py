"""A received object's own word about itself: its UIDs and the few attributes the index keeps, read without its pixels.

The walk over the data set only finds where elements begin and end (PS3.5 7.1–7.5, A.4), in about 0.1 ms for a CT slice where
a full reader takes 0.5 ms, and it proves what a reader that skips pixels does not: that the last element is complete.
Text is decoded by pydicom with the object's Specific Character Set.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from mmap import mmap

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import keyword_dict
from pydicom.uid import UID

from caregrid.errors import MalformedObject

Bytes = bytes | bytearray | memoryview | mmap

IMPLICIT_LITTLE = frozenset({"1.2.840.10008.1.2", "1.2.840.113619.5.2"})
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})
#: An object of this size after inflation is refused rather than held in memory.
MAX_INFLATED = 1 << 30

_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_WANTED = (
    *_UIDS, "SpecificCharacterSet", "InstanceNumber", "NumberOfFrames", "Rows", "Columns", "PatientID", "PatientName",
    "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime", "StudyDescription",
    "ReferringPhysicianName", "Modality", "SeriesNumber", "SeriesDescription", "BodyPartExamined", "StationName",
)  # fmt: skip
_KEYWORDS = {keyword_dict[keyword]: keyword for keyword in _WANTED}
_PERSON_NAMES = frozenset({"PatientName", "ReferringPhysicianName"})
_LONG_VRS = frozenset(vr.encode() for vr in ["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"])
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DEEPEST = 100
# Components with leading zeros are wrong (PS3.5 9.1) but come from working scanners, and name files just as safely.
_UID = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)


@dataclass(frozen=True)
class Header:
    """values: keyword → value as encoded. data_offset: where the data set begins in the bytes that were read."""

    values: dict[str, bytes]
    transfer_syntax_uid: str
    data_offset: int = 0
    _uids: dict[str, str] = field(default_factory=dict)

    def uid(self, keyword: str) -> str:
        """A UID without its padding; empty when absent."""
        known = self._uids.get(keyword)
        if known is None:
            known = self.values.get(keyword, b"").rstrip(b"\0 ").decode("ascii", "replace").strip()
            self._uids[keyword] = known
        return known

    def text(self, keyword: str) -> str:
        """A text value decoded with the object's character set; several values stay separated by a backslash."""
        raw = self.values.get(keyword, b"")
        if not raw:
            return ""
        sets = self.values.get("SpecificCharacterSet", b"").decode("ascii", "replace").split("\\")
        encodings = convert_encodings([each.strip(" \0") for each in sets])
        delimiters = {0x0D, 0x0A, 0x09, 0x0C} | ({0x5E, 0x3D} if keyword in _PERSON_NAMES else {0x5C})
        # NUL is padding, and the one character PostgreSQL does not take.
        value = decode_bytes(raw, encodings, delimiters).replace("\0", "").strip()
        return value.rstrip("=") if keyword in _PERSON_NAMES else value

    def number(self, keyword: str) -> int | None:
        """An integer string or unsigned short; None when absent, not a number, or larger than the index holds."""
        raw = self.values.get(keyword, b"")
        if keyword in ("Rows", "Columns"):
            return int.from_bytes(raw, "big" if self.transfer_syntax_uid == BIG_ENDIAN else "little") if len(raw) == 2 else None
        try:
            value = int(float(raw.rstrip(b"\0 ").split(b"\\")[0]))
        except (ValueError, OverflowError):
            return None
        return value if abs(value) < 1 << 31 else None


def read_header(content: Bytes, part10: bool, transfer_syntax_uid: str = "") -> Header:
    """Walk an object's bytes from end to end. Raises MalformedObject where it is cut short, not DICOM, or lacks its UIDs."""
    values: dict[str, bytes] = {}
    start = 0
    try:
        if part10:
            start, transfer_syntax_uid = _read_meta(content)
        _walk_data_set(content, start, transfer_syntax_uid, values)
    except (struct.error, IndexError) as error:
        raise MalformedObject(reason="it ends in the middle of an element") from error
    header = Header(values, transfer_syntax_uid, start)
    _check_uids(header)
    return header


def _check_uids(header: Header) -> None:
    for keyword in _UIDS:
        value = header.uid(keyword)
        if not value:
            kind = UID(header.uid("SOPClassUID")).name if keyword != "SOPClassUID" else ""
            raise MalformedObject(reason=f"{keyword} is missing" + (f" ({kind})" if kind else ""))
        if len(value) > 64 or not _UID.fullmatch(value):
            raise MalformedObject(reason=f"{keyword} is not a UID")


def _read_meta(content: Bytes) -> tuple[int, str]:
    """Where the data set begins and its transfer syntax, from the file meta information (PS3.10 7.1)."""
    if bytes(content[128:132]) != b"DICM":
        raise MalformedObject(reason="it is not a DICOM file: there is no DICM after the preamble")
    place, end, syntax = 132, len(content), ""
    while place + 8 <= end and content[place] == 2 and content[place + 1] == 0:
        tag, place, length = _EXPLICIT.element(content, place)
        if length > end - place:
            raise MalformedObject(reason="the file meta information is cut short")
        if tag == 0x00020010:
            syntax = bytes(content[place : place + length]).rstrip(b"\0 ").decode("ascii", "replace")
        place += length
    if not _UID.fullmatch(syntax):
        raise MalformedObject(reason="TransferSyntaxUID is missing from the file meta information")
    return place, syntax


def _walk_data_set(content: Bytes, start: int, syntax: str, values: dict[str, bytes]) -> None:
    if syntax in DEFLATED:
        content, start = _inflate(content, start), 0
    encoding = _IMPLICIT if syntax in IMPLICIT_LITTLE else _BIG if syntax == BIG_ENDIAN else _EXPLICIT
    encoding.walk(content, start, len(content), values)


def _inflate(content: Bytes, start: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(memoryview(content)[start:], MAX_INFLATED)
    except zlib.error as error:
        raise MalformedObject(reason="the deflated data set cannot be inflated") from error
    if not inflater.eof:
        raise MalformedObject(reason="the deflated data set is cut short or inflates to more than 1 GiB")
    return plain


class _Encoding:
    """How elements are laid out: byte order, and whether the VR is written."""

    def __init__(self, order: str, explicit: bool) -> None:
        self.explicit = explicit
        self._implicit = struct.Struct(order + "HHI").unpack_from
        self._explicit = struct.Struct(order + "HH2sH").unpack_from
        self._length = struct.Struct(order + "I").unpack_from

    def element(self, content: Bytes, place: int) -> tuple[int, int, int]:
        """(tag, where the value begins, its length) of the element at ``place``."""
        if self.explicit:
            group, number, vr, length = self._explicit(content, place)
            if vr in _LONG_VRS:
                return group << 16 | number, place + 12, self._length(content, place + 8)[0]
            # Anything but two capitals is no VR: an item's tag, or an element some writer left implicit.
            if 65 <= vr[0] <= 90 and 65 <= vr[1] <= 90:
                return group << 16 | number, place + 8, length
        group, number, length = self._implicit(content, place)
        return group << 16 | number, place + 8, length

    def walk(self, content: Bytes, place: int, end: int, values: dict[str, bytes]) -> None:
        """Go over the top level, keeping the wanted values. Raises MalformedObject at an element that does not fit."""
        element, wanted = self.element, _KEYWORDS
        while place < end:
            if end - place < 8:
                _only_padding(content, place, "it ends in the middle of an element")
                return
            tag, begin, length = element(content, place)
            if length == _UNDEFINED:
                place = self._inner(content, place)._skip_items(content, begin, end, 0)
            elif length > end - begin:
                _only_padding(content, place, f"element ({tag >> 16:04X},{tag & 0xFFFF:04X}) is longer than what was received")
                return
            else:
                if tag in wanted:
                    values.setdefault(wanted[tag], bytes(content[begin : begin + length]))
                elif tag == 0 and length == 0 and _zeros(content, place):
                    return
                place = begin + length

    def _inner(self, content: Bytes, place: int) -> _Encoding:
        """An undefined length UN holds implicit little endian items whatever stands around it (PS3.5 6.2.2)."""
        return _IMPLICIT if self.explicit and bytes(content[place + 4 : place + 6]) == b"UN" else self

    def _skip_items(self, content: Bytes, place: int, end: int, depth: int) -> int:
        """Past a sequence, or encapsulated pixels, of undefined length; returns where the next element begins."""
        if depth > _DEEPEST:
            raise MalformedObject(reason="its sequences are nested too deeply")
        while place + 8 <= end:
            group, number, length = self._implicit(content, place)
            tag, place = group << 16 | number, place + 8
            if tag == _SEQUENCE_END:
                return place
            if tag != _ITEM:
                raise MalformedObject(reason="a sequence of undefined length holds something that is not an item")
            if length == _UNDEFINED:
                place = self._skip_item(content, place, end, depth)
            else:
                place += length
        raise MalformedObject(reason="it ends in the middle of a sequence")

    def _skip_item(self, content: Bytes, place: int, end: int, depth: int) -> int:
        while place + 8 <= end:
            tag, begin, length = self.element(content, place)
            if tag == _ITEM_END:
                return place + 8
            if length == _UNDEFINED:
                place = self._inner(content, place)._skip_items(content, begin, end, depth + 1)
            else:
                place = begin + length
        raise MalformedObject(reason="it ends in the middle of an item")


_EXPLICIT, _IMPLICIT, _BIG = _Encoding("<", True), _Encoding("<", False), _Encoding(">", True)


def _zeros(content: Bytes, place: int) -> bool:
    return not any(bytes(content[place : place + 65536])) and (len(content) - place <= 65536 or not any(bytes(content[place:])))


def _only_padding(content: Bytes, place: int, reason: str) -> None:
    """Zeros after the last element are left alone: some archives pad files to whole blocks."""
    if not _zeros(content, place):
        raise MalformedObject(reason=reason)
