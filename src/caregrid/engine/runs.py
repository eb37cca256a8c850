"""What an operator may do with a run: start it again where it stopped, or cancel it."""

from __future__ import annotations

from typing import Protocol

import sqlalchemy as sa

from caregrid.domain.states import check_transition
from caregrid.store.database import writing
from caregrid.store.studies import move_run, run_row
from caregrid.store.tables import review, task


class RunQueue(Protocol):
    """What retrying and cancelling ask of the durable queue."""

    def enqueue(self, connection: sa.Connection, run_id: str, round_number: int, priority: str) -> None:
        """Put a round of a run on the queue within the transaction."""

    def cancel(self, run_id: str, round_number: int) -> None:
        """Stop a round at its next step."""


def retry(engine: sa.Engine, queue: RunQueue, run_id: str, who: str, why: str) -> None:
    """Run again what failed or was cancelled; what was done stays done. Raises NotFound, TransitionRefused."""
    with writing(engine) as connection:
        row = run_row(connection, run_id)
        check_transition("run", row["state"], "queued")
        connection.execute(
            task.update()
            .where(
                task.c.run_id == run_id, task.c.state.in_(("failed", "skipped", "cancelled", "running")), task.c.kind != "review"
            )
            .values(state="waiting", attempts=0, output=None, reason="", finished_at=None)
        )
        next_round = row["round"] + 1
        move_run(connection, run_id, "queued", who=who, why=why, round=next_round, attempts=0, finished_at=None)
        queue.enqueue(connection, run_id, next_round, row["priority"])


def cancel(engine: sa.Engine, queue: RunQueue, run_id: str, who: str, why: str) -> None:
    """Stop a run; what it delivered stays delivered (see withdraw). Raises NotFound, TransitionRefused."""
    with writing(engine) as connection:
        row = run_row(connection, run_id)
        move_run(connection, run_id, "cancelled", who=who, why=why)
        connection.execute(
            task.update()
            .where(task.c.run_id == run_id, task.c.state.in_(("waiting", "running")))
            .values(state="cancelled", reason=why)
        )
        connection.execute(review.update().where(review.c.run_id == run_id, review.c.state == "open").values(state="cancelled"))
    queue.cancel(run_id, row["round"])
