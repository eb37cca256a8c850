"""One association of the DIMSE door: negotiation, then commands until release, abort, silence or a broken rule."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from caregrid.domain.settings import DimseSettings
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import CaregridError, IntakeError
from caregrid.intake import _dimse_pdu as wire
from caregrid.intake._dimse_pdu import Violation
from caregrid.intake._dimse_spool import Spool

log = structlog.get_logger()

TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", None)
#: An association request of more than this is no honest one: 128 contexts with 20 transfer syntaxes each are 100 KB.
_LONGEST_REQUEST = 1 << 20
_LONGEST_COMMAND = 1 << 16
_LONGEST_PDU = 16 << 20
#: How long a peer that was told to go may take to close its side (PS3.8 Sta13).
_LINGER_SECONDS = 3.0


class Door(Protocol):
    """What an association needs of the door it came through."""

    settings: DimseSettings
    spool_folder: Path | None

    def receive(self, incoming: Incoming) -> Receipt:
        """Keep an object."""

    def note_rejection(self, source: Source, what: str, reason: str) -> None:
        """Have an operator see it."""

    def is_full(self) -> bool:
        """Whether one association more is too many."""

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether the sender is allowed."""


@dataclass
class Context:
    """An accepted presentation context."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass
class Pending:
    """A request whose data set is under way. status: what to answer when it is not to be kept."""

    elements: wire.Elements
    spool: Spool
    status: int | None = None


@dataclass
class _Fragments:
    """A presentation context's message under way."""

    command: bytearray = field(default_factory=bytearray)
    pending: Pending | None = None


