"""The DIMSE door: C-ECHO and C-STORE with a receive loop of our own (why: docs/why/own-receive-loop.md).

One thread per association. An object is acknowledged only after ``receive`` has returned. Sources: PS3.7 (DIMSE), PS3.8 (upper
layer), PS3.4 Annex B (storage status codes), PS3.15 B (TLS).
"""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from caregrid.domain.settings import DimseSettings, Tls
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import CaregridError, IntakeError

log = structlog.get_logger()

Receive = Callable[[Incoming], Receipt]
Allowed = Callable[[str, str], bool]
Rejected = Callable[[Source, str, str], None]

IMPLEMENTATION_CLASS_UID = b"2.25.300180474285829414929262398764329170981"
IMPLEMENTATION_VERSION = b"CAREGRID_010"
APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
#: Not storage, though they look like it by prefix: query, commitment, media directory.
NOT_STORAGE = ("1.2.840.10008.5.1.4.1.2.", "1.2.840.10008.1.20.", "1.2.840.10008.5.1.4.31", "1.2.840.10008.5.1.4.34.")

C_STORE_RQ, C_STORE_RSP, C_ECHO_RQ, C_ECHO_RSP, C_CANCEL_RQ = 0x0001, 0x8001, 0x0030, 0x8030, 0x0FFF
A_ASSOCIATE_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA, A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = 1, 2, 3, 4, 5, 6, 7
TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


class Violation(Exception):  # noqa: N818 - it ends an association, it is not a caregrid error
    """The peer broke the protocol; ``reason`` is the A-ABORT reason of PS3.8 Table 9-26."""

    def __init__(self, what: str, reason: int = 0) -> None:
        self.reason = reason
        super().__init__(what)


