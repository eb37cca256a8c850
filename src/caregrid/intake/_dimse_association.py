"""One association of the DIMSE door: negotiation, then commands until release, abort, silence or a broken rule."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path
from typing import Protocol

import structlog

from caregrid.domain.settings import DimseSettings
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import IntakeError
from caregrid.intake import _dimse_pdu as pdu
from caregrid.intake._dimse_wire import Body, PeerClosed, Wire
from caregrid.store.instances import Hashed

log = structlog.get_logger()

SUCCESS, PROCESSING_FAILURE, CLASS_NOT_SUPPORTED, UNRECOGNISED, MISTYPED = 0x0000, 0x0110, 0x0122, 0x0211, 0x0212
#: PS3.8 table 9-21: (result, source, reason).
_BAD_VERSION, _BAD_CONTEXT, _BAD_CALLED, _BAD_CALLING, _TOO_MANY = (1, 2, 2), (1, 1, 2), (1, 1, 7), (1, 1, 3), (2, 3, 2)
_LONGEST_REQUEST = 1 << 20
_LONGEST_COMMAND = 1 << 16


class Door(Protocol):
    """What an association needs of the door it came through."""

    settings: DimseSettings
    spool: Path | None

    def receive(self, incoming: Incoming, /) -> Receipt:
        """Keep an object."""

    def reject(self, source: Source, what: str, reason: str) -> None:
        """Make it known that a sender was turned away."""

    def full(self) -> bool:
        """Whether one association more, the present one, is too many."""

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether the sender is allowed."""

    def leave(self, association: Association) -> None:
        """The association no longer counts."""