class Association:
    """Serves one connection."""

    def __init__(self, door: Door, peer: socket.socket, address: str) -> None:
        self.door, self.peer, self.address = door, peer, address
        self.settings = door.settings
        self.contexts: dict[int, Context] = {}
        self.source = Source("dimse", "", "", address)
        self._fragments: dict[int, _Fragments] = {}
        self._buffer = bytearray(max(2 * self.settings.max_pdu, 1 << 18))
        self._view = memoryview(self._buffer)
        self._low = self._high = 0
        self._deadline: float | None = None
        self._quick = TCP_QUICKACK is not None and not isinstance(peer, ssl.SSLSocket) and peer.family != socket.AF_UNIX

    def run(self) -> None:
        """Serve the association to its end, and leave nothing of it behind."""
        try:
            self._serve()
        except Violation as broken:
            self._broken(broken)
        except (struct.error, IndexError):
            self._broken(Violation("PDU cannot be read", wire.INVALID_PARAMETER))
        finally:
            for each in self._fragments.values():
                if each.pending:
                    each.pending.spool.close()
            self._linger()

    def _serve(self) -> None:
        # ARTIM (PS3.8 9.1.5): all of the request within the time, however slowly it drips in.
        self._deadline = time.monotonic() + self.settings.artim_seconds
        try:
            if not self._negotiate():
                return
        except TimeoutError:
            log.info("connection without an association request", address=self.address)
            return
        self._deadline = None
        self.peer.settimeout(self.settings.idle_seconds)
        try:
            while self._one_pdu():
                pass
        except TimeoutError:
            log.info("association silent for too long", calling=self.source.calling_ae, address=self.address)
            self._send_last(wire.abort(0, wire.NOT_SPECIFIED))

    def _broken(self, broken: Violation) -> None:
        log.warning("association aborted", calling=self.source.calling_ae, address=self.address, why=str(broken))
        self.door.note_rejection(self.source, "association aborted", str(broken))
        self._send_last(wire.abort(2, broken.reason))

    def _send_last(self, message: bytes) -> None:
        with suppress(OSError):
            self.peer.sendall(message)

    def _linger(self) -> None:
        """Let the peer close first: closing with its bytes unread would take our last word from it."""
        deadline = time.monotonic() + _LINGER_SECONDS
        with suppress(OSError, ValueError):
            self.peer.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.peer.settimeout(left)
                if not self.peer.recv_into(self._view):
                    return

    # reading --------------------------------------------------------------------------------------------------------

    def _need(self, count: int) -> bool:
        """Have ``count`` bytes in the buffer; False when the peer closed before."""
        if self._low + count > len(self._buffer):
            rest = bytes(self._view[self._low : self._high])
            if count > len(self._buffer):
                self._buffer = bytearray(count + 65536)
                self._view = memoryview(self._buffer)
            self._view[: len(rest)] = rest
            self._low, self._high = 0, len(rest)
        while self._high - self._low < count:
            if self._deadline is not None:
                self.peer.settimeout(max(0.001, self._deadline - time.monotonic()))
            got = self.peer.recv_into(self._view[self._high :])
            # Senders that leave Nagle on wait for our acknowledgement of each PDU; without this they lose 40 ms an object.
            if self._quick:
                self.peer.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)  # type: ignore[arg-type]
            if got == 0:
                return False
            self._high += got
        return True

    def _take(self, count: int) -> memoryview:
        taken = self._view[self._low : self._low + count]
        self._low += count
        if self._low == self._high:
            self._low = self._high = 0
        return taken

    def _pdu(self, limit: int) -> tuple[int, memoryview] | None:
        if not self._need(6):
            return None
        kind, _, length = struct.unpack(">BBI", self._take(6))
        if not 1 <= kind <= 7:
            raise Violation("unrecognised PDU", wire.UNRECOGNISED_PDU)
        if length > limit:
            raise Violation("PDU longer than agreed", wire.INVALID_PARAMETER)
        if not self._need(length):
            return None
        return kind, self._take(length)

    # negotiation ----------------------------------------------------------------------------------------------------

    def _negotiate(self) -> bool:
        read = self._pdu(_LONGEST_REQUEST)
        if read is None:
            return False
        kind, view = read
        if kind == wire.A_ABORT:
            return False
        if kind != wire.A_ASSOCIATE_RQ:
            raise Violation("the first PDU is not an association request", wire.UNEXPECTED_PDU)
        body = bytes(view)
        if len(body) < 68:
            raise Violation("association request too short", wire.INVALID_PARAMETER)
        called, calling = (body[start : start + 16].decode("ascii", "replace").strip(" \0") for start in (4, 20))
        self.source = Source("dimse", calling.replace("\0", ""), called.replace("\0", ""), self.address)
        found = wire.items(body, 68)
        refusal = self._refusal(body, found)
        if refusal:
            result, origin, reason, words = refusal
            log.warning("association rejected", calling=calling, called=called, address=self.address, why=words)
            self.door.note_rejection(self.source, "association", words)
            self._send_last(wire.rejection(result, origin, reason))
            return False
        self.peer.sendall(wire.pdu(wire.A_ASSOCIATE_AC, self._answer(body, found)))
        return True

    def _refusal(self, body: bytes, found: list[tuple[int, bytes]]) -> tuple[int, int, int, str] | None:
        """(result, source, reason, words) of PS3.8 Table 9-21, or None when the association is welcome."""
        if self.door.is_full():
            return 2, 3, 2, "too many associations at once"
        if not struct.unpack_from(">H", body)[0] & 1:
            return 1, 2, 2, "protocol version not supported"
        if any(kind == 0x10 and value.strip(b"\0 ") != wire.APPLICATION_CONTEXT for kind, value in found):
            return 1, 1, 2, "application context name not supported"
        if self.source.called_ae not in self.settings.ae_titles:
            return 1, 1, 7, f"called AE title {self.source.called_ae} is not ours"
        if not self.door.may_send(self.source.calling_ae, self.address):
            return 1, 1, 3, "calling AE title and address are not on the allow-list"
        return None

    def _answer(self, body: bytes, found: list[tuple[int, bytes]]) -> bytes:
        out = bytearray(body[:68]) + wire.item(0x10, wire.APPLICATION_CONTEXT)
        out[:4] = b"\0\1\0\0"
        user_items = b""
        for kind, value in found:
            if kind == 0x20:
                out += self._context(value)
            elif kind == 0x50:
                user_items = value
        return bytes(out + wire.item(0x50, self._user_information(user_items)))

    def _context(self, value: bytes) -> bytes:
        """Take or refuse a proposed presentation context (PS3.8 Table 9-18): the first transfer syntax that can be kept."""
        if len(value) < 4:
            raise Violation("presentation context too short", wire.INVALID_PARAMETER)
        identifier, abstract, syntaxes = value[0], "", []
        for kind, sub in wire.items(value, 4):
            if kind == 0x30:
                abstract = wire.uid(sub)
            elif kind == 0x40:
                syntaxes.append(wire.uid(sub))
        readable = [each for each in syntaxes if wire.is_readable(each)]
        known = abstract == wire.VERIFICATION or wire.is_storage(abstract)
        result = 3 if not known else 0 if readable else 4
        if result == 0:
            self.contexts[identifier] = Context(abstract, readable[0])
        syntax = (readable or syntaxes or ["1.2.840.10008.1.2"])[0]
        return wire.item(0x21, bytes([identifier, 0, result, 0]) + wire.item(0x40, syntax.encode("ascii", "replace")))

    def _user_information(self, value: bytes) -> bytes:
        """PS3.7 D.3.3: sizes and names of ours; one operation at a time; senders send, we never do; anybody may say who he is."""
        out = wire.item(0x51, struct.pack(">I", self.settings.max_pdu)) + wire.item(0x52, wire.IMPLEMENTATION_CLASS_UID)
        asked = wire.items(value, 0)
        if any(kind == 0x53 for kind, _ in asked):
            out += wire.item(0x53, struct.pack(">HH", 1, 1))
        for kind, sub in asked:
            if kind == 0x54 and len(sub) >= 4:
                out += wire.item(0x54, sub[:-2] + bytes([sub[-2] & 1, 0]))
        out += wire.item(0x55, wire.IMPLEMENTATION_VERSION)
        if any(kind == 0x58 and len(sub) > 1 and sub[1] for kind, sub in asked):
            out += wire.item(0x59, struct.pack(">H", 0))
        return out

    # commands -------------------------------------------------------------------------------------------------------

    def _one_pdu(self) -> bool:
        read = self._pdu((self.settings.max_pdu or _LONGEST_PDU) + 1024)
        if read is None:
            return False
        kind, body = read
        if kind == wire.P_DATA:
            self._values(body)
            return True
        if kind == wire.A_RELEASE_RQ:
            self.peer.sendall(wire.pdu(wire.A_RELEASE_RP, bytes(4)))
            return False
        if kind == wire.A_ABORT:
            return False
        raise Violation("unexpected PDU", wire.UNEXPECTED_PDU)

    def _values(self, body: memoryview) -> None:
        place, end = 0, len(body)
        while place < end:
            if place + 6 > end:
                raise Violation("presentation data value too short", wire.INVALID_PARAMETER)
            (length,) = struct.unpack_from(">I", body, place)
            if length < 2 or place + 4 + length > end:
                raise Violation("presentation data value longer than its PDU", wire.INVALID_PARAMETER)
            self._value(body[place + 4], body[place + 5], body[place + 6 : place + 4 + length])
            place += 4 + length

    def _value(self, context_id: int, flags: int, data: memoryview) -> None:
        """A piece of a command (flag 1) or of a data set, the last of it (flag 2); contexts may take turns."""
        if context_id not in self.contexts:
            raise Violation("presentation context was not agreed", wire.UNEXPECTED_PARAMETER)
        under_way = self._fragments.setdefault(context_id, _Fragments())
        if flags & 1:
            under_way.command += data
            if len(under_way.command) > _LONGEST_COMMAND:
                raise Violation("command set too long", wire.INVALID_PARAMETER)
            if flags & 2:
                complete, under_way.command = bytes(under_way.command), bytearray()
                self._begin(context_id, under_way, wire.elements(complete))
            return
        pending = under_way.pending
        if pending is None:
            raise Violation("a data set came without its command", wire.UNEXPECTED_PDU)
        pending.spool.add(data)
        if flags & 2:
            under_way.pending = None
            try:
                self._finish(context_id, pending)
            finally:
                pending.spool.close()

    def _begin(self, context_id: int, under_way: _Fragments, elements: wire.Elements) -> None:
        kind = wire.number(elements, wire.COMMAND_FIELD)
        if kind == wire.C_CANCEL_RQ:
            return
        if under_way.pending or kind & wire.RESPONSE or not kind:
            raise Violation("a command that has no place here", wire.UNEXPECTED_PDU)
        status = self._judge(context_id, kind)
        if wire.number(elements, wire.DATA_SET_TYPE) == wire.NO_DATA_SET:
            answer = 0xC000 if kind == wire.C_STORE_RQ and status is None else status or 0
            self.peer.sendall(wire.response(context_id, elements, answer))
            return
        # What is not to be kept is still listened to, so that the association lives on.
        limit = self.settings.max_object_bytes
        under_way.pending = Pending(elements, Spool(limit if status is None else 0, self.door.spool_folder), status)

    def _judge(self, context_id: int, kind: int) -> int | None:
        """None when a data set of the request is to be kept, else what to answer (PS3.7 Annex C)."""
        storage = self.contexts[context_id].abstract_syntax != wire.VERIFICATION
        if kind == wire.C_STORE_RQ:
            return None if storage else 0x0122
        return 0x0000 if kind == wire.C_ECHO_RQ else 0x0211

    def _finish(self, context_id: int, pending: Pending) -> None:
        if pending.status is not None:
            self.peer.sendall(wire.response(context_id, pending.elements, pending.status))
            return
        status, comment = self._store(self.contexts[context_id], pending)
        self.peer.sendall(wire.response(context_id, pending.elements, status, comment))

    def _store(self, context: Context, pending: Pending) -> tuple[int, str]:
        """Hand the object over; (status of PS3.4 Table B.2-1, comment)."""
        if pending.spool.error:
            return pending.spool.error.dimse_status, pending.spool.error.message
        incoming = Incoming(
            source=self.source,
            chunks=pending.spool.chunks(),
            sop_class_uid=wire.uid(pending.elements.get(wire.SOP_CLASS, b"")),
            sop_instance_uid=wire.uid(pending.elements.get(wire.SOP_INSTANCE, b"")),
            transfer_syntax_uid=context.transfer_syntax,
        )
        try:
            self.door.receive(incoming)
        except IntakeError as error:
            return error.dimse_status, str(error.details.get("reason", error.message))
        except CaregridError as error:
            return 0x0110, type(error).__name__
        except Exception as error:  # the association's edge: whatever broke, the sender must not hear "success"
            log.error("object not kept", error=type(error).__name__)
            return 0x0110, ""
        return 0x0000, ""
