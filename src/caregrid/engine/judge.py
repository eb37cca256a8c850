"""Every workflow judged for every complete study; the verdicts, the runs and their queueing in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import pydicom
import sqlalchemy as sa

from caregrid.domain.study import InstanceRef, StudyRef
from caregrid.domain.workflow import Verdict, Workflow
from caregrid.engine.conditions import Headers
from caregrid.engine.workflows import judge as judge_workflow
from caregrid.engine.workflows import parse_workflow, priority_of, topological_order
from caregrid.errors import RegistryError, WorkflowUnknown
from caregrid.registry.registry import Registry
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.studies import load_study, move_study, run_id, settle_study, study_row
from caregrid.store.tables import now, run, task, verdict, workflow_revision


class Enqueues(Protocol):
    """What judging asks of the durable queue."""

    def enqueue(self, connection: sa.Connection, run_id: str, round_number: int, priority: str) -> None:
        """Put a round of a run on the queue within the transaction."""


def read_header(ref: InstanceRef) -> pydicom.Dataset:
    """The instance's header, pixels left out."""
    return pydicom.dcmread(ref.path, stop_before_pixels=True, force=True)


def cached_headers(most: int | None = None) -> Headers:
    """``read_header`` that reads each file once; ``most`` bounds how many it remembers, for work over many studies."""
    return lru_cache(maxsize=most)(read_header)


@lru_cache(maxsize=128)
def _parsed(text: str, file: str) -> Workflow:
    """A stored revision never changes, and a run asks for its own at every task."""
    return parse_workflow(text, file)


def active_workflows(connection: sa.Connection) -> list[Workflow]:
    """The active revision of every workflow, by name. A stored revision was validated when it was added."""
    query = sa.select(workflow_revision).where(workflow_revision.c.active).order_by(workflow_revision.c.name)
    return [_parsed(row.source_text, f"{row.name}@{row.revision}") for row in connection.execute(query)]


def add_workflow(engine: sa.Engine, text: str, file: str, who: str, why: str) -> Workflow:
    """Validate a workflow and make it the active revision of its name. Raises WorkflowInvalid."""
    workflow = parse_workflow(text, file)
    with writing(engine) as connection:
        same = workflow_revision.c.name == workflow.name
        connection.execute(workflow_revision.update().where(same).values(active=False))
        known = connection.scalar(sa.select(sa.func.count()).where(same, workflow_revision.c.revision == workflow.revision))
        if known:
            connection.execute(
                workflow_revision.update().where(same, workflow_revision.c.revision == workflow.revision).values(active=True)
            )
        else:
            connection.execute(
                workflow_revision.insert().values(
                    name=workflow.name, revision=workflow.revision, source_text=text, active=True, who=who, why=why, at=now()
                )
            )
        audit.append(
            connection,
            who=who,
            what="workflow activated",
            subject=f"workflow:{workflow.name}",
            why=why,
            detail={"revision": workflow.revision},
        )
    return workflow


def retire_workflow(engine: sa.Engine, name: str, who: str, why: str) -> None:
    """No new run of the workflow starts; runs under way go on. Raises WorkflowUnknown."""
    with writing(engine) as connection:
        changed = connection.execute(
            workflow_revision.update().where(workflow_revision.c.name == name, workflow_revision.c.active).values(active=False)
        )
        if changed.rowcount == 0:
            raise WorkflowUnknown(name=name)
        audit.append(connection, who=who, what="workflow retired", subject=f"workflow:{name}", why=why)


def pinned_workflow(connection: sa.Connection, name: str, revision: str) -> Workflow:
    """The revision a run started with, active or not. Raises WorkflowUnknown."""
    text = connection.scalar(
        sa.select(workflow_revision.c.source_text).where(
            workflow_revision.c.name == name, workflow_revision.c.revision == revision
        )
    )
    if text is None:
        raise WorkflowUnknown(name=f"{name}@{revision}")
    return _parsed(text, f"{name}@{revision}")


def off_peak_now(hours: tuple[int, int], moment: datetime | None = None) -> bool:
    """Whether the local time lies in the off-peak hours (from–to, over midnight if from > to)."""
    hour = (moment or datetime.now().astimezone()).hour
    start, end = hours
    return start <= hour < end if start <= end else hour >= start or hour < end