class Association:
    """One association: negotiation, then commands until release, abort, silence or a broken rule."""

    def __init__(self, door: Door, peer: socket.socket, address: str) -> None:
        self.door, self.settings = door, door.settings
        self.source = Source("dimse", "", "", address)
        self._peer = peer
        self._body = Body(door.settings.max_object_bytes, door.spool)
        self._contexts: dict[int, tuple[str, str]] = {}
        self._command_part = b""
        self._command: dict[pdu.Element, bytes] | None = None
        self._context_id = 0
        self._busy = True

    def secure(self, tls: ssl.SSLContext | None) -> None:
        """Set the connection up. Raises ssl.SSLError when the peer does not prove itself, OSError when it goes away."""
        self._peer.settimeout(self.settings.artim_seconds)
        self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if tls is not None:
            self._peer = tls.wrap_socket(self._peer, server_side=True, do_handshake_on_connect=False)
            self._peer.do_handshake()

    def run(self) -> None:
        """Serve the association to its end."""
        # ARTIM (PS3.8 9.1.5): the whole request within the time, however slowly it drips in.
        self._wire = Wire(self._peer, self.settings.artim_seconds)
        try:
            if self._negotiate():
                self._wire.established(self.settings.idle_seconds)
                self._busy = False
                while self._next_pdu():
                    self._busy = self._command is not None or bool(self._command_part)
            self.door.leave(self)
            self._wire.end()
        except PeerClosed:
            return
        except pdu.Violation as broken:
            self._break_off(str(broken), pdu.abort(2, broken.reason))
        except TimeoutError:
            if self.source.calling_ae:
                self._break_off("nothing was heard for too long", pdu.abort(0, 0))

    def end_if_idle(self) -> None:
        """At closing time: end the association unless an object is under way."""
        if not self._busy:
            self.cut()

    def cut(self) -> None:
        """End the connection now; the association's thread notices and finishes."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._peer, socket.SHUT_RDWR)

    def close(self) -> None:
        """Give everything back."""
        self._body.clear()
        with contextlib.suppress(OSError):
            self._peer.close()

    def _break_off(self, reason: str, abort: bytes) -> None:
        self.door.leave(self)
        self.door.reject(self.source, "association aborted", reason)
        with contextlib.suppress(PeerClosed, TimeoutError):
            self._wire.send(abort)
            self._wire.end()

    # negotiation ----------------------------------------------------------------------------------------------------

    def _negotiate(self) -> bool:
        kind, length = self._head()
        if kind != pdu.A_ASSOCIATE_RQ:
            raise pdu.Violation("the first PDU is not an association request", pdu.Violation.UNEXPECTED_PDU)
        if length > _LONGEST_REQUEST:
            raise pdu.Violation("the association request is too long")
        request = pdu.read_request(self._wire.exactly(length))
        self.source = Source("dimse", request.calling, request.called, self.source.address)
        refusal = self._refusal(request)
        if refusal:
            codes, words = refusal
            self.door.reject(self.source, "association", words)
            self._wire.send(pdu.reject(*codes))
            return False
        answers = [(each.identifier, *pdu.choose(each)) for each in request.contexts]
        for each, (identifier, result, syntax) in zip(request.contexts, answers, strict=True):
            if result == 0:
                self._contexts[identifier] = (each.abstract_syntax, syntax)
        self._wire.send(pdu.accept(request, answers, self.settings.max_pdu))
        return True

    def _refusal(self, request: pdu.Request) -> tuple[tuple[int, int, int], str] | None:
        """The codes of PS3.8 table 9-21 and what they mean here, or None when the association is welcome."""
        if not request.version & 1:
            return _BAD_VERSION, "its protocol version is not supported"
        if request.application_context != pdu.APPLICATION_CONTEXT:
            return _BAD_CONTEXT, "its application context name is not supported"
        if request.called not in self.settings.ae_titles:
            return _BAD_CALLED, f"the called AE title {request.called} is not ours"
        if not self.door.may_send(request.calling, self.source.address):
            return _BAD_CALLING, "the calling AE title and address are not on the allow-list"
        if self.door.full():
            return _TOO_MANY, "too many associations are open"
        return None

    # commands -------------------------------------------------------------------------------------------------------

    def _head(self) -> tuple[int, int]:
        head = self._wire.exactly(6)
        if not 1 <= head[0] <= 7:
            raise pdu.Violation("it sent something that is not a DICOM message", pdu.Violation.UNRECOGNISED_PDU)
        return head[0], int.from_bytes(head[2:], "big")

    def _next_pdu(self) -> bool:
        kind, length = self._head()
        if kind == pdu.P_DATA:
            self._data(length)
            return True
        if kind == pdu.A_RELEASE_RQ:
            self._wire.exactly(min(length, 4))
            self._wire.send(pdu.RELEASE_RESPONSE)
            return False
        if kind == pdu.A_ABORT:
            return False
        raise pdu.Violation("it sent a message that has no place here", pdu.Violation.UNEXPECTED_PDU)

    def _data(self, left: int) -> None:
        """The presentation data values of a P-DATA-TF with ``left`` bytes."""
        if self.settings.max_pdu and left > self.settings.max_pdu:
            raise pdu.Violation("a PDU is longer than agreed")
        while left:
            if left < 6:
                raise pdu.Violation("a presentation data value is cut short")
            head = self._wire.exactly(6)
            length = int.from_bytes(head[:4], "big") - 2
            if not 0 <= length <= left - 6:
                raise pdu.Violation("a presentation data value is longer than its PDU")
            self._value(head[4], head[5], length)
            left -= 6 + length

    def _value(self, context_id: int, flags: int, length: int) -> None:
        if context_id not in self._contexts:
            raise pdu.Violation("a presentation context was not agreed", pdu.Violation.UNEXPECTED_PARAMETER)
        self._busy = True
        if flags & 1:
            self._take_command(context_id, flags, length)
            return
        if self._command is None or context_id != self._context_id:
            raise pdu.Violation("a data set came without its command", pdu.Violation.UNEXPECTED_PARAMETER)
        self._body.take(self._wire, length)
        if flags & 2:
            command, self._command = self._command, None
            self._answer(command, self._store(command))
            self._body.clear()

    def _take_command(self, context_id: int, flags: int, length: int) -> None:
        if self._command is not None:
            raise pdu.Violation("a command came in the middle of a data set", pdu.Violation.UNEXPECTED_PARAMETER)
        if len(self._command_part) + length > _LONGEST_COMMAND:
            raise pdu.Violation("a command set is too long")
        self._command_part += self._wire.exactly(length)
        self._context_id = context_id
        if flags & 2:
            content, self._command_part = self._command_part, b""
            self._begin(pdu.read_command(content))

    def _begin(self, command: dict[pdu.Element, bytes]) -> None:
        kind = pdu.number_of(command, pdu.COMMAND_FIELD)
        if kind == pdu.C_CANCEL_RQ:
            return
        if kind & pdu.RESPONSE:
            raise pdu.Violation("it answered what was not asked", pdu.Violation.UNEXPECTED_PARAMETER)
        if pdu.number_of(command, pdu.DATA_SET_TYPE) != pdu.NO_DATA_SET:
            self._command = command
        elif kind == pdu.C_ECHO_RQ:
            self._answer(command, (SUCCESS, ""))
        else:
            self._answer(command, (MISTYPED, "no data set") if kind == pdu.C_STORE_RQ else (UNRECOGNISED, ""))

    def _answer(self, command: dict[pdu.Element, bytes], answer: tuple[int, str]) -> None:
        self._wire.send(pdu.respond(self._context_id, command, *answer))

    def _store(self, command: dict[pdu.Element, bytes]) -> tuple[int, str]:
        """(status, error comment) once the data set that goes with a command has arrived."""
        if pdu.number_of(command, pdu.COMMAND_FIELD) != pdu.C_STORE_RQ:
            return UNRECOGNISED, ""
        abstract_syntax, transfer_syntax = self._contexts[self._context_id]
        if abstract_syntax == pdu.VERIFICATION:
            return CLASS_NOT_SUPPORTED, ""
        incoming = Hashed(
            source=self.source,
            chunks=self._body.chunks(),
            sop_class_uid=pdu.uid_of(command.get(pdu.AFFECTED_CLASS, b"")),
            sop_instance_uid=pdu.uid_of(command.get(pdu.AFFECTED_INSTANCE, b"")),
            transfer_syntax_uid=transfer_syntax,
            sha256=self._body.sha256,
        )
        if self._body.refused:
            self.door.reject(self.source, "object", str(self._body.refused.details.get("reason", "no space to receive it")))
            return self._body.refused.dimse_status, self._body.refused.message
        return self._receive(incoming)

    def _receive(self, incoming: Incoming) -> tuple[int, str]:
        try:
            self.door.receive(incoming)
        except IntakeError as error:
            return error.dimse_status, str(error.details.get("reason", error.message))
        except Exception as error:  # the association's edge: whatever broke, the sender must not hear "success"
            log.error("object not kept", door="dimse", error=type(error).__name__)
            return PROCESSING_FAILURE, "it could not be kept; send it again"
        return SUCCESS, ""
