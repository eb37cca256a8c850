"""The bytes of the DICOM upper layer and of command sets (PS3.8 9.3, PS3.7 6.3 and Annex E): taken apart and put together."""

from __future__ import annotations

import struct
from collections.abc import Mapping

IMPLEMENTATION_CLASS_UID = b"2.25.300180474285829414929262398764329170981"
IMPLEMENTATION_VERSION = b"CAREGRID_010"
APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
#: Not storage, though they look like it by prefix: query, commitment, media directory, worklist.
_NOT_STORAGE = ("1.2.840.10008.5.1.4.1.2.", "1.2.840.10008.1.20.", "1.2.840.10008.5.1.4.31", "1.2.840.10008.5.1.4.34.")
#: Every transfer syntax of the standard, and the one private one whose layout is known (GE's, implicit VR little endian).
_TRANSFER_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.113619.5.2")

A_ASSOCIATE_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA, A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = 1, 2, 3, 4, 5, 6, 7
C_STORE_RQ, C_ECHO_RQ, C_CANCEL_RQ, RESPONSE = 0x0001, 0x0030, 0x0FFF, 0x8000
NO_DATA_SET = 0x0101

# A-ABORT reasons (PS3.8 Table 9-26)
NOT_SPECIFIED, UNRECOGNISED_PDU, UNEXPECTED_PDU, UNEXPECTED_PARAMETER, INVALID_PARAMETER = 0, 1, 2, 5, 6

#: Of a command set: Affected SOP Class, Command Field, Message ID, Data Set Type, Affected SOP Instance.
SOP_CLASS, COMMAND_FIELD, MESSAGE_ID, DATA_SET_TYPE, SOP_INSTANCE = 0x0002, 0x0100, 0x0110, 0x0800, 0x1000
_RESPONDED_TO, _STATUS, _COMMENT = 0x0120, 0x0900, 0x0902

Elements = dict[int, bytes]


class Violation(Exception):  # noqa: N818 - it ends an association, it is not a caregrid error
    """The peer broke the protocol; ``reason`` is the A-ABORT reason."""

    def __init__(self, what: str, reason: int = NOT_SPECIFIED) -> None:
        self.reason = reason
        super().__init__(what)


def is_storage(abstract_syntax: str) -> bool:
    """Every storage class, private ones too; not query, commitment or worklist."""
    if abstract_syntax.startswith("1.2.840.10008."):
        return abstract_syntax.startswith("1.2.840.10008.5.1.4.") and not abstract_syntax.startswith(_NOT_STORAGE)
    return bool(abstract_syntax)


def is_readable(transfer_syntax: str) -> bool:
    """Whether an object in it can be checked and kept as it is; pixels are never re-encoded, so compression does not matter."""
    return transfer_syntax.startswith(_TRANSFER_SYNTAXES)


def items(body: bytes, place: int) -> list[tuple[int, bytes]]:
    """(type, value) of the items from ``place`` on. Raises Violation when they do not fit."""
    found = []
    while place < len(body):
        if place + 4 > len(body):
            raise Violation("item cut short", INVALID_PARAMETER)
        kind, _, length = struct.unpack_from(">BBH", body, place)
        if place + 4 + length > len(body):
            raise Violation("item longer than its PDU", INVALID_PARAMETER)
        found.append((kind, body[place + 4 : place + 4 + length]))
        place += 4 + length
    return found


def item(kind: int, value: bytes) -> bytes:
    """One item."""
    return struct.pack(">BBH", kind, 0, len(value)) + value


def elements(command: bytes) -> Elements:
    """The elements of a command set (implicit VR little endian, group 0) by element number."""
    found, place = {}, 0
    while place + 8 <= len(command):
        group, element, length = struct.unpack_from("<HHI", command, place)
        if group or place + 8 + length > len(command):
            raise Violation("command set does not fit", INVALID_PARAMETER)
        found[element] = command[place + 8 : place + 8 + length]
        place += 8 + length
    return found


def number(found: Mapping[int, bytes], element: int) -> int:
    """An unsigned short of a command set; 0 when absent."""
    value = found.get(element, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else 0


def uid(value: bytes) -> str:
    """A UID without its padding."""
    return value.strip(b"\0 ").decode("ascii", "replace")


def pdu(kind: int, body: bytes) -> bytes:
    """A protocol data unit."""
    return struct.pack(">BBI", kind, 0, len(body)) + body


def rejection(result: int, source: int, reason: int) -> bytes:
    """A-ASSOCIATE-RJ (PS3.8 9.3.4)."""
    return pdu(A_ASSOCIATE_RJ, bytes([0, result, source, reason]))


def abort(source: int, reason: int) -> bytes:
    """A-ABORT (PS3.8 9.3.8). source 0: we as the service's user, 2: the upper layer itself, about a broken rule."""
    return pdu(A_ABORT, bytes([0, 0, source, reason]))


def response(context_id: int, request: Mapping[int, bytes], status: int, comment: str = "") -> bytes:
    """The P-DATA unit with the response to a request. comment: up to 64 characters a sender's operator may see."""
    kind = number(request, COMMAND_FIELD) | RESPONSE
    values = {
        SOP_CLASS: request.get(SOP_CLASS, b""),
        COMMAND_FIELD: struct.pack("<H", kind),
        _RESPONDED_TO: request.get(MESSAGE_ID, b"\0\0"),
        DATA_SET_TYPE: struct.pack("<H", NO_DATA_SET),
        _STATUS: struct.pack("<H", status),
        _COMMENT: comment.encode("ascii", "replace").replace(b"\\", b"/")[:64],
        SOP_INSTANCE: request.get(SOP_INSTANCE, b""),
    }
    body = b"".join(_element(tag, value) for tag, value in values.items() if value or tag == SOP_CLASS)
    body = _element(0, struct.pack("<I", len(body))) + body
    return pdu(P_DATA, struct.pack(">IBB", len(body) + 2, context_id, 3) + body)


def _element(tag: int, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if tag == _COMMENT else b"\0"
    return struct.pack("<HHI", 0, tag, len(value)) + value
