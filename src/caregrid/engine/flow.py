"""One run carried out task by task. Called by the durable queue; every method may be called again after a crash.

What makes that safe: a task's end and all it brings about (results, outbox rows, review) are one transaction; result
objects are written once, under UIDs derived from the run; a worker that lost its run to another is turned away.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog

from caregrid.domain.workflow import Task, Workflow
from caregrid.engine.judge import pinned_workflow
from caregrid.engine.outbox import settle_run
from caregrid.engine.plan import ENDED, Readiness, TaskStand, outcome, readiness
from caregrid.errors import CaregridError, ResultInvalid, RuntimeFailure, StateError
from caregrid.store.database import writing
from caregrid.store.studies import move_run, run_row
from caregrid.store.tables import now, run, task

log = structlog.get_logger()

GO_ON: dict[str, Any] = {"next": "go on"}
STOP: dict[str, Any] = {"next": "stop"}


class LostRun(StateError):
    """The run was taken over by another worker"""


@dataclass(frozen=True)
class Job:
    """A task about to be done, with what it needs to know of its run."""

    run: dict[str, Any]
    workflow: Workflow
    task: Task
    stands: dict[str, TaskStand]
    attempt: int


@dataclass(frozen=True)
class Done:
    """What a task put out; ``write`` brings its effects about in the transaction that ends the task.

    open: the task stays open (a review waits for a person).
    """

    output: dict[str, Any]
    write: Callable[[sa.Connection], None] | None = None
    reason: str = ""
    algorithm_seconds: float | None = None
    open: bool = False


class RunFlow:
    """The flow of caregrid.engine.durable.Flow over the site's own tables. ``work``: task kind → how it is done."""

    def __init__(self, engine: sa.Engine, work: dict[str, Callable[[Job], Done]], max_crashes: int = 5) -> None:
        self.engine, self.work, self.max_crashes = engine, work, max_crashes

    def begin(self, run_id: str, round_number: int, worker: str) -> list[str]:
        """Note who begins the run; the tasks in order, or none when this round is no longer wanted."""
        with writing(self.engine) as connection:
            row = run_row(connection, run_id)
            if row["round"] != round_number or row["state"] not in ("queued", "running"):
                return []
            started = {"started_at": row["started_at"] or now(), "worker": worker}
            move_run(connection, run_id, "running", who=worker, why="a worker began the run", **started)
            query = sa.select(task.c.task_id).where(task.c.run_id == run_id).order_by(task.c.position)
            return list(connection.scalars(query))

    def perform(self, run_id: str, task_id: str, worker: str) -> dict[str, Any]:
        """Do one task if it may go; what the queue should do next."""
        prepared = self._prepare(run_id, task_id, worker)
        if not isinstance(prepared, Job):
            return prepared
        try:
            done = self.work[prepared.task.kind](prepared)
        except CaregridError as error:
            return self._failed(prepared, worker, error.message, retryable=_retryable(error))
        except Exception as error:  # the process edge: one run's bug must not stop the line
            log.error("task broke", run=run_id, task=task_id, error=type(error).__name__, where=where(error))
            return self._failed(prepared, worker, f"internal error {type(error).__name__} at {where(error)}", retryable=False)
        self._ended(prepared, worker, done)
        return GO_ON

    def finish(self, run_id: str, worker: str) -> str:
        """Settle what the run is now."""
        with writing(self.engine) as connection:
            row = run_row(connection, run_id)
            if row["state"] != "running":
                return str(row["state"])
            workflow = pinned_workflow(connection, row["workflow"], row["revision"])
            state, why = outcome(workflow, _stands(connection, run_id))
            if state == "done":
                move_run(connection, run_id, "delivering", who=worker, why="results are on their way")
                return settle_run(connection, run_id)
            move_run(connection, run_id, state, who=worker, why=why)
            return state

    def _prepare(self, run_id: str, task_id: str, worker: str) -> Job | dict[str, Any]:
        with writing(self.engine) as connection:
            row = run_row(connection, run_id)
            if row["state"] not in ("running", "queued"):
                return STOP
            workflow = pinned_workflow(connection, row["workflow"], row["revision"])
            each, stands = workflow.task(task_id), _stands(connection, run_id)
            if stands[task_id].state in ENDED:
                return STOP if stands[task_id].state == "failed" and each.on_error == "fail" else GO_ON
            if each.kind == "review" and stands[task_id].state == "running":
                return GO_ON
            may = readiness(each, stands)
            if may.action != "ready":
                return self._not_now(connection, run_id, task_id, may)
            return self._claim(connection, row, workflow, each, stands, worker)

    def _not_now(self, connection: sa.Connection, run_id: str, task_id: str, may: Readiness) -> dict[str, Any]:
        if may.action == "skip":
            _set_task(connection, run_id, task_id, state="skipped", reason=may.reason, finished_at=now())
        return GO_ON

    def _claim(
        self,
        connection: sa.Connection,
        row: dict[str, Any],
        workflow: Workflow,
        each: Task,
        stands: dict[str, TaskStand],
        worker: str,
    ) -> Job | dict[str, Any]:
        stand = stands[each.id]
        # Still "running" means that the worker which began it died in it.
        crashes = stand.output.get("crashes", 0) + (stand.state == "running")
        if crashes >= self.max_crashes:
            why = f"task {each.id} took its worker down {crashes} times"
            _set_task(connection, row["id"], each.id, state="failed", reason=why, finished_at=now())
            move_run(connection, row["id"], "parked", who="caregrid", why=why)
            return STOP
        attempts = connection.scalar(sa.select(task.c.attempts).where(*_key(row["id"], each.id))) or 0
        output = stand.output | ({"crashes": crashes} if crashes else {})
        _set_task(
            connection, row["id"], each.id, state="running", attempts=attempts + 1, started_at=now(), output=output, reason=""
        )
        connection.execute(run.update().where(run.c.id == row["id"]).values(worker=worker, attempts=run.c.attempts + 1))
        return Job(row, workflow, each, stands, attempts + 1 - crashes)

    def _failed(self, job: Job, worker: str, message: str, retryable: bool) -> dict[str, Any]:
        retry = job.task.retry
        with writing(self.engine) as connection:
            self._check_mine(connection, job, worker)
            if retryable and job.attempt < retry.attempts:
                pause = retry.backoff_seconds * 2 ** (job.attempt - 1)
                why = f"attempt {job.attempt} of {retry.attempts}: {message}; again in {pause:g} s"
                _set_task(connection, job.run["id"], job.task.id, state="waiting", reason=why)
                return {"next": "pause", "seconds": pause}
            _set_task(connection, job.run["id"], job.task.id, state="failed", reason=message, finished_at=now())
        return STOP if job.task.on_error == "fail" else GO_ON

    def _ended(self, job: Job, worker: str, done: Done) -> None:
        with writing(self.engine) as connection:
            self._check_mine(connection, job, worker)
            if done.write:
                done.write(connection)
            _set_task(
                connection,
                job.run["id"],
                job.task.id,
                state="running" if done.open else "done",
                reason=done.reason,
                output=done.output,
                algorithm_seconds=done.algorithm_seconds,
                finished_at=None if done.open else now(),
            )

    def _check_mine(self, connection: sa.Connection, job: Job, worker: str) -> None:
        row = run_row(connection, job.run["id"])
        if row["worker"] != worker or row["state"] != "running":
            raise LostRun()


def _retryable(error: CaregridError) -> bool:
    if isinstance(error, RuntimeFailure):
        return error.retryable
    return not isinstance(error, ResultInvalid | LostRun)


def where(error: BaseException) -> str:
    """File and line an error came from; its message may hold what it should not, so it is not logged."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def _key(run_id: str, task_id: str) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    return task.c.run_id == run_id, task.c.task_id == task_id


def _set_task(connection: sa.Connection, run_id: str, task_id: str, **values: Any) -> None:
    connection.execute(task.update().where(*_key(run_id, task_id)).values(**values))


def _stands(connection: sa.Connection, run_id: str) -> dict[str, TaskStand]:
    query = sa.select(task.c.task_id, task.c.state, task.c.output).where(task.c.run_id == run_id)
    return {row.task_id: TaskStand(row.state, row.output or {}) for row in connection.execute(query)}
