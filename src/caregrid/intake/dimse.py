"""The DIMSE door: C-ECHO and C-STORE with a receive loop of our own (why: docs/why/own-receive-loop.md).

One thread per association; with ``processes`` > 1 as many processes take connections from the same port. An object is
acknowledged only after ``receive`` has returned. Memory per association is bounded by ``_dimse_wire.IN_MEMORY``. Sources: PS3.7
(DIMSE), PS3.8 (upper layer), PS3.4 annex B (status codes), PS3.15 B.12 (TLS).
"""

from __future__ import annotations

import fnmatch
import ipaddress
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from caregrid.domain.settings import DimseSettings, Tls
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import BadSetting
from caregrid.intake._dimse_association import Association
from caregrid.intake._dimse_processes import Crew

log = structlog.get_logger()

Receive = Callable[[Incoming], Receipt]
Allowed = Callable[[str, str], bool]
Rejected = Callable[[Source, str, str], None]
Listener = tuple[socket.socket, bool]  # and whether it speaks TLS

#: Connections beyond the limit that still hear why they are turned away; more are closed without a word.
_TURNED_AWAY_POLITELY = 50
#: How long an operator's answer about a sender is remembered.
_REMEMBER_SECONDS = 1.0
_BIND_SECONDS = 5.0


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
        spool: Path | None = None,
    ) -> None:
        self.settings, self.receive, self.spool = settings, receive, spool
        self._senders, self._rejected = Senders(settings, allowed), rejected
        self._tls = tls_context(settings.tls) if settings.tls else None
        self._listeners: list[Listener] = []
        self._open: set[Association] = set()
        self._lock = threading.Lock()
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._crew = Crew(max(1, settings.processes))
        self.port = self.tls_port = 0
        self.stopping = False

    def start(self) -> None:
        """Open the port or ports and accept associations in threads, or processes, of their own."""
        self._listeners = open_ports(self.settings)
        ports = [(int(listener.getsockname()[1]), tls) for listener, tls in self._listeners]
        self.port = ports[0][0]
        self.tls_port = next((port for port, tls in ports if tls), 0)
        if self._crew.size > 1:
            self._crew.start(self._take_connections, self._wind_up)
        else:
            self._take_connections()

    def _take_connections(self) -> None:
        self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="dimse", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """Accept nothing new, end idle associations, let objects under way arrive for ``seconds``, then close what is left."""
        self.stopping = True
        if self._crew.size > 1:
            self._crew.stop(seconds + 5.0)
        self._wind_up(seconds)

    def _wind_up(self, seconds: float = 5.0) -> None:
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
        poll.register(self._wake[0], select.POLLIN)
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
        except BlockingIOError:  # another process was faster, or the peer went away again
            return
        except OSError as error:
            log.error("connection not taken", error=error.errno)
            time.sleep(0.1)
            return
        if self._crew.total() >= self.settings.max_associations + _TURNED_AWAY_POLITELY:
            peer.close()
            return
        association = Association(self, peer, plain_address(address[0]))
        with self._lock:
            self._open.add(association)
            self._crew.report(len(self._open))
        threading.Thread(target=self._serve, args=(association, tls), name="association", daemon=True).start()

    def _serve(self, association: Association, tls: bool) -> None:
        try:
            association.secure(self._tls if tls else None)
            association.run()
        except ssl.SSLError as error:
            reason = (error.reason or "no reason given").replace("_", " ").lower()
            self.reject(association.source, "TLS handshake", reason)
        except OSError as error:
            log.info("connection lost", address=association.source.address, error=type(error).__name__)
        finally:
            self.leave(association)
            association.close()

    def leave(self, association: Association) -> None:
        """The association no longer counts."""
        with self._lock:
            self._open.discard(association)
            self._crew.report(len(self._open))

    def full(self) -> bool:
        """Whether one association more, the present one, is too many, over all processes."""
        return self.stopping or self._crew.total() > self.settings.max_associations

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether a sender is on the allow-list or was allowed by an operator; an empty list lets in this machine only."""
        return self._senders.may_send(calling_ae, address)

    def reject(self, source: Source, what: str, reason: str) -> None:
        """Make it known that a sender was turned away."""
        log.warning("rejected", what=what, why=reason, calling=source.calling_ae, called=source.called_ae, address=source.address)
        try:
            self._rejected(source, what, reason)
        except Exception as error:  # the door's edge: the sender gets its answer whether or not the note can be kept
            log.error("rejection not recorded", error=type(error).__name__)


class Senders:
    """Who may send: site.toml's list, then what an operator allowed since."""

    def __init__(self, settings: DimseSettings, allowed: Allowed | None) -> None:
        self._listed = [(each.calling_ae, _network(each.address)) for each in settings.allow]
        self._allowed = allowed
        self._asked: dict[tuple[str, str], tuple[float, bool]] = {}

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether this sender may; an empty list lets in this machine only."""
        place = ipaddress.ip_address(address)
        if not self._listed and place.is_loopback:
            return True
        if any(fnmatch.fnmatchcase(calling_ae, name) and place in network for name, network in self._listed):
            return True
        return self._allowed is not None and self._ask(self._allowed, (calling_ae, address))

    def _ask(self, allowed: Allowed, sender: tuple[str, str]) -> bool:
        moment = time.monotonic()
        when, answer = self._asked.get(sender, (-_REMEMBER_SECONDS, False))
        if moment - when < _REMEMBER_SECONDS:
            return answer
        try:
            answer = allowed(*sender)
        except Exception as error:  # the door's edge: whoever cannot be looked up is not let in
            log.error("allow-list not readable", error=type(error).__name__)
            return False
        if len(self._asked) >= 1000:
            self._asked.clear()
        self._asked[sender] = (moment, answer)
        return answer


def _network(address: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(address, strict=False)
    except ValueError as error:
        raise BadSetting(file="site.toml", key="dimse.allow.address", reason=f"is {address}, no IP address or network") from error


def plain_address(address: str) -> str:
    """An IP address as an operator writes it: IPv4 also where it comes mapped into IPv6, and without a scope."""
    place = ipaddress.ip_address(address.partition("%")[0])
    return str(getattr(place, "ipv4_mapped", None) or place)


def open_ports(settings: DimseSettings) -> list[Listener]:
    """Listening sockets: one, with or without TLS; or with ``tls_port`` one of each."""
    ports = [(settings.port, settings.tls is not None and settings.tls_port is None)]
    if settings.tls is not None and settings.tls_port is not None:
        ports.append((settings.tls_port, True))
    return [(_bound(settings.host, port), tls) for port, tls in ports]


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket. The processes of a door that was killed let go of the port within moments: that is waited for."""
    deadline = time.monotonic() + _BIND_SECONDS
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        try:
            listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            listener.setblocking(False)
            return listener


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
    spool: Path | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Call it from the main thread."""
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    door = DimseDoor(settings, receive, allowed, rejected, spool)
    door.start()
    while not end.wait(1.0):
        pass
    with suppress(KeyboardInterrupt):
        door.stop()
