"""A clinician's decision: recorded, audited, and the run put on its way again, in one transaction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from caregrid.engine.judge import Enqueues
from caregrid.errors import AlreadyDecided, NotFound, StateError
from caregrid.store import audit
from caregrid.store.database import writing
from caregrid.store.studies import move_run, run_row
from caregrid.store.tables import finding, now, review, task

DECISIONS = ("accepted", "rejected", "corrected")


def decide(
    engine: sa.Engine,
    queue: Enqueues,
    run_id: str,
    task_id: str,
    decision: str,
    who: str,
    reason: str,
    corrections: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Record a decision on an open review.

    corrections: tracking id → measurement's meaning → corrected value. Raises NotFound, AlreadyDecided, StateError (no reason
    given for a rejection or correction; a correction that names no measurement of the run).
    """
    if decision not in DECISIONS:
        raise StateError(reason=f"a decision is one of {', '.join(DECISIONS)}")
    if decision != "accepted" and not reason.strip():
        raise StateError(reason="rejecting or correcting needs a reason")
    if (decision == "corrected") != bool(corrections):
        raise StateError(reason="a correction, and only a correction, names corrected values")
    with writing(engine) as connection:
        row = _open_review(connection, run_id, task_id)
        if corrections:
            _check_corrections(connection, row, corrections)
        _write(connection, row, decision, who, reason, corrections)
        _go_on(connection, queue, row, decision, who)


def _open_review(connection: sa.Connection, run_id: str, task_id: str) -> dict[str, Any]:
    query = sa.select(review).where(review.c.run_id == run_id, review.c.task_id == task_id)
    if connection.dialect.name == "postgresql":
        query = query.with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(thing="review", key=f"{run_id}/{task_id}")
    if row["state"] != "open":
        raise AlreadyDecided(key=f"{run_id}/{task_id}", decision=row["state"], who=row["decided_by"] or "caregrid")
    return dict(row)


def _check_corrections(connection: sa.Connection, row: Mapping[str, Any], corrections: Mapping[str, Mapping[str, float]]) -> None:
    query = sa.select(finding.c.tracking_id, finding.c.content).where(
        finding.c.run_id == row["run_id"], finding.c.task_id.in_(row["of_tasks"])
    )
    known = {each.tracking_id: _meanings(each.content) for each in connection.execute(query)}
    for tracking_id, values in corrections.items():
        for meaning, value in values.items():
            if meaning not in known.get(tracking_id, ()):
                raise StateError(reason=f"the run measured no {meaning} for {tracking_id}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise StateError(reason=f"the corrected {meaning} is not a number")


def _meanings(content: Mapping[str, Any]) -> set[str]:
    return {each["concept"][2] for each in content.get("measurements", [])}


def _write(
    connection: sa.Connection,
    row: Mapping[str, Any],
    decision: str,
    who: str,
    reason: str,
    corrections: Mapping[str, Mapping[str, float]] | None,
) -> None:
    key = (row["run_id"], row["task_id"])
    moment = now()
    connection.execute(
        review.update()
        .where(review.c.run_id == key[0], review.c.task_id == key[1])
        .values(
            state=decision,
            decided_at=moment,
            decided_by=who,
            reason=reason,
            corrections={name: dict(values) for name, values in corrections.items()} if corrections else None,
        )
    )
    connection.execute(
        task.update()
        .where(task.c.run_id == key[0], task.c.task_id == key[1])
        .values(state="done", output={"decision": decision}, reason=f"{decision} by a clinician", finished_at=moment)
    )
    audit.append(
        connection,
        who=who,
        what=f"result {decision}",
        subject=f"run:{key[0]}",
        why=reason or "accepted as it is",
        detail={"task": key[1], "of": row["of_tasks"], "corrected": sorted(corrections) if corrections else []},
    )


def _go_on(connection: sa.Connection, queue: Enqueues, row: Mapping[str, Any], decision: str, who: str) -> None:
    current = run_row(connection, row["run_id"])
    next_round = current["round"] + 1
    move_run(connection, row["run_id"], "queued", who=who, why=f"the review was {decision}", round=next_round)
    queue.enqueue(connection, row["run_id"], next_round, current["priority"])
