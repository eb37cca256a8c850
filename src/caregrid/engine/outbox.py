"""The outbox: every object to every destination, sent until the receiver says it has it; parked, visibly, when it will not.

A row is claimed under a lease, so that several engines may share one outbox and a dead one's claims come free again.
The same object with the same UIDs goes out at every retry, so a receiver that took it and was cut off keeps one.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
import structlog

from caregrid.domain.settings import Destination
from caregrid.domain.states import check_transition
from caregrid.errors import DeliveryFailed, NotFound
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.studies import move_run, run_row
from caregrid.store.tables import delivery, now, result

log = structlog.get_logger()

BATCH = 20
PRIORITY = {"emergency": 1, "routine": 5, "off-peak": 9}


class SentLike(Protocol):
    """What a destination said of one object."""

    sop_instance_uid: str
    accepted: bool
    status: str
    transient: bool


Send = Callable[[Destination, Sequence[Path]], Sequence[SentLike]]
Commit = Callable[[Destination, Sequence[Path]], Mapping[str, bool]]


@dataclass(frozen=True)
class Claimed:
    """A row this engine holds the lease of."""

    id: int
    sop_instance_uid: str
    run_id: str
    attempts: int
    created_at: str
    path: Path


def put(connection: sa.Connection, run_row_: Mapping[str, Any], sop_instance_uid: str, destination: str) -> bool:
    """Add an object for a destination, in the caller's transaction; False when it is already there."""
    known = sa.select(delivery.c.id).where(delivery.c.sop_instance_uid == sop_instance_uid, delivery.c.destination == destination)
    if connection.scalar(known) is not None:
        return False
    moment = now()
    connection.execute(
        delivery.insert().values(
            sop_instance_uid=sop_instance_uid,
            destination=destination,
            run_id=run_row_["id"],
            study_instance_uid=run_row_["study_instance_uid"],
            priority=PRIORITY.get(run_row_["priority"], 5),
            state="pending",
            next_attempt_at=moment,
            created_at=moment,
        )
    )
    return True


def settle_run(connection: sa.Connection, run_id: str) -> str:
    """Bring a delivering run's state in line with its outbox rows; returns the state."""
    row = run_row(connection, run_id)
    if row["state"] not in ("delivering", "parked"):
        return str(row["state"])
    states = set(connection.scalars(sa.select(delivery.c.state).where(delivery.c.run_id == run_id)))
    if states & {"pending", "sending"}:
        new, why = "delivering", "results are on their way"
    elif "parked" in states:
        new, why = "parked", "a destination did not take a result; see its deliveries"
    else:
        new, why = "done", "every result was confirmed by its receiver" if states else "every task has ended; nothing to deliver"
    if new != row["state"]:
        move_run(connection, run_id, new, who="caregrid", why=why)
    return new


def backoff_seconds(destination: Destination, attempts: int) -> float:
    """Pause after the ``attempts``-th failure: doubling, capped, with ±10 % so that destinations are not all asked at once."""
    pause = min(destination.first_backoff_seconds * 2 ** max(attempts - 1, 0), destination.longest_backoff_seconds)
    return pause * random.uniform(0.9, 1.1)


def _later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="microseconds")


