"""What is allowed in a workflow but probably not meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydicom.datadict import dictionary_VM

from caregrid.domain.workflow import Condition, Task, Workflow
from caregrid.engine.attributes import COUNTED, attribute
from caregrid.engine.conditions import LEVELS
from caregrid.engine.workflow_graph import ancestors, head

_CODE_STRING = re.compile(r"[A-Z0-9_ ]{0,16}\Z")
_LOWER, _UPPER = ("at_least", "greater", "after"), ("at_most", "less", "before")


def warnings(workflow: Workflow) -> list[str]:
    """One line each, with the line of the file it is about."""
    found = [*_about_head(workflow), *_about_graph(workflow)]
    for condition in _conditions(workflow):
        found += _never(condition)
    return list(dict.fromkeys(found))


def _about_head(workflow: Workflow) -> Iterator[str]:
    trigger = workflow.trigger
    if workflow.when is None and not (trigger.called_ae or trigger.source or trigger.protocol):
        yield "line 1: without trigger and when, the workflow applies to every study from every sender"
    if not workflow.owner:
        yield "line 1: the workflow has no owner to ask when it goes wrong"


def _conditions(workflow: Workflow) -> Iterator[Condition]:
    if workflow.when is not None:
        yield workflow.when
    yield from (condition for _, condition in workflow.priority_when)
    for task in workflow.tasks:
        if task.kind == "select" and task.options["series"] is not None:
            yield task.options["series"]
        if task.kind == "branch":
            yield from (condition for _, condition in task.options["cases"])


def _about_graph(workflow: Workflow) -> Iterator[str]:
    tasks = workflow.tasks
    edges = {task.id: task.after for task in tasks}
    used = {name for task in tasks for name in _uses(task)}
    named = {to for task in tasks for to in task.after}
    for task in tasks:
        if task.kind == "run" and task.id not in used:
            yield f"line {task.line}: the result of {task.id} is never delivered, reviewed or asked for"
        if task.kind == "select" and not any(other.options.get("input") == task.id for other in tasks):
            yield f"line {task.line}: no run task takes the series that {task.id} selects"
        if task.kind == "branch" and not any(head(to) == task.id for to in named):
            yield f"line {task.line}: nothing depends on what branch {task.id} decides"
        if task.kind == "deliver":
            yield from _unreviewed(task, tasks, ancestors([task.id], edges))


def _uses(task: Task) -> list[str]:
    named = [*task.options.get("results", ()), *task.options.get("of", ())]
    return named + [name for _, case in task.options.get("cases", ()) for name in _result_tasks(case)]


def _result_tasks(condition: Condition) -> Iterator[str]:
    if condition.op == "result":
        yield condition.task
    for child in condition.children:
        yield from _result_tasks(child)


def _unreviewed(deliver: Task, tasks: tuple[Task, ...], above: set[str]) -> Iterator[str]:
    for review in tasks:
        both = set(review.options.get("of", ())) & set(deliver.options["results"])
        if review.kind == "review" and both and review.id not in above:
            yield f"line {deliver.line}: {deliver.id} sends the result of {min(both)} without waiting for review {review.id}"


def _never(condition: Condition) -> Iterator[str]:
    """Tests no value can pass, alone or together with others on the same value."""
    if condition.op == "result":
        return
    for child in condition.children:
        yield from _never(child)
    if condition.op in ("equals", "in") and condition.attribute and not condition.ignoring_case:
        yield from _bad_code_strings(condition)
    if condition.op in ("one_value", "all_values"):
        yield from _clash(condition.attribute, condition.children, condition.line)
    if condition.op == "all" or condition.op in LEVELS:
        single: dict[str, list[Condition]] = {}
        for test in condition.children:
            if test.attribute and _single_valued(test.attribute):
                single.setdefault(test.attribute, []).extend(test.children or (test,))
        for name, tests in single.items():
            yield from _clash(name, tests, condition.line)


def _single_valued(name: str) -> bool:
    """Whether a header holds at most one value of it, so that two tests are about the same one."""
    attr = attribute(name)
    if name in COUNTED:
        return name != "ModalitiesInStudy"
    step = attr.steps[-1]
    return len(attr.steps) == 1 and attr.vr != "" and dictionary_VM(step.group << 16 | step.element) == "1"


def _bad_code_strings(test: Condition) -> Iterator[str]:
    code_string = attribute(test.attribute).vr == "CS"
    values = test.value if isinstance(test.value, tuple) else (test.value,)
    for value in values:
        if code_string and isinstance(value, str) and not _CODE_STRING.match(value):
            yield f"line {test.line}: {test.attribute} can never be {value}: code strings are upper case, at most 16 characters"


def _clash(name: str, tests: Any, line: int) -> Iterator[str]:
    allowed: set[Any] | None = None
    for test in tests:
        if test.op in ("equals", "in") and not test.ignoring_case:
            values = set(test.value) if test.op == "in" else {test.value}
            allowed = values if allowed is None else allowed & values
    low = max((test.value for test in tests if test.op in _LOWER), default=None)
    high = min((test.value for test in tests if test.op in _UPPER), default=None)
    if allowed is not None and not allowed:
        yield f"line {line}: {name} is asked to have two different values at once, which can never hold"
    elif low is not None and high is not None and low > high:
        yield f"line {line}: {name} is asked to be above {low} and below {high}, which can never hold"
    elif {"present", "absent"} <= {test.op for test in tests}:
        yield f"line {line}: {name} is asked to be present and absent, which can never hold"
