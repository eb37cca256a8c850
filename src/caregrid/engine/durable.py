"""The durable queue and executor: the only file that knows DBOS.

What caregrid asks of it: enqueue in the caller's own transaction; run a flow's steps once each, as far as that is
possible, and again after a crash; let another worker take over a dead one's runs; never let a paused worker's late
answer count. The record of clinical state is in caregrid's own tables; DBOS keeps only run ids.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer

# Histories name the version they were made under. It is pinned, and flows are registered by name (run_v1, run_v2 …), because a
# hash of the source would strand every run in flight at each edit.
APPLICATION_VERSION = "caregrid-1"
FLOW = "run_v1"
SCHEMA = "dbos"

#: Emergency runs have slots of their own, so they never wait behind routine work.
QUEUES = {"emergency": "emergency", "routine": "runs", "off-peak": "runs"}
PRIORITY = {"emergency": 1, "routine": 10, "off-peak": 100}


class Flow(Protocol):
    """What a worker carries out. Every method is called as a durable step: its answer is kept, JSON only."""

    def begin(self, run_id: str, round_number: int, worker: str) -> list[str]:
        """Note that ``worker`` begins the run; the task ids in order, empty when there is nothing to do."""

    def perform(self, run_id: str, task_id: str, worker: str) -> dict[str, Any]:
        """Do one task; ``{"next": "go on"|"pause"|"stop", "seconds": …}``."""

    def finish(self, run_id: str, worker: str) -> str:
        """Settle the run's state."""


def prepare_schema(engine: sa.Engine) -> None:
    """Make or upgrade the queue's own tables."""
    DBOS.migrate(engine.url.render_as_string(hide_password=False), schema=SCHEMA)


def flow_key(run_id: str, round_number: int) -> str:
    """The durable id of one round of a run."""
    return f"{run_id}:{round_number}"


class Queue:
    """The sending side: any process may put a run on the queue inside its own transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self._client = DBOSClient(
            system_database_engine=engine, dbos_system_schema=SCHEMA, serializer=DBOSPortableJSONSerializer(), lazy=True
        )

    def enqueue(self, connection: sa.Connection, run_id: str, round_number: int, priority: str) -> None:
        """Enqueue one round of a run; putting the same round twice changes nothing."""
        self._client.enqueue_in_transaction(
            connection,
            {
                "workflow_name": FLOW,
                "queue_name": QUEUES[priority],
                "workflow_id": flow_key(run_id, round_number),
                "app_version": APPLICATION_VERSION,
                "priority": PRIORITY[priority],
            },
            run_id,
            round_number,
        )

    def cancel(self, run_id: str, round_number: int) -> None:
        """Stop a round at its next step; the algorithm itself is stopped by its runner."""
        self._client.cancel_workflow(flow_key(run_id, round_number))

    def take_over(self, worker: str) -> list[str]:
        """Put every run that ``worker`` had begun back on its queue; returns their keys.

        DBOS itself recovers a dead executor's work only when that same executor starts again.
        """
        held = self._client.list_workflows(status="PENDING", executor_id=worker, load_input=False, load_output=False)
        by_queue: dict[str, list[str]] = {}
        for each in held:
            by_queue.setdefault(each.queue_name or QUEUES["routine"], []).append(each.workflow_id)
        for queue, keys in by_queue.items():
            self._client.resume_workflows(keys, queue_name=queue)
        return [key for keys in by_queue.values() for key in keys]

    def executors(self) -> set[str]:
        """Workers that hold begun runs."""
        held = self._client.list_workflows(status="PENDING", load_input=False, load_output=False)
        return {each.executor_id for each in held if each.executor_id}

    def close(self) -> None:
        """Let the client's resources go; the engine stays the caller's."""
        self._client.destroy()


class Worker:
    """The carrying-out side: one per process. ``slots`` runs at once, and as many emergency runs beside them."""

    def __init__(self, engine: sa.Engine, flow: Flow, worker: str, slots: int, poll_seconds: float) -> None:
        self._engine, self._flow, self._name = engine, flow, worker
        self._slots, self._poll = slots, poll_seconds

    def start(self) -> None:
        """Begin taking runs from the queues."""
        logging.getLogger("dbos").setLevel(logging.ERROR)
        config: DBOSConfig = {
            "name": "caregrid",
            "system_database_engine": self._engine,
            "system_database_url": self._engine.url.render_as_string(hide_password=False),
            "executor_id": self._name,
            "application_version": APPLICATION_VERSION,
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "ERROR",
            "run_migrations": False,
            "use_listen_notify": self._engine.dialect.name == "postgresql",
            "dbos_system_schema": SCHEMA,
        }
        DBOS(config=config)
        self._register()
        DBOS.launch()
        for queue, poll in ((QUEUES["emergency"], self._poll / 2), (QUEUES["routine"], self._poll)):
            DBOS.register_queue(queue, worker_concurrency=self._slots, polling_interval_sec=poll, on_conflict="always_update")

    def _register(self) -> None:
        flow, worker = self._flow, self._name

        @DBOS.step(name="begin")
        def begin(run_id: str, round_number: int) -> list[str]:
            return flow.begin(run_id, round_number, worker)

        @DBOS.step(name="perform")
        def perform(run_id: str, task_id: str) -> dict[str, Any]:
            return flow.perform(run_id, task_id, worker)

        @DBOS.step(name="finish")
        def finish(run_id: str) -> str:
            return flow.finish(run_id, worker)

        @DBOS.workflow(name=FLOW)
        def run_v1(run_id: str, round_number: int) -> str:
            for task_id in begin(run_id, round_number):
                answer = perform(run_id, task_id)
                while answer["next"] == "pause":
                    DBOS.sleep(answer["seconds"])
                    answer = perform(run_id, task_id)
                if answer["next"] == "stop":
                    break
            return finish(run_id)

    def stop(self, grace_seconds: int = 20) -> None:
        """Take nothing new, let running steps end, and leave."""
        DBOS.destroy(workflow_completion_timeout_sec=grace_seconds)
