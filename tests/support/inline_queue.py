"""The durable queue without its durability."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import sqlalchemy as sa

from caregrid.engine.durable import PRIORITY, Flow, flow_key


class InlineQueue:
    """Runs rounds in this process, one after the other, with no durability: for tests of the flow itself.

    Keeps the contract of Queue and Worker together (tests/slots/test_queue.py runs on both).
    """

    def __init__(self, flow: Flow | None = None) -> None:
        self.flow = flow
        self.waiting: list[tuple[int, int, str, int]] = []
        self._lock = threading.Lock()
        self._seen: set[str] = set()

    def enqueue(self, connection: sa.Connection, run_id: str, round_number: int, priority: str) -> None:
        """Remember the round; it is carried out by ``drain``."""
        with self._lock:
            key = flow_key(run_id, round_number)
            if key not in self._seen:
                self._seen.add(key)
                self.waiting.append((PRIORITY[priority], len(self._seen), run_id, round_number))

    def cancel(self, run_id: str, round_number: int) -> None:
        """Forget the round if it has not begun."""
        with self._lock:
            self.waiting = [each for each in self.waiting if each[2:] != (run_id, round_number)]

    def take_over(self, worker: str) -> list[str]:
        """Nothing survives a process, so nothing can be taken over."""
        return []

    def executors(self) -> Iterable[str]:
        """No other process holds work."""
        return ()

    def drain(self, worker: str = "inline") -> int:
        """Carry out everything waiting, most urgent first; returns how many rounds ran."""
        ran = 0
        while self.waiting:
            self.waiting.sort()
            _, _, run_id, round_number = self.waiting.pop(0)
            self._carry_out(run_id, round_number, worker)
            ran += 1
        return ran

    def _carry_out(self, run_id: str, round_number: int, worker: str) -> None:
        if self.flow is None:
            raise RuntimeError("an InlineQueue needs its flow before it can drain")
        for task_id in self.flow.begin(run_id, round_number, worker):
            answer = self.flow.perform(run_id, task_id, worker)
            while answer["next"] == "pause":
                answer = self.flow.perform(run_id, task_id, worker)
            if answer["next"] == "stop":
                break
        self.flow.finish(run_id, worker)

    def close(self) -> None:
        """Nothing to let go."""
