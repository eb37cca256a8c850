"""Workflows: a YAML file into a validated Workflow, and a Workflow judged on a study.

docs/reference/workflows.md is the language; every problem of a file is found at once, with its line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

from caregrid.domain.study import Source, StudyRef
from caregrid.domain.workflow import Task, Trigger, Verdict, Workflow
from caregrid.engine import yaml_lines as lines
from caregrid.engine.condition_reading import ConditionReader
from caregrid.engine.conditions import Headers, Scope, evaluate
from caregrid.engine.workflow_graph import connect, order
from caregrid.engine.workflow_reading import WORKFLOW_KEYS, TaskReader, read_name, read_priority, read_trigger


def parse_workflow(text: str, file: str = "workflow.yaml") -> Workflow:
    """Read and validate a workflow. Raises WorkflowInvalid: file, line and reason of the first problem, and ``problems``."""
    root = lines.compose(text, file)
    problems = lines.Problems(file)
    entries = lines.pairs(root, "the workflow", problems, WORKFLOW_KEYS)
    name = read_name(entries, root, problems)
    head = {key: lines.text_of(_node(entries, key), key, problems) for key in ("description", "owner")}
    priority, priority_when = read_priority(_node(entries, "priority"), problems)
    trigger = read_trigger(_node(entries, "trigger"), problems)
    when = ConditionReader(problems).condition(_node(entries, "when"), "when")
    reader = TaskReader(problems)
    tasks = reader.tasks(_node(entries, "tasks"))
    if not tasks and not problems.found:
        problems.add(root, "the workflow has no tasks")
    connected = connect(tasks, reader.refs, problems)
    problems.raise_if_any()
    return Workflow(
        name=name,
        description=head["description"],
        owner=head["owner"],
        priority=priority,
        trigger=trigger,
        when=when,
        tasks=connected,
        revision=revision_of(text),
        source_text=text,
        priority_when=priority_when,
    )


def _node(entries: dict[str, tuple[lines.Node, lines.Node]], key: str) -> lines.Node | None:
    return entries[key][1] if key in entries else None


def revision_of(text: str) -> str:
    """The first 12 hexadecimal digits of the sha256 of a workflow's text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def topological_order(workflow: Workflow) -> tuple[Task, ...]:
    """The tasks, each after all it waits for; file order where that leaves a choice."""
    return order(workflow.tasks)


def judge(workflow: Workflow, study: StudyRef, headers: Headers, source_names: Collection[str] = ()) -> Verdict:
    """Whether ``workflow`` applies to ``study``: its trigger, then its conditions. ``headers`` gives an instance's data set.

    source_names: names the site gives the sender beside its AE title. The verdict's reason and trail hold no patient data.
    """
    missed = trigger_missed(workflow.trigger, study.source, source_names)
    if missed:
        return Verdict(workflow.name, workflow.revision, False, missed, (f"trigger: no: {missed}",))
    return _by_conditions(workflow, study, headers, ("trigger: yes",))


def _by_conditions(workflow: Workflow, study: StudyRef, headers: Headers, trail: tuple[str, ...]) -> Verdict:
    if workflow.when is None:
        return Verdict(workflow.name, workflow.revision, True, "the workflow has no conditions", trail)
    judged = evaluate(workflow.when, Scope(study, headers))
    return Verdict(workflow.name, workflow.revision, judged.holds, judged.reason, trail + judged.trail)


def priority_of(workflow: Workflow, study: StudyRef, headers: Headers) -> str:
    """The priority of a run on ``study``: the first conditional priority that holds, else the workflow's own."""
    for name, condition in workflow.priority_when:
        if evaluate(condition, Scope(study, headers)).holds:
            return name
    return workflow.priority


def trigger_missed(trigger: Trigger, source: Source, source_names: Collection[str] = ()) -> str:
    """Why the trigger does not take what came from ``source``; "" when it does. ``*`` and ``?`` match as in C-FIND."""
    senders = (source.calling_ae, *source_names)
    asked = (
        ("called AE", trigger.called_ae, (source.called_ae,)),
        ("source", trigger.source, senders),
        ("protocol", trigger.protocol, (source.protocol,)),
    )
    for what, wanted, there in asked:
        if wanted and not any(_like(value, each) for value in there for each in wanted):
            return f"{what} is {there[0] or 'unknown'}, not {' or '.join(wanted)}"
    return ""


def _like(value: str, wanted: str) -> bool:
    shape = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in wanted)
    return re.fullmatch(shape, value) is not None
