"""Which task of a run may go: a pure reading of the workflow and the tasks' states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from caregrid.domain.workflow import Task, Workflow

ENDED = frozenset({"done", "failed", "skipped", "cancelled"})


@dataclass(frozen=True)
class TaskStand:
    """Where a task stands: its state and what it put out."""

    state: str
    output: dict[str, Any]


@dataclass(frozen=True)
class Readiness:
    """ready, blocked (something before it has not ended) or skip, and why."""

    action: str
    reason: str = ""


def readiness(task: Task, stands: Mapping[str, TaskStand]) -> Readiness:
    """Whether ``task`` may go now."""
    if task.kind == "join":
        return _join(task, stands)
    for needed in task.after:
        answer = _edge(task, needed, stands)
        if answer.action != "ready":
            return answer
    return Readiness("ready")


def _edge(task: Task, needed: str, stands: Mapping[str, TaskStand]) -> Readiness:
    name, _, case = needed.partition(".")
    stand = stands[name]
    if stand.state not in ENDED:
        return Readiness("blocked", f"waits for {name}")
    if stand.state != "done":
        return Readiness("skip", f"{name} was {stand.state}")
    taken = stand.output.get("case") or stand.output.get("decision")
    if case and taken != case:
        return Readiness("skip", f"{name} took {taken}, not {case}")
    if not case and stand.output.get("decision") == "rejected":
        return Readiness("skip", f"{name} was rejected by a clinician")
    return Readiness("ready")


def _join(task: Task, stands: Mapping[str, TaskStand]) -> Readiness:
    answers = [_edge(task, needed, stands) for needed in task.options["wait_for"]]
    if any(answer.action == "blocked" for answer in answers):
        return next(answer for answer in answers if answer.action == "blocked")
    if any(answer.action == "ready" for answer in answers):
        return Readiness("ready")
    return Readiness("skip", "; ".join(answer.reason for answer in answers))


def outcome(workflow: Workflow, stands: Mapping[str, TaskStand]) -> tuple[str, str]:
    """What a run is when nothing more can go: failed, awaiting-review or done, and why."""
    failed = [task.id for task in workflow.tasks if stands[task.id].state == "failed" and task.on_error == "fail"]
    if failed:
        return "failed", f"task {', '.join(failed)} failed"
    open_reviews = [task.id for task in workflow.tasks if task.kind == "review" and stands[task.id].state == "running"]
    if open_reviews:
        return "awaiting-review", f"a clinician decides on {', '.join(open_reviews)}"
    return "done", "every task has ended"
