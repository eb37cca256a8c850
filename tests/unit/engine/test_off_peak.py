"""Off-peak runs are queued when their hours begin, once, and not before."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from caregrid.engine.judge import Judge, off_peak_now
from caregrid.registry.registry import Registry
from tests.support.rows import put_run, put_study


class Counting:
    """A queue that counts what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, int, str]] = []

    def enqueue(self, connection: sa.Connection, run_id: str, round_number: int, priority: str) -> None:
        self.given.append((run_id, round_number, priority))


@pytest.mark.parametrize(
    ("hours", "hour", "off_peak"),
    [((19, 7), 20, True), ((19, 7), 6, True), ((19, 7), 7, False), ((19, 7), 12, False), ((1, 5), 3, True), ((1, 5), 5, False)],
)
def test_hours_go_over_midnight(hours: tuple[int, int], hour: int, off_peak: bool) -> None:
    assert off_peak_now(hours, datetime(2026, 1, 1, hour)) is off_peak


def judge(db: sa.Engine, tmp_path: Path, queue: Counting, hours: tuple[int, int]) -> Judge:
    return Judge(db, tmp_path, Registry(db, tmp_path / "models"), queue, off_peak=hours)


def test_waiting_runs_are_queued_once_however_often_looked(db: sa.Engine, tmp_path: Path) -> None:
    put_study(db, "1.2.3", state="processing")
    key = put_run(db, "1.2.3", "night", priority="off-peak")
    put_run(db, "1.2.3", "day", priority="routine")
    queue = Counting()
    always = judge(db, tmp_path, queue, (0, 24))
    assert [always.release_off_peak() for _ in range(3)] == [1, 1, 1]
    assert queue.given == [(key, 0, "off-peak")]


def test_nothing_is_queued_in_peak_hours(db: sa.Engine, tmp_path: Path) -> None:
    put_study(db, "1.2.3", state="processing")
    put_run(db, "1.2.3", "night", priority="off-peak")
    queue = Counting()
    assert judge(db, tmp_path, queue, (0, 0)).release_off_peak() == 0
    assert queue.given == []