class Judge:
    """Judges complete studies and starts their runs."""

    def __init__(
        self,
        engine: sa.Engine,
        folder: Path,
        registry: Registry,
        queue: Enqueues,
        source_names: Callable[[str], Collection[str]] = lambda _ae: (),
        off_peak: tuple[int, int] = (19, 7),
    ) -> None:
        self.engine, self.folder, self.registry = engine, folder, registry
        self.queue, self.source_names, self.off_peak = queue, source_names, off_peak
        self._released: set[tuple[str, int]] = set()

    def study_closed(self, study_instance_uid: str) -> list[Verdict]:
        """Judge one complete study; in one transaction its verdicts, runs and queue entries, or nothing."""
        with reading(self.engine) as connection:
            study = load_study(connection, self.folder, study_instance_uid)
            workflows = active_workflows(connection)
        headers = cached_headers()
        names = self.source_names(study.source.calling_ae)
        judged = [(flow, judge_workflow(flow, study, headers, names)) for flow in workflows]
        with writing(self.engine) as connection:
            row = study_row(connection, study_instance_uid)
            if row["state"] != "complete" or row["generation"] != study.generation:
                return []
            self._write(connection, study, judged, headers)
        return [each for _, each in judged]

    def _write(
        self, connection: sa.Connection, study: StudyRef, judged: list[tuple[Workflow, Verdict]], headers: Headers
    ) -> None:
        uid = study.study_instance_uid
        for _, each in judged:
            self._write_verdict(connection, study, each)
        applying = [flow for flow, each in judged if each.applies]
        if not applying:
            why = "no workflow is active" if not judged else f"none of {len(judged)} workflows applies; see the verdicts"
            move_study(connection, uid, "no-workflow", who="caregrid", why=why)
            return
        move_study(connection, uid, "processing", who="caregrid", why=f"{len(applying)} of {len(judged)} workflows apply")
        for flow in applying:
            self._start_run(connection, study, flow, headers)
        settle_study(connection, uid)

    def _write_verdict(self, connection: sa.Connection, study: StudyRef, each: Verdict) -> None:
        key = (
            verdict.c.study_instance_uid == study.study_instance_uid,
            verdict.c.generation == study.generation,
            verdict.c.workflow == each.workflow,
        )
        connection.execute(verdict.delete().where(*key))
        connection.execute(
            verdict.insert().values(
                study_instance_uid=study.study_instance_uid,
                generation=study.generation,
                workflow=each.workflow,
                revision=each.revision,
                applies=each.applies,
                reason=each.reason,
                trail=list(each.trail),
                at=now(),
            )
        )

    def _start_run(self, connection: sa.Connection, study: StudyRef, flow: Workflow, headers: Headers) -> None:
        key = run_id(study.study_instance_uid, study.generation, flow.name)
        if connection.scalar(sa.select(run.c.id).where(run.c.id == key)):
            return
        models, problem = self._pin_models(flow)
        priority = priority_of(flow, study, headers)
        connection.execute(
            run.insert().values(
                id=key,
                study_instance_uid=study.study_instance_uid,
                generation=study.generation,
                workflow=flow.name,
                revision=flow.revision,
                models=models,
                priority=priority,
                state="failed" if problem else "queued",
                state_reason=problem,
                created_at=now(),
            )
        )
        for position, each in enumerate(topological_order(flow)):
            connection.execute(
                task.insert().values(
                    run_id=key,
                    task_id=each.id,
                    kind=each.kind,
                    position=position,
                    state="waiting",
                    model_digest=models.get(each.id, ""),
                )
            )
        audit.append(
            connection,
            who="caregrid",
            what="run failed" if problem else "run queued",
            subject=f"run:{key}",
            why=problem or "the workflow applies to the study",
            detail={"workflow": flow.name, "revision": flow.revision, "models": models, "priority": priority},
        )
        if not problem and (priority != "off-peak" or off_peak_now(self.off_peak)):
            self.queue.enqueue(connection, key, 0, priority)

    def _pin_models(self, flow: Workflow) -> tuple[dict[str, str], str]:
        models: dict[str, str] = {}
        for each in flow.tasks:
            if each.kind == "run":
                try:
                    models[each.id] = self.registry.resolve(each.options["algorithm"], each.options.get("version", "")).digest
                except RegistryError as error:
                    return models, f"task {each.id}: {error.message}"
        return models, ""

    def release_off_peak(self) -> int:
        """In off-peak hours, queue the off-peak runs that wait for them; returns how many were found waiting."""
        if not off_peak_now(self.off_peak):
            return 0
        query = sa.select(run.c.id, run.c.round).where(run.c.state == "queued", run.c.priority == "off-peak", run.c.attempts == 0)
        with reading(self.engine) as connection:
            rows = connection.execute(query).all()
        # Queued once is enough: the same runs are found at every look until a worker begins them.
        waiting = {(row.id, row.round) for row in rows}
        new = waiting - self._released
        if new:
            with writing(self.engine) as connection:
                for key, round_number in sorted(new):
                    self.queue.enqueue(connection, key, round_number, "off-peak")
        self._released = waiting
        return len(rows)
