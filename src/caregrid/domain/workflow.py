"""A clinical workflow as data: when it applies to a study, and the tasks it runs. Parsed by caregrid.engine.workflows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PRIORITIES = ("emergency", "routine", "off-peak")
TASK_KINDS = ("select", "run", "branch", "join", "review", "deliver", "notify")
RESULT_FORMATS = ("dicom_seg", "dicom_sr", "dicom_sc")


@dataclass(frozen=True)
class Trigger:
    """Which arrivals a workflow looks at. An empty tuple means any."""

    called_ae: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    protocol: tuple[str, ...] = ()


@dataclass(frozen=True)
class Condition:
    """One node of a condition tree.

    op: ``all``, ``any``, ``not`` (children); ``study``, ``any_series``, ``all_series``, ``any_instance``, ``all_instances``
    (children are put to the study, or to a series or instance of it); ``result`` (tests on values of an earlier run task); a
    test: equals, not_equals, in, contains, matches, at_least, at_most, greater, less, before, after, present, absent; or
    ``one_value``, ``all_values`` (children are tests one value, or every value, of the attribute must pass together).
    attribute: DICOM keyword, tag or path, or result value name. value: decoded to the attribute's type. line: in the file.
    """

    op: str
    children: tuple[Condition, ...] = ()
    attribute: str = ""
    value: Any = None
    task: str = ""
    line: int = 0
    ignoring_case: bool = False


@dataclass(frozen=True)
class Retry:
    """How often a task is tried, and the first pause; the pause doubles each time."""

    attempts: int = 3
    backoff_seconds: float = 5.0


@dataclass(frozen=True)
class Task:
    """One task. ``after``: ids it waits for, those implied by its options too; ``branch.case`` for one case of a branch,
    ``review.accepted`` (corrected, rejected) for one decision of a review. on_error: fail (the run) or continue (without it).

    options by kind —
      select: series (Condition tree or None), choose (all|first|newest|most_instances), frames (tuple[int, ...] or None)
      run: algorithm, version ("" = newest active), input (select task id or "" = whole study), parameters (dict)
      branch: cases: tuple of (name, Condition); otherwise: name of the case taken when none holds
      join: wait_for (ids; goes on when all have ended and at least one was done)
      review: of (run task ids), roles, question (what the clinician is asked)
      deliver: results (run task ids), formats, destinations, only_if_accepted (bool)
      notify: channel (log|webhook), to, message
    """

    id: str
    kind: str
    after: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    timeout_seconds: float = 600.0
    retry: Retry = Retry()
    on_error: str = "fail"
    line: int = 0


@dataclass(frozen=True)
class Workflow:
    """A validated workflow. revision: sha256 of the source text (first 12 hex digits); runs are pinned to it.

    priority_when: (priority, condition) in the order they are tried; ``priority`` when none holds.
    """

    name: str
    description: str
    owner: str
    priority: str
    trigger: Trigger
    when: Condition | None
    tasks: tuple[Task, ...]
    revision: str
    source_text: str
    priority_when: tuple[tuple[str, Condition], ...] = ()

    def task(self, task_id: str) -> Task:
        """The task called ``task_id``; KeyError when there is none."""
        for task in self.tasks:
            if task.id == task_id:
                return task
        raise KeyError(task_id)


@dataclass(frozen=True)
class Verdict:
    """Whether a workflow applies to a study, and why: one line per condition judged, without patient data."""

    workflow: str
    revision: str
    applies: bool
    reason: str
    trail: tuple[str, ...] = ()
