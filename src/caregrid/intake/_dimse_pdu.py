"""The messages of an association as bytes: PS3.8 section 9.3 (upper layer PDUs) and PS3.7 annex E (command sets). No I/O here."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydicom.config import IGNORE
from pydicom.uid import UID

A_ASSOCIATE_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA, A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = 1, 2, 3, 4, 5, 6, 7
C_STORE_RQ, C_ECHO_RQ, C_CANCEL_RQ, RESPONSE = 0x0001, 0x0030, 0x0FFF, 0x8000
NO_DATA_SET = 0x0101

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
IMPLEMENTATION_CLASS_UID = "2.25.300180474285829414929262398764329170981"
IMPLEMENTATION_VERSION_NAME = "CAREGRID"

Element = tuple[int, int]
AFFECTED_CLASS, COMMAND_FIELD, MESSAGE_ID, DATA_SET_TYPE = (0, 0x0002), (0, 0x0100), (0, 0x0110), (0, 0x0800)
_ANSWERED_ID, _STATUS, _ERROR_COMMENT, AFFECTED_INSTANCE = (0, 0x0120), (0, 0x0900), (0, 0x0902), (0, 0x1000)


class Violation(Exception):
    """The peer broke the protocol: what it did, and the reason our A-ABORT gives (PS3.8 table 9-26)."""

    UNRECOGNISED_PDU, UNEXPECTED_PDU, UNEXPECTED_PARAMETER, INVALID_PARAMETER = 1, 2, 5, 6

    def __init__(self, what: str, reason: int = INVALID_PARAMETER) -> None:
        self.reason = reason
        super().__init__(what)


@dataclass(frozen=True)
class Proposed:
    """A presentation context as proposed: its odd id, what is to be sent, and how it may be encoded, in order."""

    identifier: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """An association request. user: the user information's sub-items. head: the PDU's fixed part, given back in our answer."""

    head: bytes
    version: int
    called: str
    calling: str
    application_context: str
    contexts: tuple[Proposed, ...]
    user: tuple[tuple[int, bytes], ...]


def is_storage(abstract_syntax: str) -> bool:
    """Whether an abstract syntax is a kind of object to keep: every standard storage class, and every private class."""
    uid = _uid(abstract_syntax)
    if not uid.is_valid:
        return False
    if not uid.startswith("1.2.840.10008."):
        return True
    if uid.name == uid:  # newer than our dictionary
        return uid.startswith("1.2.840.10008.5.1.4.1.1.")
    return uid.startswith("1.2.840.10008.5.1.4.") and "Storage" in uid.name


def _uid(text: str) -> UID:
    return UID(text, IGNORE)  # what a peer offers may be no UID at all: that is answered, not warned of


def read_request(body: bytes) -> Request:
    """An A-ASSOCIATE-RQ without its first six bytes. Raises Violation."""
    if len(body) < 68:
        raise Violation("the association request is too short")
    called, calling = (body[start : start + 16].decode("ascii", "replace").strip(" \0") for start in (4, 20))
    context_name, contexts = "", []
    user: tuple[tuple[int, bytes], ...] = ()
    for kind, value in _items(body, 68):
        if kind == 0x10:
            context_name = uid_of(value)
        elif kind == 0x20:
            contexts.append(_proposed(value))
        elif kind == 0x50:
            user = tuple(_items(value, 0))
    if len({each.identifier for each in contexts}) < len(contexts):
        raise Violation("a presentation context id is used twice")
    return Request(body[:68], struct.unpack_from(">H", body)[0], called, calling, context_name, tuple(contexts), user)


def _proposed(value: bytes) -> Proposed:
    if len(value) < 4 or value[0] % 2 == 0:
        raise Violation("a presentation context has no odd id")
    items = list(_items(value, 4))
    abstract = next((uid_of(sub) for kind, sub in items if kind == 0x30), "")
    return Proposed(value[0], abstract, tuple(uid_of(sub) for kind, sub in items if kind == 0x40))


def choose(proposed: Proposed) -> tuple[int, str]:
    """(result, transfer syntax) for a presentation context (PS3.8 table 9-18): the first one offered, whatever it is.

    Objects are kept as they come, so what the sender likes best is best: it need not change anything before sending.
    """
    syntaxes = [each for each in proposed.transfer_syntaxes if _uid(each).is_valid]
    if proposed.abstract_syntax != VERIFICATION and not is_storage(proposed.abstract_syntax):
        return 3, syntaxes[0] if syntaxes else IMPLICIT_LITTLE
    return (0, syntaxes[0]) if syntaxes else (4, IMPLICIT_LITTLE)


def accept(request: Request, answers: Sequence[tuple[int, int, str]], max_pdu: int) -> bytes:
    """An A-ASSOCIATE-AC. answers: (context id, result, transfer syntax) for every context proposed."""
    items = _item(0x10, APPLICATION_CONTEXT.encode())
    for identifier, result, syntax in answers:
        items += _item(0x21, bytes([identifier, 0, result, 0]) + _item(0x40, syntax.encode()))
    user = _item(0x51, struct.pack(">I", max_pdu)) + _item(0x52, IMPLEMENTATION_CLASS_UID.encode())
    user += b"".join(_user_answer(kind, value) for kind, value in request.user)
    user += _item(0x55, IMPLEMENTATION_VERSION_NAME.encode())
    body = request.head + items + _item(0x50, user)
    return struct.pack(">BBI", A_ASSOCIATE_AC, 0, len(body)) + body


def _user_answer(kind: int, value: bytes) -> bytes:
    """Our answer to a sub-item of the user information (PS3.7 annex D.3); what needs none is passed over."""
    if kind == 0x53:  # asynchronous operations window: one at a time
        return _item(0x53, struct.pack(">HH", 1, 1))
    if kind == 0x54 and len(value) >= 4:  # role selection: the requestor sends (SCU) and we receive, never the other way round
        (length,) = struct.unpack_from(">H", value)
        return _item(0x54, value[: 2 + length] + bytes([value[-2] & 1, 0]))
    if kind == 0x58 and len(value) >= 2 and value[1]:  # user identity: taken note of; who may send is settled otherwise
        return _item(0x59, struct.pack(">H", 0))
    return b""


def reject(result: int, source: int, reason: int) -> bytes:
    """An A-ASSOCIATE-RJ (PS3.8 table 9-21)."""
    return struct.pack(">BBIBBBB", A_ASSOCIATE_RJ, 0, 4, 0, result, source, reason)


def abort(source: int, reason: int) -> bytes:
    """An A-ABORT (PS3.8 table 9-26). source 0: we do not wish to go on; 2: the peer broke the protocol."""
    return struct.pack(">BBIBBBB", A_ABORT, 0, 4, 0, 0, source, reason)


RELEASE_RESPONSE = struct.pack(">BBII", A_RELEASE_RP, 0, 4, 0)


def read_command(content: bytes) -> dict[Element, bytes]:
    """A command set (implicit little endian) as tag → value. Raises Violation."""
    found: dict[Element, bytes] = {}
    place, end = 0, len(content)
    while place < end:
        if end - place < 8:
            raise Violation("a command set is cut short")
        group, element, length = struct.unpack_from("<HHI", content, place)
        if length > end - place - 8:
            raise Violation("an element is longer than its command set")
        found[(group, element)] = content[place + 8 : place + 8 + length]
        place += 8 + length
    if len(found.get(COMMAND_FIELD, b"")) != 2 or len(found.get(MESSAGE_ID, found.get(_ANSWERED_ID, b""))) != 2:
        raise Violation("a command set lacks its command field or message id")
    return found


def number_of(command: dict[Element, bytes], element: Element) -> int:
    """An unsigned short of a command set; 0 when absent."""
    value = command.get(element, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else 0


def respond(context_id: int, command: dict[Element, bytes], status: int, comment: str = "") -> bytes:
    """The P-DATA-TF with the response to a command."""
    fields = [
        (AFFECTED_CLASS, command.get(AFFECTED_CLASS)),
        (COMMAND_FIELD, struct.pack("<H", number_of(command, COMMAND_FIELD) | RESPONSE)),
        (_ANSWERED_ID, command.get(MESSAGE_ID)),
        (DATA_SET_TYPE, struct.pack("<H", NO_DATA_SET)),
        (_STATUS, struct.pack("<H", status)),
        (_ERROR_COMMENT, comment.encode("ascii", "replace")[:64] or None),
        (AFFECTED_INSTANCE, command.get(AFFECTED_INSTANCE)),
    ]
    body = b"".join(_command_element(tag, value) for tag, value in fields if value is not None)
    body = struct.pack("<HHII", 0, 0, 4, len(body)) + body
    return struct.pack(">BBIIBB", P_DATA, 0, len(body) + 6, len(body) + 2, context_id, 3) + body


def _command_element(tag: Element, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if tag == _ERROR_COMMENT else b"\0"
    return struct.pack("<HHI", *tag, len(value)) + value


def uid_of(value: bytes) -> str:
    """A UID without its padding."""
    return bytes(value).rstrip(b"\0 ").decode("ascii", "replace")


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _items(body: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    while place < len(body):
        if place + 4 > len(body):
            raise Violation("an item of the association request is cut short")
        kind, _, length = struct.unpack_from(">BBH", body, place)
        if place + 4 + length > len(body):
            raise Violation("an item is longer than the association request")
        yield kind, body[place + 4 : place + 4 + length]
        place += 4 + length
