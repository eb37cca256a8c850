"""The DIMSE door: C-ECHO and C-STORE with a receive loop of our own (why: docs/why/own-receive-loop.md).

One thread per association. An object is acknowledged only after ``receive`` has returned. Memory per association is bounded by
``_dimse_wire.IN_MEMORY``. Sources: PS3.7 (DIMSE), PS3.8 (upper layer), PS3.4 annex B (status codes), PS3.15 B.12 (TLS).
"""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from caregrid.domain.settings import DimseSettings, Tls
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import IntakeError
from caregrid.intake import _dimse_pdu as pdu
from caregrid.intake._dimse_processes import run_processes, wait_for_end
from caregrid.intake._dimse_wire import Body, PeerClosed, Wire

log = structlog.get_logger()

Receive = Callable[[Incoming], Receipt]
Allowed = Callable[[str, str], bool]
Rejected = Callable[[Source, str, str], None]
Listener = tuple[socket.socket, bool]  # and whether it speaks TLS

SUCCESS, PROCESSING_FAILURE, CLASS_NOT_SUPPORTED, MISTYPED, UNRECOGNISED = 0x0000, 0x0110, 0x0122, 0x0212, 0x0211
OUT_OF_RESOURCES = 0xA700
_LONGEST_REQUEST = 1 << 20
_LONGEST_COMMAND = 1 << 16


class DimseDoor:
    """Listens, and hands what comes to ``receive``.

    allowed: an operator's additions to the allow-list. rejected: told of every association turned away or broken off.
    spool: where objects too large for memory are received (unnamed files); the system's temporary folder if not given.
    """

    def __init__(
        self,
        settings: DimseSettings,
        receive: Receive,
        allowed: Allowed | None = None,
        rejected: Rejected = lambda source, what, reason: None,
        *,
        spool: Path | None = None,
        listeners: Sequence[Listener] | None = None,
    ) -> None:
        self.settings, self.receive, self.spool = settings, receive, spool
        self._allowed, self._rejected = allowed or (lambda ae, address: False), rejected
        self._networks = [(each.calling_ae, ipaddress.ip_network(each.address, strict=False)) for each in settings.allow]
        self._tls = tls_context(settings.tls) if settings.tls else None
        self._listeners = list(listeners or ())
        self._open: set[Association] = set()
        self._lock = threading.Lock()
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self.stopping = False

    @property
    def port(self) -> int:
        """The port that is open; with TLS beside it, the one without."""
        return int(self._listeners[0][0].getsockname()[1])

    @property
    def tls_port(self) -> int:
        """The port that speaks TLS; 0 when there is none."""
        return next((int(listener.getsockname()[1]) for listener, tls in self._listeners if tls), 0)

    def start(self) -> None:
        """Open the port or ports and accept associations in threads of their own."""
        self._listeners = self._listeners or open_ports(self.settings)
        self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="dimse", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Accept nothing new, end idle associations, let objects under way arrive for ``seconds``, then close what is left."""
        self.stopping = True
        if self._wake and self._thread:
            self._wake[1].close()
            self._thread.join()
            self._wake[0].close()
        for listener, _ in self._listeners:
            listener.close()
        deadline = time.monotonic() + seconds
        while (left := self._now_open()) and time.monotonic() < deadline:
            for association in left:
                association.end_if_idle()
            time.sleep(0.02)
        for association in self._now_open():
            association.cut()

    def _now_open(self) -> list[Association]:
        with self._lock:
            return list(self._open)

    def _accept(self) -> None:
        poll = select.poll()
        assert self._wake is not None
        poll.register(self._wake[0])
        by_number = {listener.fileno(): (listener, tls) for listener, tls in self._listeners}
        for number in by_number:
            poll.register(number, select.POLLIN)
        while not self.stopping:
            for number, _ in poll.poll():
                if number in by_number:
                    self._take(*by_number[number])

    def _take(self, listener: socket.socket, tls: bool) -> None:
        try:
            peer, address = listener.accept()
        except OSError:  # another process was faster, or the peer went away again
            return
        place = getattr(ipaddress.ip_address(address[0]), "ipv4_mapped", None) or address[0]
        threading.Thread(target=self._serve, args=(peer, str(place), tls), name="association", daemon=True).start()

    def _serve(self, peer: socket.socket, address: str, tls: bool) -> None:
        try:
            peer.settimeout(self.settings.artim_seconds)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls and self._tls is not None:
                peer = self._tls.wrap_socket(peer, server_side=True)
        except OSError as error:
            reason = getattr(error, "reason", None)
            if reason:
                self.reject(Source("dimse", "", "", address), "TLS handshake", str(reason).replace("_", " ").lower())
            peer.close()
            return
        association = Association(self, peer, address)
        with self._lock:
            self._open.add(association)
        try:
            association.run()
        finally:
            self.leave(association)
            association.close()

    def leave(self, association: Association) -> None:
        """The association no longer counts."""
        with self._lock:
            self._open.discard(association)

    def full(self) -> bool:
        """Whether one association more, the present one, is too many."""
        with self._lock:
            return self.stopping or len(self._open) > self.settings.max_associations

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether a sender is on the allow-list or was allowed by an operator; an empty list lets in this machine only."""
        place = ipaddress.ip_address(address)
        if not self._networks and place.is_loopback:
            return True
        if any(fnmatch.fnmatchcase(calling_ae, name) and place in network for name, network in self._networks):
            return True
        try:
            return self._allowed(calling_ae, address)
        except Exception as error:  # the door's edge: whoever cannot be looked up is not let in
            log.error("allow-list not readable", error=type(error).__name__)
            return False

    def reject(self, source: Source, what: str, reason: str) -> None:
        """Make it known that a sender was turned away."""
        log.warning("rejected", what=what, why=reason, calling=source.calling_ae, called=source.called_ae, address=source.address)
        try:
            self._rejected(source, what, reason)
        except Exception as error:  # the door's edge: the sender gets its answer whether or not the note can be kept
            log.error("rejection not recorded", error=type(error).__name__)


