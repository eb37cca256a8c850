"""How a site stands, for the command line: counts and stories without patient data."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from caregrid.store.database import reading
from caregrid.store.studies import study_row
from caregrid.store.tables import delivery, quarantine, rejection, review, run, study, task, verdict, worker

Sheet = tuple[str, list[str], list[list[Any]]]


def status(engine: sa.Engine, dead_after_seconds: float) -> dict[str, dict[str, int]]:
    """Counts: processes alive by role; studies, runs, deliveries and reviews by state; quarantined; rejected in the last day."""
    since = (datetime.now(UTC) - timedelta(seconds=dead_after_seconds)).isoformat(timespec="microseconds")
    day = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="microseconds")
    with reading(engine) as connection:

        def count(column: sa.Column[Any], *where: sa.ColumnElement[bool]) -> dict[str, int]:
            query = sa.select(column, sa.func.count()).where(*where).group_by(column).order_by(column)
            return {str(key): int(number) for key, number in connection.execute(query)}

        return {
            "processes": count(worker.c.role, worker.c.seen_at >= since),
            "studies": count(study.c.state),
            "runs": count(run.c.state),
            "deliveries": count(delivery.c.state),
            "reviews": count(review.c.state),
            "quarantine": count(quarantine.c.error),
            "rejections": count(rejection.c.reason, rejection.c.at >= day),
        }


def latest_studies(engine: sa.Engine, state: str = "", limit: int = 50) -> list[list[Any]]:
    """UID, modalities, instances, state and reason of the latest studies."""
    query = sa.select(
        study.c.study_instance_uid, study.c.modalities, study.c.number_of_instances, study.c.state, study.c.state_reason
    )
    if state:
        query = query.where(study.c.state == state)
    with reading(engine) as connection:
        return [list(row) for row in connection.execute(query.order_by(study.c.last_received_at.desc()).limit(limit))]


def latest_deliveries(engine: sa.Engine, state: str, limit: int = 50) -> list[list[Any]]:
    """id, run, destination, attempts, last error and next attempt of deliveries in a state."""
    query = (
        sa.select(
            delivery.c.id,
            delivery.c.run_id,
            delivery.c.destination,
            delivery.c.attempts,
            delivery.c.last_error,
            delivery.c.next_attempt_at,
        )
        .where(delivery.c.state == state)
        .order_by(delivery.c.id.desc())
        .limit(limit)
    )
    with reading(engine) as connection:
        return [list(row) for row in connection.execute(query)]


def study_uids_since(engine: sa.Engine, since: str = "") -> list[str]:
    """Studies last received at or after ``since`` (ISO date or time), oldest first."""
    query = sa.select(study.c.study_instance_uid).where(study.c.last_received_at >= since).order_by(study.c.last_received_at)
    with reading(engine) as connection:
        return list(connection.scalars(query))


def verdicts(engine: sa.Engine, study_instance_uid: str) -> list[Sheet]:
    """One sheet per workflow judged for the study's present generation, with what was judged. Raises NotFound."""
    with reading(engine) as connection:
        row = study_row(connection, study_instance_uid)
        query = sa.select(verdict).where(
            verdict.c.study_instance_uid == study_instance_uid, verdict.c.generation == row["generation"]
        )
        found = connection.execute(query.order_by(verdict.c.workflow)).all()
    title = f"State: {row['state']} — {row['state_reason']}"
    sheets: list[Sheet] = [(title, ["evidence", "value"], [[key, value] for key, value in (row["completion"] or {}).items()])]
    for each in found:
        applies = "applies" if each.applies else "does not apply"
        sheets.append((f"{each.workflow}@{each.revision} {applies} — {each.reason}", ["judged"], [[line] for line in each.trail]))
    return sheets


def study_story(engine: sa.Engine, study_instance_uid: str) -> list[Sheet]:
    """The verdicts, then runs, tasks, reviews and deliveries of the study. Raises NotFound."""
    sheets = verdicts(engine, study_instance_uid)
    of_study = run.c.study_instance_uid == study_instance_uid
    with reading(engine) as connection:

        def rows(query: sa.Select[Any]) -> list[list[Any]]:
            return [list(row) for row in connection.execute(query)]

        runs = rows(
            sa.select(run.c.id, run.c.generation, run.c.workflow, run.c.priority, run.c.state, run.c.state_reason)
            .where(of_study)
            .order_by(run.c.generation, run.c.workflow)
        )
        tasks = rows(
            sa.select(
                run.c.workflow,
                task.c.task_id,
                task.c.kind,
                task.c.state,
                task.c.attempts,
                task.c.algorithm_seconds,
                task.c.reason,
            )
            .join(run, run.c.id == task.c.run_id)
            .where(of_study)
            .order_by(run.c.generation, run.c.workflow, task.c.position)
        )
        reviews = rows(
            sa.select(review.c.task_id, review.c.state, review.c.decided_by, review.c.decided_at, review.c.reason).where(
                review.c.study_instance_uid == study_instance_uid
            )
        )
        sent = rows(
            sa.select(
                delivery.c.id,
                delivery.c.sop_instance_uid,
                delivery.c.destination,
                delivery.c.state,
                delivery.c.attempts,
                delivery.c.last_error,
            )
            .where(delivery.c.study_instance_uid == study_instance_uid)
            .order_by(delivery.c.id)
        )
    sheets.append(("Runs", ["run", "generation", "workflow", "priority", "state", "reason"], runs))
    sheets.append(("Tasks", ["workflow", "task", "kind", "state", "attempts", "seconds", "reason"], tasks))
    sheets.append(("Reviews", ["task", "decision", "by", "at", "reason"], reviews))
    sheets.append(("Deliveries", ["id", "object", "destination", "state", "attempts", "last error"], sent))
    return sheets
