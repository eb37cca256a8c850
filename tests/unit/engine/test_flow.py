"""A run carried out task by task: order, retries, crashes, takeover, cancellation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from caregrid.engine.flow import Done, Job, RunFlow
from caregrid.engine.judge import add_workflow
from caregrid.engine.runs import cancel, retry
from caregrid.engine.workflows import topological_order
from caregrid.errors import AlgorithmFailed, AlgorithmTimedOut, TransitionRefused, VolumeRefused
from caregrid.store.database import reading, writing
from caregrid.store.studies import run_row
from caregrid.store.tables import run, task
from tests.support.inline_queue import InlineQueue
from tests.support.rows import put_run, put_study, state_of

FLOW = """\
workflow: w
description: test
owner: tests@caregrid.example
priority: routine
tasks:
  - {id: a, kind: run, algorithm: x, retry: {attempts: 3, backoff: 2s}}
  - {id: b, kind: run, algorithm: x, after: [a]}
  - {id: send, kind: deliver, results: [b], formats: [dicom_sr], destinations: [PACS]}
"""


class Work:
    """Does tasks as a test tells it: a list of steps per task, each an exception to raise or an output."""

    def __init__(self) -> None:
        self.steps: dict[str, list[object]] = {}
        self.did: list[str] = []

    def __call__(self, job: Job) -> Done:
        self.did.append(job.task.id)
        steps = self.steps.get(job.task.id)
        step = steps.pop(0) if steps else {}
        if isinstance(step, BaseException):
            raise step
        if callable(step):
            step()
            step = {}
        assert isinstance(step, dict)
        return Done(step)


Setup = tuple[sa.Engine, str, Work, RunFlow, InlineQueue]


@pytest.fixture
def setup(db: sa.Engine) -> Setup:
    workflow = add_workflow(db, FLOW, "w.yaml", "test", "test")
    put_study(db, "1.2.3", state="processing")
    key = put_run(db, "1.2.3", "w", revision=workflow.revision)
    with writing(db) as connection:
        for position, each in enumerate(topological_order(workflow)):
            connection.execute(
                task.insert().values(run_id=key, task_id=each.id, kind=each.kind, position=position, state="waiting")
            )
    work = Work()
    flow = RunFlow(db, {"run": work, "deliver": work}, max_crashes=3)
    queue = InlineQueue(flow)
    with writing(db) as connection:
        queue.enqueue(connection, key, 0, "routine")
    return db, key, work, flow, queue


def tasks(db: sa.Engine, key: str) -> dict[str, tuple[str, int]]:
    with reading(db) as connection:
        found = connection.execute(sa.select(task.c.task_id, task.c.state, task.c.attempts).where(task.c.run_id == key))
        return {row.task_id: (row.state, row.attempts) for row in found}


def state(db: sa.Engine, key: str) -> str:
    with reading(db) as connection:
        return str(run_row(connection, key)["state"])


def test_goes_through_in_order_and_is_done(setup: Setup) -> None:
    db, key, work, _, queue = setup
    assert queue.drain() == 1
    assert work.did == ["a", "b", "send"]
    assert state(db, key) == "done"
    assert state_of(db, "1.2.3") == "done"


def test_retries_with_backoff_then_goes_on(setup: Setup) -> None:
    db, key, work, flow, _ = setup
    failing = AlgorithmFailed(name="x", version="1", reason="r")
    work.steps["a"] = [failing, failing, {}]
    flow.begin(key, 0, "w1")
    pauses = [flow.perform(key, "a", "w1") for _ in range(3)]
    assert pauses == [{"next": "pause", "seconds": 2.0}, {"next": "pause", "seconds": 4.0}, {"next": "go on"}]
    assert tasks(db, key)["a"] == ("done", 3)


def test_fails_after_the_last_attempt_and_what_follows_does_not_run(setup: Setup) -> None:
    db, key, work, _, queue = setup
    work.steps["a"] = [AlgorithmTimedOut(name="x", version="1", seconds=5)] * 3
    queue.drain()
    assert work.did == ["a", "a", "a"]
    assert state(db, key) == "failed"
    assert state_of(db, "1.2.3") == "failed"


def test_what_cannot_get_better_is_not_retried(setup: Setup) -> None:
    db, key, work, _, queue = setup
    work.steps["a"] = [VolumeRefused(code="gap", reason="2 slices are missing")]
    queue.drain()
    assert work.did == ["a"]
    assert state(db, key) == "failed"


def test_bug_in_a_task_fails_the_run_without_its_message(setup: Setup) -> None:
    db, key, work, _, queue = setup
    work.steps["a"] = [ValueError("DOE^JANE")]
    queue.drain()
    assert state(db, key) == "failed"
    with reading(db) as connection:
        reason = connection.scalar(sa.select(task.c.reason).where(task.c.run_id == key, task.c.task_id == "a"))
    assert reason.startswith("internal error ValueError at test_flow.py:")
    assert "DOE" not in reason


def test_performing_a_done_task_again_does_nothing(setup: Setup) -> None:
    _, key, work, flow, _ = setup
    flow.begin(key, 0, "w1")
    flow.perform(key, "a", "w1")
    assert flow.perform(key, "a", "w2") == {"next": "go on"}
    assert work.did == ["a"]


def test_crashed_task_is_done_again_by_another_worker(setup: Setup) -> None:
    db, key, work, flow, _ = setup
    flow.begin(key, 0, "w1")
    work.steps["a"] = [KeyboardInterrupt()]  # stands for the process's death: nothing after it is written
    with pytest.raises(KeyboardInterrupt):
        flow.perform(key, "a", "w1")
    assert tasks(db, key)["a"] == ("running", 1)
    assert flow.perform(key, "a", "w2") == {"next": "go on"}
    assert tasks(db, key)["a"] == ("done", 2)


def test_poison_is_parked_after_taking_workers_down(setup: Setup) -> None:
    db, key, work, flow, _ = setup
    flow.begin(key, 0, "w1")
    work.steps["a"] = [KeyboardInterrupt()] * 9
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            flow.perform(key, "a", "w1")
    assert flow.perform(key, "a", "w1") == {"next": "stop"}
    assert state(db, key) == "parked"
    assert len(work.did) == 3
    assert state_of(db, "1.2.3") == "failed"


def test_worker_that_lost_its_run_is_turned_away(setup: Setup) -> None:
    db, key, work, flow, _ = setup
    flow.begin(key, 0, "w1")

    def taken_over() -> None:
        with writing(db) as connection:
            connection.execute(run.update().values(worker="w2"))

    work.steps["a"] = [taken_over]
    with pytest.raises(Exception, match="taken over"):
        flow.perform(key, "a", "w1")
    assert tasks(db, key)["a"][0] == "running"


def test_cancelled_run_stops_at_the_next_task(setup: Setup) -> None:
    db, key, work, flow, queue = setup
    flow.begin(key, 0, "w1")
    flow.perform(key, "a", "w1")
    cancel(db, queue, key, "ann", "wrong patient")
    assert flow.perform(key, "b", "w1") == {"next": "stop"}
    assert work.did == ["a"]
    assert flow.finish(key, "w1") == "cancelled"
    assert state_of(db, "1.2.3") == "cancelled"


def test_retry_goes_on_where_it_stopped(setup: Setup) -> None:
    db, key, work, _, queue = setup
    work.steps["b"] = [AlgorithmFailed(name="x", version="1", reason="r")] * 3
    queue.drain()
    assert state(db, key) == "failed"
    work.did.clear()
    retry(db, queue, key, "ann", "mended")
    queue.drain()
    assert work.did == ["b", "send"]
    assert state(db, key) == "done"
    with pytest.raises(TransitionRefused):
        retry(db, queue, key, "ann", "again")


def test_old_round_is_not_carried_out(setup: Setup) -> None:
    db, key, work, flow, queue = setup
    cancel(db, queue, key, "ann", "stop")
    retry(db, queue, key, "ann", "go")
    assert flow.begin(key, 0, "w1") == []
    assert flow.begin(key, 1, "w1") == ["a", "b", "send"]


@pytest.mark.parametrize("change", [lambda flow, key: flow.perform(key, "a", "w1"), lambda flow, key: flow.finish(key, "w1")])
def test_nothing_happens_to_a_run_that_was_not_begun(setup: Setup, change: Callable[[RunFlow, str], object]) -> None:
    db, key, _, flow, queue = setup
    cancel(db, queue, key, "ann", "stop")
    change(flow, key)
    assert state(db, key) == "cancelled"