class Association:
    """One association: negotiation, then commands until release, abort, silence or a broken rule."""

    def __init__(self, door: DimseDoor, peer: socket.socket, address: str) -> None:
        self.door, self.settings = door, door.settings
        self.source = Source("dimse", "", "", address)
        self._peer = peer
        self._wire = Wire(peer, door.settings.artim_seconds)
        self._body = Body(door.settings.max_object_bytes, door.spool)
        self._contexts: dict[int, tuple[str, str]] = {}
        self._command_part = b""
        self._command: dict[pdu.Element, bytes] | None = None
        self._context_id = 0
        self._busy = True

    def run(self) -> None:
        """Serve the association to its end."""
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
            result, source, reason, words = refusal
            self.door.reject(self.source, "association", words)
            self._wire.send(pdu.reject(result, source, reason))
            return False
        answers = [(each.identifier, *pdu.choose(each)) for each in request.contexts]
        for each, (identifier, result, syntax) in zip(request.contexts, answers, strict=True):
            if result == 0:
                self._contexts[identifier] = (each.abstract_syntax, syntax)
        self._wire.send(pdu.accept(request, answers, self.settings.max_pdu))
        return True

    def _refusal(self, request: pdu.Request) -> tuple[int, int, int, str] | None:
        """(result, source, reason, words) of PS3.8 table 9-21, or None when the association is welcome."""
        if not request.version & 1:
            return 1, 2, 2, "its protocol version is not supported"
        if request.application_context != pdu.APPLICATION_CONTEXT:
            return 1, 1, 2, "its application context name is not supported"
        if request.called not in self.settings.ae_titles:
            return 1, 1, 7, "the called AE title is not ours"
        if not self.door.may_send(request.calling, self.source.address):
            return 1, 1, 3, "the calling AE title and address are not on the allow-list"
        if self.door.full():
            return 2, 3, 2, "too many associations are open"
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
        incoming = Incoming(
            source=self.source,
            chunks=self._body.chunks(),
            sop_class_uid=pdu.uid_of(command.get(pdu.AFFECTED_CLASS, b"")),
            sop_instance_uid=pdu.uid_of(command.get(pdu.AFFECTED_INSTANCE, b"")),
            transfer_syntax_uid=transfer_syntax,
        )
        if self._body.refused:
            self.door.reject(self.source, "object", self._body.refused)
            return OUT_OF_RESOURCES, self._body.refused
        return self._receive(incoming)

    def _receive(self, incoming: Incoming) -> tuple[int, str]:
        try:
            self.door.receive(incoming)
        except IntakeError as error:
            return error.dimse_status, error.message
        except Exception as error:  # the association's edge: whatever broke, the sender must not hear "success"
            log.error("object not kept", door="dimse", error=type(error).__name__)
            return PROCESSING_FAILURE, "it could not be kept; send it again"
        return SUCCESS, ""


def open_ports(settings: DimseSettings) -> list[Listener]:
    """Listening sockets: one, with or without TLS; or with ``tls_port`` one of each."""
    ports = [(settings.port, settings.tls is not None and settings.tls_port is None)]
    if settings.tls is not None and settings.tls_port is not None:
        ports.append((settings.tls_port, True))
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listeners = []
    for port, tls in ports:
        listener = socket.create_server((settings.host, port), family=family, backlog=128)
        listener.setblocking(False)
        listeners.append((listener, tls))
    return listeners


def tls_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or newer with forward secrecy (the BCP 195 profile, PS3.15 B.12), with client certificates when asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM")
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.ca:
        context.load_verify_locations(tls.ca)
    if tls.require_client_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def serve(
    settings: DimseSettings,
    receive: Receive,
    allowed: Allowed | None = None,
    rejected: Rejected = lambda source, what, reason: None,
    *,
    spool: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, in ``settings.processes`` processes. Call it from the main thread before starting others."""
    listeners = open_ports(settings)

    def one_process() -> None:
        door = DimseDoor(settings, receive, allowed, rejected, spool=spool, listeners=listeners)
        door.start()
        wait_for_end()
        door.stop()

    if settings.processes > 1:
        run_processes(settings.processes, one_process)
    else:
        one_process()
