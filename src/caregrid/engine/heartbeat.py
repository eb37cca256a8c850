"""Who is alive: every process beats, and the runs of one that stopped are taken over."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import sqlalchemy as sa
import structlog

from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.tables import now, worker

log = structlog.get_logger()


class Heartbeat:
    """Writes this process's row every ``seconds`` in a thread of its own."""

    def __init__(self, engine: sa.Engine, name: str, role: str, seconds: float) -> None:
        self.engine, self.name, self.role, self.seconds = engine, name, role, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Say that the process is here, then keep saying it."""
        with writing(self.engine) as connection:
            connection.execute(worker.delete().where(worker.c.id == self.name))
            connection.execute(
                worker.insert().values(
                    id=self.name, role=self.role, host=socket.gethostname(), pid=os.getpid(), started_at=now(), seen_at=now()
                )
            )
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(self.seconds):
            try:
                with writing(self.engine) as connection:
                    connection.execute(worker.update().where(worker.c.id == self.name).values(seen_at=now()))
            except sa.exc.SQLAlchemyError as error:  # the database may be away for a while; beating goes on
                log.warning("heartbeat not written", error=type(error).__name__)

    def stop(self) -> None:
        """Take the row away: this process left in order."""
        self._stop.set()
        self._thread.join(timeout=5)
        with writing(self.engine) as connection:
            connection.execute(worker.delete().where(worker.c.id == self.name))


class HoldsRuns(Protocol):
    """What the durable queue knows about who holds which runs."""

    def executors(self) -> Iterable[str]:
        """Workers that hold begun runs."""

    def take_over(self, worker: str) -> list[str]:
        """Put a worker's begun runs back on their queues."""


def alive(engine: sa.Engine, dead_after_seconds: float) -> set[str]:
    """Names of the processes that beat within the last ``dead_after_seconds``."""
    since = (datetime.now(UTC) - timedelta(seconds=dead_after_seconds)).isoformat(timespec="microseconds")
    with reading(engine) as connection:
        return set(connection.scalars(sa.select(worker.c.id).where(worker.c.seen_at >= since)))


def take_over_dead(engine: sa.Engine, queue: HoldsRuns, dead_after_seconds: float) -> int:
    """Put the runs of workers that are no longer alive back on the queue; returns how many."""
    dead = set(queue.executors()) - alive(engine, dead_after_seconds)
    taken = 0
    for name in sorted(dead):
        keys = queue.take_over(name)
        if not keys:
            continue
        taken += len(keys)
        log.warning("took over runs of a dead worker", worker=name, runs=len(keys))
        with writing(engine) as connection:
            audit.append(
                connection,
                who="caregrid",
                what="worker taken over",
                subject=f"worker:{name}",
                why=f"no sign of life for {dead_after_seconds:g} s",
                detail={"runs": [key.partition(":")[0] for key in keys]},
            )
            connection.execute(worker.delete().where(worker.c.id == name))
    return taken
