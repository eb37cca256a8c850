"""Several processes behind one port: forked before the door's threads, replaced when they die, gone when their parent is."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap

import structlog

log = structlog.get_logger()


class Crew:
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
        threading.Thread(target=self._replace, name="dimse-processes", daemon=True).start()

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
