"""The promise of the durable queue, run on the real one (SQLite and PostgreSQL) and on the in-process one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from caregrid.engine.durable import Queue, prepare_schema
from caregrid.store.database import open_engine, writing
from caregrid.store.migrate import migrate
from tests.support.inline_queue import InlineQueue

WORKER = """
import sys, time
import sqlalchemy as sa
from caregrid.engine.durable import Worker
from caregrid.store.database import open_engine, writing

engine = open_engine(sys.argv[1])
hold = float(sys.argv[3])

class Flow:
    def note(self, what, run_id, worker):
        with writing(engine) as c:
            c.execute(sa.text("insert into ledger (what, run, worker, at) values (:w, :r, :k, :t)"),
                      {"w": what, "r": run_id, "k": worker, "t": time.time()})
    def begin(self, run_id, round_number, worker):
        self.note("begin", run_id, worker)
        return ["a", "b"]
    def perform(self, run_id, task_id, worker):
        self.note("start " + task_id, run_id, worker)
        time.sleep(hold)
        self.note("end " + task_id, run_id, worker)
        return {"next": "go on"}
    def finish(self, run_id, worker):
        self.note("finish", run_id, worker)
        return "done"

Worker(engine, Flow(), sys.argv[2], slots=1, poll_seconds=0.1).start()
print("ready", flush=True)
time.sleep(120)
"""


class Real:
    """The durable queue with its workers as real processes."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.engine = open_engine(url)
        migrate(self.engine)
        prepare_schema(self.engine)
        with writing(self.engine) as connection:
            connection.execute(sa.text("create table ledger (what text, run text, worker text, at float)"))
        self.queue = Queue(self.engine)
        self.processes: list[subprocess.Popen[str]] = []

    def worker(self, name: str, hold: float = 0.0) -> subprocess.Popen[str]:
        script = self.folder / "worker.py"
        script.write_text(textwrap.dedent(WORKER))
        process = subprocess.Popen(
            [sys.executable, str(script), self.url, name, str(hold)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        self.processes.append(process)
        return process

    def ledger(self, what: str = "") -> list[Any]:
        with self.engine.connect() as connection:
            found = connection.execute(sa.text("select what, run, worker from ledger order by at")).all()
        return [row for row in found if not what or row.what == what]

    def wait(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"did not come about; ledger: {self.ledger()}"
            time.sleep(0.05)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.queue.close()
        self.engine.dispose()


@pytest.fixture
def real(database_url: str, tmp_path: Path) -> Iterator[Real]:
    made = Real(database_url, tmp_path)
    yield made
    made.close()


def put(real: Real, run_id: str, priority: str = "routine", round_number: int = 0) -> None:
    with writing(real.engine) as connection:
        real.queue.enqueue(connection, run_id, round_number, priority)


def test_rolled_back_enqueue_never_runs_and_a_repeated_one_runs_once(real: Real) -> None:
    with pytest.raises(RuntimeError), writing(real.engine) as connection:
        real.queue.enqueue(connection, "ghost", 0, "routine")
        raise RuntimeError
    put(real, "r1")
    put(real, "r1")
    real.worker("w1")
    real.wait(lambda: len(real.ledger("finish")) == 1)
    time.sleep(0.5)
    assert [row.run for row in real.ledger("begin")] == ["r1"]


def test_emergency_overtakes_what_waits_and_does_not_wait_for_what_runs(real: Real) -> None:
    for number in range(4):
        put(real, f"routine{number}")
    real.worker("w1", hold=0.4)
    real.wait(lambda: len(real.ledger("start a")) >= 1)
    put(real, "emergency", "emergency")
    real.wait(lambda: any(row.run == "emergency" for row in real.ledger("finish")))
    finished = [row.run for row in real.ledger("finish")]
    assert finished.index("emergency") <= 1


def test_survivor_finishes_a_killed_workers_run_from_where_it_was(real: Real) -> None:
    put(real, "r1")
    victim = real.worker("w1", hold=1.0)
    real.wait(lambda: any(row.what == "start b" for row in real.ledger()))
    victim.kill()
    victim.wait()
    real.worker("w2")
    assert set(real.queue.executors()) == {"w1"}
    assert real.queue.take_over("w1") == ["r1:0"]
    real.wait(lambda: len(real.ledger("finish")) == 1)
    assert [row.worker for row in real.ledger("end a")] == ["w1"], "a step that was done is not done again"
    assert [row.worker for row in real.ledger("end b")] == ["w2"]


def test_two_workers_share_the_work(real: Real) -> None:
    for number in range(6):
        put(real, f"r{number}")
    real.worker("w1", hold=0.2)
    real.worker("w2", hold=0.2)
    real.wait(lambda: len(real.ledger("finish")) == 6)
    assert sorted(row.run for row in real.ledger("begin")) == [f"r{number}" for number in range(6)]
    assert {row.worker for row in real.ledger("begin")} == {"w1", "w2"}


def test_cancelled_round_does_not_begin(real: Real) -> None:
    put(real, "r1")
    real.queue.cancel("r1", 0)
    put(real, "r2")
    real.worker("w1")
    real.wait(lambda: len(real.ledger("finish")) == 1)
    time.sleep(0.5)
    assert [row.run for row in real.ledger("begin")] == ["r2"]


class Noted:
    def __init__(self) -> None:
        self.ran: list[str] = []

    def begin(self, run_id: str, round_number: int, worker: str) -> list[str]:
        self.ran.append(f"{run_id}:{round_number}")
        return ["a"]

    def perform(self, run_id: str, task_id: str, worker: str) -> dict[str, Any]:
        return {"next": "go on"}

    def finish(self, run_id: str, worker: str) -> str:
        return "done"


def test_in_process_queue_keeps_the_same_promise(db: sa.Engine) -> None:
    flow = Noted()
    queue = InlineQueue(flow)
    with writing(db) as connection:
        queue.enqueue(connection, "routine", 0, "routine")
        queue.enqueue(connection, "routine", 0, "routine")
        queue.enqueue(connection, "gone", 0, "routine")
        queue.enqueue(connection, "emergency", 0, "emergency")
    queue.cancel("gone", 0)
    assert queue.drain() == 2
    assert flow.ran == ["emergency:0", "routine:0"]
