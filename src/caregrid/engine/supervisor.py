"""The engine's own loop: closes studies, judges them, takes over dead workers' runs, carries the outbox."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from caregrid.engine.flow import where
from caregrid.engine.outbox import Outbox

log = structlog.get_logger()


class Supervisor:
    """Calls each duty every ``poll_seconds``; one duty's failure is logged and the others go on."""

    def __init__(self, duties: dict[str, Callable[[], object]], outbox: Outbox, poll_seconds: float) -> None:
        self.duties, self.outbox, self.poll_seconds = duties, outbox, poll_seconds
        self._stop = threading.Event()

    def run(self) -> None:
        """Work until ``stop`` is called."""
        self.outbox.start()
        try:
            while not self._stop.wait(self.poll_seconds):
                self.tick()
        finally:
            self.outbox.stop()

    def tick(self) -> None:
        """One round of every duty."""
        for name, duty in self.duties.items():
            try:
                duty()
            except Exception as error:  # the loop's edge: the line goes on, and the next round tries again
                log.error("duty failed", duty=name, error=type(error).__name__, where=where(error))

    def stop(self) -> None:
        """Ask the loop to end."""
        self._stop.set()