def _age(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


class Courier:
    """Carries the rows of one destination. One thread each, so that a dead destination holds up no other."""

    def __init__(
        self,
        engine: sa.Engine,
        folder: Path,
        destination: Destination,
        send: Send,
        owner: str,
        commit: Commit | None = None,
    ) -> None:
        self.engine, self.folder, self.destination = engine, folder, destination
        self.send, self.owner, self.commit = send, owner, commit

    def tick(self) -> int:
        """Send one batch of what is due; returns how many objects were delivered."""
        claimed = self._claim()
        if not claimed:
            return 0
        try:
            answers = {sent.sop_instance_uid: sent for sent in self.send(self.destination, [each.path for each in claimed])}
        except DeliveryFailed as error:
            self._all_failed(claimed, error.message)
            return 0
        delivered = self._record(claimed, answers)
        if delivered and self.commit and self.destination.storage_commitment:
            self._request_commitment(delivered)
        return len(delivered)

    def _claim(self) -> list[Claimed]:
        moment = now()
        due = sa.or_(
            sa.and_(delivery.c.state == "pending", delivery.c.next_attempt_at <= moment),
            sa.and_(delivery.c.state == "sending", delivery.c.lease_until <= moment),
        )
        query = (
            sa.select(delivery, result.c.path)
            .join(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
            .where(delivery.c.destination == self.destination.name, due)
            .order_by(delivery.c.priority, delivery.c.id)
            .limit(BATCH)
        )
        with reading(self.engine) as connection:
            if connection.execute(query.limit(1)).first() is None:
                return []
        with writing(self.engine) as connection:
            if connection.dialect.name == "postgresql":
                query = query.with_for_update(skip_locked=True, of=delivery)
            rows = connection.execute(query).all()
            lease = _later(self.destination.timeout_seconds * 2 + 30 + 2 * len(rows))
            if rows:
                connection.execute(
                    delivery.update()
                    .where(delivery.c.id.in_([row.id for row in rows]))
                    .values(state="sending", owner=self.owner, lease_until=lease, attempts=delivery.c.attempts + 1)
                )
        return [
            Claimed(row.id, row.sop_instance_uid, row.run_id, row.attempts + 1, row.created_at, self.folder / row.path)
            for row in rows
        ]

    def _record(self, claimed: list[Claimed], answers: Mapping[str, SentLike]) -> list[Claimed]:
        delivered: list[Claimed] = []
        with writing(self.engine) as connection:
            for each in claimed:
                answer = answers.get(each.sop_instance_uid)
                if not self._mine(connection, each):
                    continue
                if answer is not None and answer.accepted:
                    self._delivered(connection, each, answer.status)
                    delivered.append(each)
                elif answer is None or answer.transient:
                    self._again_or_park(connection, each, answer.status if answer else "no answer for this object")
                else:
                    self._park(connection, each, f"refused: {answer.status}", answer.status)
            for run_key in {each.run_id for each in claimed}:
                settle_run(connection, run_key)
        return delivered

    def _all_failed(self, claimed: list[Claimed], message: str) -> None:
        log.warning("destination not reached", destination=self.destination.name, objects=len(claimed))
        with writing(self.engine) as connection:
            for each in claimed:
                if self._mine(connection, each):
                    self._again_or_park(connection, each, message)
            # The circuit breaker: nothing else is tried here until the first of these is due again.
            attempts = max(each.attempts for each in claimed)
            due = _later(backoff_seconds(self.destination, attempts))
            connection.execute(
                delivery.update()
                .where(
                    delivery.c.destination == self.destination.name,
                    delivery.c.state == "pending",
                    delivery.c.next_attempt_at < due,
                    delivery.c.attempts > 0,
                )
                .values(next_attempt_at=due)
            )
            for run_key in {each.run_id for each in claimed}:
                settle_run(connection, run_key)

    def _mine(self, connection: sa.Connection, each: Claimed) -> bool:
        row = connection.execute(sa.select(delivery.c.state, delivery.c.owner).where(delivery.c.id == each.id)).one()
        return bool(row.state == "sending" and row.owner == self.owner)

    def _delivered(self, connection: sa.Connection, each: Claimed, said: str) -> None:
        _set(connection, each.id, state="delivered", delivered_at=now(), receiver_said=said, last_error="", lease_until="")
        audit.append(
            connection,
            who="caregrid",
            what="result delivered",
            subject=f"run:{each.run_id}",
            why="the receiver confirmed it",
            detail={
                "object": each.sop_instance_uid,
                "destination": self.destination.name,
                "said": said,
                "attempts": each.attempts,
            },
        )

    def _again_or_park(self, connection: sa.Connection, each: Claimed, message: str) -> None:
        if _age(each.created_at) >= self.destination.give_up_seconds:
            self._park(connection, each, f"given up after {self.destination.give_up_seconds:g} s: {message}", "")
            return
        due = _later(backoff_seconds(self.destination, each.attempts))
        _set(connection, each.id, state="pending", next_attempt_at=due, last_error=message, lease_until="")

    def _park(self, connection: sa.Connection, each: Claimed, message: str, said: str) -> None:
        _set(connection, each.id, state="parked", last_error=message, receiver_said=said, lease_until="")
        audit.append(
            connection,
            who="caregrid",
            what="delivery parked",
            subject=f"run:{each.run_id}",
            why=message,
            detail={"object": each.sop_instance_uid, "destination": self.destination.name},
        )

    def _request_commitment(self, delivered: list[Claimed]) -> None:
        assert self.commit is not None
        with writing(self.engine) as connection:
            for each in delivered:
                _set(connection, each.id, commitment="requested")
        try:
            answers = self.commit(self.destination, [each.path for each in delivered])
        except DeliveryFailed as error:
            log.warning("storage commitment failed", destination=self.destination.name, reason=error.message)
            return
        with writing(self.engine) as connection:
            for each in delivered:
                if each.sop_instance_uid in answers:
                    _set(connection, each.id, commitment="committed" if answers[each.sop_instance_uid] else "failed")


def _set(connection: sa.Connection, delivery_id: int, **values: Any) -> None:
    connection.execute(delivery.update().where(delivery.c.id == delivery_id).values(**values))


class Outbox:
    """All couriers, each in a thread of its own."""

    def __init__(self, couriers: Sequence[Courier], poll_seconds: float) -> None:
        self.couriers, self.poll_seconds = couriers, poll_seconds
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin carrying."""
        for courier in self.couriers:
            thread = threading.Thread(
                target=self._carry, args=(courier,), name=f"courier-{courier.destination.name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _carry(self, courier: Courier) -> None:
        while not self._stop.is_set():
            try:
                busy = courier.tick()
            except Exception as error:  # the thread's edge: the next tick tries again, nothing is lost with the outbox in rows
                log.error("courier broke", destination=courier.destination.name, error=type(error).__name__)
                busy = 0
            if not busy:
                self._stop.wait(self.poll_seconds)

    def stop(self) -> None:
        """Stop after the batch under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=10)


def resend(engine: sa.Engine, delivery_id: int, who: str, why: str) -> None:
    """Send a parked (or already delivered) object again, with the same UIDs. Raises NotFound, TransitionRefused."""
    with writing(engine) as connection:
        row = connection.execute(sa.select(delivery).where(delivery.c.id == delivery_id)).mappings().first()
        if row is None:
            raise NotFound(thing="delivery", key=delivery_id)
        check_transition("delivery", row["state"], "pending")
        _set(connection, delivery_id, state="pending", next_attempt_at=now(), created_at=now(), attempts=0, last_error="")
        audit.append(
            connection,
            who=who,
            what="delivery resent",
            subject=f"run:{row['run_id']}",
            why=why,
            detail={"object": row["sop_instance_uid"], "destination": row["destination"]},
        )
        current = run_row(connection, row["run_id"])
        if current["state"] == "parked":
            move_run(connection, row["run_id"], "delivering", who=who, why=why)
