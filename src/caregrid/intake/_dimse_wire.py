"""An association's connection: bytes in, with time limits; and the object under way, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import tempfile
import time
from io import FileIO
from mmap import ACCESS_READ, mmap
from pathlib import Path

from caregrid.errors import IntakeError, MalformedObject, StoreFull

#: An object up to this size is received in memory, a larger one in an unnamed file. Bounds memory per association.
IN_MEMORY = 16 << 20
_STEP = 1 << 20
_AHEAD = 8192
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


class PeerClosed(Exception):
    """The peer closed the connection, or it broke."""


class Wire:
    """Reads exactly what is asked for. Raises PeerClosed at the end, TimeoutError when the peer is silent for too long."""

    def __init__(self, peer: socket.socket, seconds: float) -> None:
        self.peer = peer
        self._plain = not isinstance(peer, ssl.SSLSocket)
        self._ahead = bytearray(_AHEAD)
        self._view = memoryview(self._ahead)
        self._low = self._high = 0
        self._deadline: float | None = time.monotonic() + seconds

    def established(self, idle_seconds: float) -> None:
        """From now on only silence counts, not the time in all."""
        self._deadline = None
        if not self._plain:
            self.peer.settimeout(idle_seconds)
            return
        # The kernel's own time limit: with Python's, every read is preceded by a poll.
        limit = struct.pack("ll", int(idle_seconds), int(idle_seconds % 1 * 1e6))
        self.peer.settimeout(None)
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def exactly(self, count: int) -> bytes:
        """The next ``count`` bytes; meant for headers and commands, not for objects."""
        if count > _AHEAD:
            content = bytearray(count)
            self.into(memoryview(content))
            return bytes(content)
        if self._high - self._low < count:
            rest = self._high - self._low
            self._view[:rest] = bytes(self._view[self._low : self._high])
            self._low, self._high = 0, rest
            while self._high < count:
                self._high += self._receive(self._view[self._high :])
        self._low += count
        return bytes(self._view[self._low - count : self._low])

    def into(self, target: memoryview) -> None:
        """Fill ``target``, past our own buffer wherever possible."""
        done = min(len(target), self._high - self._low)
        target[:done] = self._view[self._low : self._low + done]
        self._low += done
        while done < len(target):
            done += self._receive(target[done:])

    def send(self, content: bytes) -> None:
        """Send all of it."""
        try:
            self.peer.sendall(content)
        except (BlockingIOError, TimeoutError) as error:
            raise TimeoutError from error
        except OSError as error:
            raise PeerClosed from error

    def end(self, seconds: float = 2.0) -> None:
        """Let the peer read our last word before the connection goes: closing with unread input would take it away."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            if self._plain:
                self.peer.shutdown(socket.SHUT_WR)
            self.peer.settimeout(0.2)
            while time.monotonic() < deadline:
                try:
                    if not self.peer.recv(65536):
                        return
                except TimeoutError:
                    continue

    def _receive(self, target: memoryview) -> int:
        if self._deadline is not None:
            self.peer.settimeout(max(0.001, self._deadline - time.monotonic()))
        try:
            count = self.peer.recv_into(target)
            # Senders that leave Nagle on hold their next packet back until this one is acknowledged: 40 ms an object.
            if self._plain and _QUICKACK is not None:
                self.peer.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        except (BlockingIOError, TimeoutError) as error:
            raise TimeoutError from error
        except OSError as error:
            raise PeerClosed from error
        if count == 0:
            raise PeerClosed
        return count


class Body:
    """The data set under way. One buffer serves an association's objects one after the other.

    refused: why the object cannot be kept, None when it can; what still comes of it is read and forgotten.
    """

    def __init__(self, limit: int, spool: Path | None = None) -> None:
        self.size = 0
        self.refused: IntakeError | None = None
        self._limit, self._spool = limit, spool
        self._hash = hashlib.sha256()
        self._buffer = bytearray(_STEP // 4)
        self._held = 0
        self._file: FileIO | None = None
        self._map: mmap | None = None

    def take(self, wire: Wire, count: int) -> None:
        """Receive the next ``count`` bytes of the data set."""
        while count:
            step = min(count, _STEP)
            self._make_room(step)
            with memoryview(self._buffer) as view:
                received = view[self._held : self._held + step]
                wire.into(received)
                # While the sender makes its next message ready: one association then never waits for the hash.
                self._hash.update(received)
                received.release()
            self._held += step
            self.size += step
            count -= step

    def chunks(self) -> list[memoryview]:
        """What was received, in order; valid until ``clear``."""
        if self._file is None:
            return [memoryview(self._buffer)[: self._held]]
        self._spill()
        if self.refused:
            return []
        self._map = mmap(self._file.fileno(), 0, access=ACCESS_READ)
        return [memoryview(self._map)]

    @property
    def sha256(self) -> str:
        """Of what was received, in hex."""
        return self._hash.hexdigest()

    def clear(self) -> None:
        """Ready for the next object."""
        self._hash = hashlib.sha256()
        self.size = self._held = 0
        self.refused = None
        if self._map is not None:
            with contextlib.suppress(BufferError):  # somebody still looks at it: it goes with them
                self._map.close()
            self._map = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _make_room(self, step: int) -> None:
        if self.size + step > self._limit:
            self.refused = MalformedObject(reason="it is larger than this site takes")
        elif self._held + step > IN_MEMORY and not self.refused:
            self._spill()
        if self.refused:
            self._held = 0
        if self._held + step > len(self._buffer):
            larger = bytearray(min(max(2 * len(self._buffer), self._held + step), IN_MEMORY))
            larger[: self._held] = memoryview(self._buffer)[: self._held]
            self._buffer = larger

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._spool, buffering=0)  # noqa: SIM115 - closed by ``clear``
            rest = memoryview(self._buffer)[: self._held]
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self.refused = StoreFull()
        self._held = 0