@dataclass
class Context:
    """An accepted presentation context."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass
class Command:
    """The command set under way and, for a C-STORE, the pieces of its data set."""

    context_id: int
    elements: dict[tuple[int, int], bytes]
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0


class DimseDoor:
    """Listens, and hands what comes to ``receive``. ``allowed``: an operator's additions to the allow-list."""

    def __init__(
        self,
        settings: DimseSettings,
        receive: Receive,
        allowed: Allowed | None = None,
        rejected: Rejected = lambda source, what, reason: None,
    ) -> None:
        self.settings, self.receive = settings, receive
        self.allowed, self.rejected = allowed or (lambda ae, address: False), rejected
        self.port = 0
        self.tls_port = 0
        self._listeners: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def start(self) -> None:
        """Open the port or ports and accept in threads of their own."""
        settings = self.settings
        context = tls_context(settings.tls) if settings.tls else None
        if settings.tls and settings.tls_port is None:
            self.port = self.tls_port = self._listen(settings.port, context)
            return
        self.port = self._listen(settings.port, None)
        if context is not None and settings.tls_port is not None:
            self.tls_port = self._listen(settings.tls_port, context)

    def _listen(self, port: int, tls: ssl.SSLContext | None) -> int:
        listener = socket.create_server((self.settings.host, port), backlog=128)
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, tls), name="dimse-accept", daemon=True).start()
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        while not self._stopping.is_set():
            try:
                peer, address = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer, str(address[0]), tls), name="dimse", daemon=True).start()

    def _serve(self, peer: socket.socket, address: str, tls: ssl.SSLContext | None) -> None:
        with self._lock:
            self._open.add(peer)
        try:
            peer.settimeout(self.settings.artim_seconds)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                peer = tls.wrap_socket(peer, server_side=True)
            Association(self, peer, address).run()
        except (OSError, ssl.SSLError) as error:
            if isinstance(error, ssl.SSLError):
                self.rejected(Source("dimse", "", "", address), "TLS handshake", "the TLS handshake failed")
        finally:
            with self._lock:
                self._open.discard(peer)
            peer.close()

    def associations(self) -> int:
        """Connections open now."""
        with self._lock:
            return len(self._open)

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether a sender is on the allow-list; an empty list lets in this machine only."""
        listed = self.settings.allow
        if not listed and ipaddress.ip_address(address).is_loopback:
            return True
        place = ipaddress.ip_address(address)
        if any(
            fnmatch.fnmatchcase(calling_ae, each.calling_ae) and place in ipaddress.ip_network(each.address, strict=False)
            for each in listed
        ):
            return True
        return self.allowed(calling_ae, address)

    def stop(self, seconds: float = 5.0) -> None:
        """Accept nothing new, let associations end for ``seconds``, then close them."""
        self._stopping.set()
        for listener in self._listeners:
            listener.close()
        deadline = time.monotonic() + seconds
        while self.associations() and time.monotonic() < deadline:
            time.sleep(0.05)
        with self._lock:
            left = list(self._open)
        for peer in left:
            with _quiet():
                peer.shutdown(socket.SHUT_RDWR)


class _quiet:  # noqa: N801 - used as a statement
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def tls_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or newer (BCP 195 profile of PS3.15 B.12), with client certificates when asked for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.ca:
        context.load_verify_locations(tls.ca)
    if tls.require_client_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Association:
    """One association: negotiation, then commands until release, abort, silence or a broken rule."""

    def __init__(self, door: DimseDoor, peer: socket.socket, address: str) -> None:
        self.door, self.peer, self.address = door, peer, address
        self.settings = door.settings
        self.contexts: dict[int, Context] = {}
        self.source = Source("dimse", "", "", address)
        self._buffer = bytearray(1 << 20)
        self._view = memoryview(self._buffer)
        self._low = self._high = 0
        self._command = b""
        self._current: Command | None = None

    def run(self) -> None:
        """Serve the association to its end."""
        try:
            if not self._negotiate():
                return
            self.peer.settimeout(self.settings.idle_seconds)
            while self._one_pdu():
                pass
        except Violation as broken:
            log.warning("association aborted", calling=self.source.calling_ae, address=self.address, why=str(broken))
            self.door.rejected(self.source, "association aborted", str(broken))
            self._abort(broken.reason)
        except TimeoutError:
            self._abort(0, source=0)

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
            got = self.peer.recv_into(self._view[self._high :])
            # Senders that leave Nagle on wait for our acknowledgement of each PDU; without this they lose 40 ms an object.
            if TCP_QUICKACK is not None and not isinstance(self.peer, ssl.SSLSocket):
                self.peer.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)
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
            raise Violation("unrecognised PDU", 1)
        if length > limit:
            raise Violation("PDU longer than agreed", 6)
        if not self._need(length):
            return None
        return kind, self._take(length)

    # negotiation ----------------------------------------------------------------------------------------------------

    def _negotiate(self) -> bool:
        read = self._pdu(1 << 20)
        if read is None:
            return False
        kind, view = read
        if kind != A_ASSOCIATE_RQ:
            raise Violation("the first PDU is not an association request", 2)
        body = bytes(view)
        if len(body) < 68:
            raise Violation("association request too short", 6)
        called, calling = (body[start : start + 16].decode("ascii", "replace").strip(" \0") for start in (4, 20))
        self.source = Source("dimse", calling, called, self.address)
        refusal = self._refusal(body, calling, called)
        if refusal:
            result, origin, reason, words = refusal
            log.warning("association rejected", calling=calling, called=called, address=self.address, why=words)
            self.door.rejected(self.source, "association", words)
            self.peer.sendall(struct.pack(">BBIBBBB", A_ASSOCIATE_RJ, 0, 4, 0, result, origin, reason))
            return False
        answer = self._answer(body)
        self.peer.sendall(struct.pack(">BBI", A_ASSOCIATE_AC, 0, len(answer)) + answer)
        return True

    def _refusal(self, body: bytes, calling: str, called: str) -> tuple[int, int, int, str] | None:
        """(result, source, reason, words) of PS3.8 Table 9-21, or None when the association is welcome."""
        if self.door._stopping.is_set() or self.door.associations() > self.settings.max_associations:
            return 2, 3, 2, "too many associations at once"
        if not struct.unpack_from(">H", body)[0] & 1:
            return 1, 2, 2, "protocol version not supported"
        if called not in self.settings.ae_titles:
            return 1, 1, 7, f"called AE title {called} is not ours"
        if not self.door.may_send(calling, self.address):
            return 1, 1, 3, "calling AE title and address are not on the allow-list"
        return None

    def _answer(self, body: bytes) -> bytes:
        out = bytearray(body[:68])
        user_items = b""
        for kind, value in _items(body, 68):
            if kind == 0x10:
                out += _item(0x10, APPLICATION_CONTEXT)
            elif kind == 0x20:
                out += self._context(value)
            elif kind == 0x50:
                user_items = value
        out += _item(0x50, self._user_information(user_items))
        return bytes(out)

    def _context(self, value: bytes) -> bytes:
        if len(value) < 4:
            raise Violation("presentation context too short", 6)
        identifier, abstract, syntaxes = value[0], "", []
        for kind, sub in _items(value, 4):
            if kind == 0x30:
                abstract = _uid(sub)
            elif kind == 0x40:
                syntaxes.append(_uid(sub))
        result = 0 if syntaxes and accepts(abstract) else (3 if syntaxes else 4)
        syntax = syntaxes[0] if syntaxes else "1.2.840.10008.1.2"
        if result == 0:
            self.contexts[identifier] = Context(abstract, syntax)
        return _item(0x21, bytes([identifier, 0, result, 0]) + _item(0x40, syntax.encode()))

    def _user_information(self, value: bytes) -> bytes:
        out = _item(0x51, struct.pack(">I", self.settings.max_pdu)) + _item(0x52, IMPLEMENTATION_CLASS_UID)
        out += _item(0x55, IMPLEMENTATION_VERSION)
        for kind, sub in _items(value, 0):
            if kind == 0x53:
                out += _item(0x53, struct.pack(">HH", 1, 1))
            elif kind == 0x58 and len(sub) > 1 and sub[1]:
                out += _item(0x59, struct.pack(">H", 0))
        return out

    # commands -------------------------------------------------------------------------------------------------------

    def _one_pdu(self) -> bool:
        read = self._pdu(self.settings.max_pdu + 1024)
        if read is None:
            return False
        kind, body = read
        if kind == P_DATA:
            self._values(body)
            return True
        if kind == A_RELEASE_RQ:
            self.peer.sendall(struct.pack(">BBII", A_RELEASE_RP, 0, 4, 0))
            return False
        if kind == A_ABORT:
            return False
        raise Violation("unexpected PDU", 2)

    def _values(self, body: memoryview) -> None:
        place, end = 0, len(body)
        while place < end:
            if place + 6 > end:
                raise Violation("presentation data value too short", 6)
            (length,) = struct.unpack_from(">I", body, place)
            if length < 2 or place + 4 + length > end:
                raise Violation("presentation data value longer than its PDU", 6)
            self._value(body[place + 4], body[place + 5], body[place + 6 : place + 4 + length])
            place += 4 + length

    def _value(self, context_id: int, flags: int, data: memoryview) -> None:
        if context_id not in self.contexts:
            raise Violation("presentation context was not agreed", 5)
        if flags & 1:
            self._command += data
            if len(self._command) > 65536:
                raise Violation("command set too long", 6)
            if flags & 2:
                complete, self._command = self._command, b""
                self._begin(context_id, _elements(complete))
            return
        current = self._current
        if current is None:
            raise Violation("a data set came without its command", 2)
        current.size += len(data)
        if current.size > self.settings.max_object_bytes:
            raise Violation("object larger than the limit of this site", 6)
        current.pieces.append(bytes(data))
        if flags & 2:
            self._current = None
            self._store(current)

    def _begin(self, context_id: int, elements: dict[tuple[int, int], bytes]) -> None:
        command = Command(context_id, elements)
        kind = _us(elements, (0, 0x0100))
        if kind == C_STORE_RQ:
            self._current = command
        elif kind == C_ECHO_RQ:
            self._respond(command, C_ECHO_RSP, 0x0000)
        elif kind != C_CANCEL_RQ:
            self._respond(command, kind | 0x8000, 0x0211)
            if _us(elements, (0, 0x0800)) != 0x0101:
                raise Violation("a service that was not agreed", 2)

    def _store(self, command: Command) -> None:
        context = self.contexts[command.context_id]
        incoming = Incoming(
            source=self.source,
            chunks=command.pieces,
            sop_class_uid=_uid(command.elements.get((0, 0x0002), b"")),
            sop_instance_uid=_uid(command.elements.get((0, 0x1000), b"")),
            transfer_syntax_uid=context.transfer_syntax,
        )
        try:
            self.door.receive(incoming)
            status = 0x0000
        except IntakeError as error:
            status = error.dimse_status
        except CaregridError:
            status = 0x0110
        except Exception as error:  # the association's edge: whatever broke, the sender must not hear "success"
            log.error("object not kept", error=type(error).__name__)
            status = 0x0110
        self._respond(command, C_STORE_RSP, status)

    def _respond(self, command: Command, kind: int, status: int) -> None:
        elements = [
            ((0, 0x0002), command.elements.get((0, 0x0002), b"")),
            ((0, 0x0100), struct.pack("<H", kind)),
            ((0, 0x0120), command.elements.get((0, 0x0110), b"\0\0")),
            ((0, 0x0800), struct.pack("<H", 0x0101)),
            ((0, 0x0900), struct.pack("<H", status)),
        ]
        if (0, 0x1000) in command.elements:
            elements.append(((0, 0x1000), command.elements[(0, 0x1000)]))
        body = b"".join(struct.pack("<HHI", *tag, len(_even(value))) + _even(value) for tag, value in elements)
        body = struct.pack("<HHII", 0, 0, 4, len(body)) + body
        head = struct.pack(">BBIIBB", P_DATA, 0, len(body) + 6, len(body) + 2, command.context_id, 3)
        self.peer.sendall(head + body)

    def _abort(self, reason: int, source: int = 2) -> None:
        with _quiet():
            self.peer.sendall(struct.pack(">BBIBBBB", A_ABORT, 0, 4, 0, 0, source, reason))


def accepts(abstract_syntax: str) -> bool:
    """Verification and every storage class, private ones too; not query, commitment or worklist."""
    if abstract_syntax == VERIFICATION:
        return True
    if abstract_syntax.startswith("1.2.840.10008."):
        return abstract_syntax.startswith("1.2.840.10008.5.1.4.") and not abstract_syntax.startswith(NOT_STORAGE)
    return bool(abstract_syntax)


def _items(body: bytes, place: int) -> list[tuple[int, bytes]]:
    found = []
    while place + 4 <= len(body):
        kind, _, length = struct.unpack_from(">BBH", body, place)
        if place + 4 + length > len(body):
            raise Violation("item longer than its PDU", 6)
        found.append((kind, body[place + 4 : place + 4 + length]))
        place += 4 + length
    return found


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(value)) + value


def _elements(command: bytes) -> dict[tuple[int, int], bytes]:
    found, place = {}, 0
    while place + 8 <= len(command):
        group, element, length = struct.unpack_from("<HHI", command, place)
        if place + 8 + length > len(command):
            raise Violation("command element longer than its set", 6)
        found[(group, element)] = command[place + 8 : place + 8 + length]
        place += 8 + length
    return found


def _us(elements: dict[tuple[int, int], bytes], tag: tuple[int, int]) -> int:
    value = elements.get(tag, b"")
    return int(struct.unpack("<H", value)[0]) if len(value) == 2 else 0


def _uid(value: bytes) -> str:
    return value.rstrip(b"\0 ").decode("ascii", "replace")


def _even(value: bytes) -> bytes:
    return value + b"\0" if len(value) % 2 else value


def serve(settings: DimseSettings, receive: Receive, rejected: Rejected = lambda source, what, reason: None) -> None:
    """Serve until the process ends."""
    door = DimseDoor(settings, receive, rejected=rejected)
    door.start()
    threading.Event().wait()
