"""The DIMSE door: C-ECHO and C-STORE with a receive loop of our own (why: docs/why/own-receive-loop.md).

One thread per association; with ``processes`` > 1 as many processes take connections from the same port. An object is
acknowledged only after ``receive`` has returned. Sources: PS3.7 (DIMSE), PS3.8 (upper layer), PS3.4 Annex B (storage status
codes), PS3.15 B (TLS).
"""

from __future__ import annotations

import fnmatch
import ipaddress
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from pathlib import Path

import structlog

from caregrid.domain.settings import DimseSettings, Tls
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import BadSetting
from caregrid.intake._dimse_association import Association

log = structlog.get_logger()

Receive = Callable[[Incoming], Receipt]
Allowed = Callable[[str, str], bool]
Rejected = Callable[[Source, str, str], None]
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Connections beyond the limit that still hear why they are turned away; more are closed without a word.
_TURNED_AWAY_POLITELY = 50
_BIND_SECONDS = 5.0


class DimseDoor:
    """Listens, and hands what comes to ``receive``.

    allowed: an operator's additions to the allow-list, asked at most once a second for a sender. rejected: told of every
    association that was turned away or broken off, and why. spool_folder: where objects above 64 MB wait while they come in.
    """

    def __init__(
        self,
        settings: DimseSettings,
        receive: Receive,
        allowed: Allowed | None = None,
        rejected: Rejected = lambda source, what, reason: None,
        spool_folder: Path | None = None,
    ) -> None:
        self.settings, self.receive, self.spool_folder = settings, receive, spool_folder
        self.port = self.tls_port = 0
        self._rejected = rejected
        self._senders = _Senders(settings, allowed)
        self._listeners: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._crew = _Crew(max(1, settings.processes))

    def start(self) -> None:
        """Open the port or ports and take connections, in threads or processes of their own."""
        settings = self.settings
        context = tls_context(settings.tls) if settings.tls else None
        if context is not None and settings.tls_port is None:
            self.port = self.tls_port = self._listen(settings.port, context)
        else:
            self.port = self._listen(settings.port, None)
            if context is not None and settings.tls_port is not None:
                self.tls_port = self._listen(settings.tls_port, context)
        if settings.processes > 1:
            self._crew.start(self._take_connections, self._end)
        else:
            self._take_connections()

    def _listen(self, port: int, tls: ssl.SSLContext | None) -> int:
        listener = _bound(self.settings.host, port)
        self._listeners.append((listener, tls))
        return int(listener.getsockname()[1])

    def _take_connections(self) -> None:
        for listener, tls in self._listeners:
            threading.Thread(target=self._accept, args=(listener, tls), name="dimse-accept", daemon=True).start()

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        while not self._stopping.is_set():
            try:
                peer, address = listener.accept()
            except OSError as error:
                if self._stopping.is_set() or listener.fileno() < 0:
                    return
                log.error("connection not taken", error=error.errno)
                time.sleep(0.1)
                continue
            if self.associations() >= self.settings.max_associations + _TURNED_AWAY_POLITELY:
                peer.close()
                continue
            self._hold(peer)
            threading.Thread(target=self._serve, args=(peer, str(address[0]), tls), name="dimse", daemon=True).start()

    def _serve(self, peer: socket.socket, address: str, tls: ssl.SSLContext | None) -> None:
        try:
            peer.settimeout(self.settings.artim_seconds)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if tls is not None:
                peer = self._secured(peer, tls)
            Association(self, peer, address).run()
        except ssl.SSLError as error:
            self.note_rejection(
                Source("dimse", "", "", address), "TLS handshake", f"it failed: {error.reason or 'no reason given'}"
            )
        except OSError as error:
            log.info("association lost", address=address, error=type(error).__name__)
        finally:
            self._release(peer)

    def _secured(self, peer: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        secured = tls.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._open.discard(peer)
        self._hold(secured)
        try:
            secured.do_handshake()
        except OSError:
            self._release(secured)
            raise
        return secured

    def _hold(self, peer: socket.socket) -> None:
        with self._lock:
            self._open.add(peer)
            self._crew.report(len(self._open))

    def _release(self, peer: socket.socket) -> None:
        with self._lock:
            self._open.discard(peer)
            self._crew.report(len(self._open))
        peer.close()

    def associations(self) -> int:
        """Connections open now, in all processes."""
        return self._crew.total()

    def is_full(self) -> bool:
        """Whether the newest connection is one too many."""
        return self._stopping.is_set() or self.associations() > self.settings.max_associations

    def may_send(self, calling_ae: str, address: str) -> bool:
        """Whether a sender is on the allow-list; an empty list lets in this machine only."""
        return self._senders.may_send(calling_ae, address)

    def note_rejection(self, source: Source, what: str, reason: str) -> None:
        """Tell ``rejected``; that it could not be noted must not change what the peer is told."""
        try:
            self._rejected(source, what, reason)
        except Exception as error:  # the edge of the association's thread, with a database behind ``rejected``
            log.error("rejection not noted", error=type(error).__name__)

    def stop(self, seconds: float = 5.0) -> None:
        """Accept nothing new, let associations end for ``seconds``, then close them."""
        self._stopping.set()
        if self.settings.processes > 1:
            self._crew.stop(seconds + 5)
        self._end(seconds)

    def _end(self, seconds: float = 5.0) -> None:
        self._stopping.set()
        for listener, _ in self._listeners:
            with suppress(OSError):
                # Closing alone would leave a thread waiting in accept().
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            left = list(self._open)
        for peer in left:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


class _Senders:
    """Who may send: site.toml's list, then what an operator allowed since."""

    def __init__(self, settings: DimseSettings, allowed: Allowed | None) -> None:
        self._listed = [(each.calling_ae, _network(each.address)) for each in settings.allow]
        self._allowed = allowed
        self._asked: dict[tuple[str, str], tuple[float, bool]] = {}

    def may_send(self, calling_ae: str, address: str) -> bool:
        place = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(place, ipaddress.IPv6Address) and place.ipv4_mapped:
            place = place.ipv4_mapped
        if not self._listed and place.is_loopback:
            return True
        if any(fnmatch.fnmatchcase(calling_ae, name) and place in network for name, network in self._listed):
            return True
        return self._ask(calling_ae, str(place))

    def _ask(self, calling_ae: str, address: str) -> bool:
        if self._allowed is None:
            return False
        key, moment = (calling_ae, address), time.monotonic()
        when, answer = self._asked.get(key, (-10.0, False))
        if moment - when > 1.0:
            answer = self._allowed(calling_ae, address)
            if len(self._asked) > 1000:
                self._asked.clear()
            self._asked[key] = (moment, answer)
        return answer


def _network(address: str) -> _Network:
    try:
        return ipaddress.ip_network(address, strict=False)
    except ValueError as error:
        raise BadSetting(file="site.toml", key="dimse.allow.address", reason=f"is {address}, no IP address or network") from error


class _Crew:
    """The processes that take connections from one port, and how many each has open (shared memory, a slot each)."""

    def __init__(self, size: int) -> None:
        self.size, self._slot = size, 0
        self._counts = mmap(-1, 4 * size)
        self._pids: dict[int, int] = {}
        self._over = threading.Event()

    def report(self, count: int) -> None:
        struct.pack_into("<i", self._counts, 4 * self._slot, count)

    def total(self) -> int:
        return sum(struct.unpack_from("<i", self._counts, 4 * slot)[0] for slot in range(self.size))

    def start(self, work: Callable[[], None], end: Callable[[], None]) -> None:
        """Fork; ``work`` starts threads in each child, ``end`` winds them up."""
        self._work, self._wind_up = work, end
        for slot in range(self.size):
            self._fork(slot)
        threading.Thread(target=self._replace, name="dimse-crew", daemon=True).start()

    def _fork(self, slot: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._be_child(slot)
        self._pids[pid] = slot

    def _be_child(self, slot: int) -> None:
        code = 1
        try:
            stop, parent = threading.Event(), os.getppid()
            # A thread of the parent may have forked us: signal.signal works in this, the child's only, thread all the same.
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self._slot, self._pids = slot, {}
            self.report(0)
            self._work()
            while not stop.wait(0.25) and os.getppid() == parent:
                pass
            self._wind_up()
            code = 0
        finally:
            os._exit(code)

    def _replace(self) -> None:
        """A process that died is replaced; its associations are gone, and their senders send again."""
        while not self._over.wait(0.2):
            for pid, slot in list(self._pids.items()):
                if os.waitpid(pid, os.WNOHANG)[0] == pid:
                    del self._pids[pid]
                    log.error("DIMSE process died; a new one takes its place", slot=slot)
                    struct.pack_into("<i", self._counts, 4 * slot, 0)
                    self._fork(slot)

    def stop(self, seconds: float) -> None:
        self._over.set()
        deadline = time.monotonic() + seconds
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for pid in self._pids:
            while os.waitpid(pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket. The processes of a door that was killed let go of the port within moments: that is waited for."""
    deadline = time.monotonic() + _BIND_SECONDS
    while True:
        try:
            return socket.create_server((host, port), backlog=128, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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


def serve(
    settings: DimseSettings,
    receive: Receive,
    allowed: Allowed | None = None,
    rejected: Rejected = lambda source, what, reason: None,
    spool_folder: Path | None = None,
) -> None:
    """Serve until the process ends."""
    DimseDoor(settings, receive, allowed, rejected, spool_folder).start()
    threading.Event().wait()
