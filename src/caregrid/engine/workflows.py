"""Workflows: a YAML file into a validated Workflow, and a Workflow judged on a study.

docs/reference/workflows.md is the language; every problem of a file is found at once, with its line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset

from caregrid.domain.study import InstanceRef, SeriesRef, Source, StudyRef
from caregrid.domain.workflow import Task, Trigger, Verdict, Workflow
from caregrid.engine import yaml_lines as lines
from caregrid.engine.attributes import attribute, read
from caregrid.engine.condition_reading import ConditionReader
from caregrid.engine.conditions import Headers, Scope, evaluate
from caregrid.engine.workflow_graph import connect, order
from caregrid.engine.workflow_reading import WORKFLOW_KEYS, TaskReader, read_name, read_priority, read_trigger
from caregrid.engine.workflow_warnings import warnings


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


# trying a workflow out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """What a workflow would have done: studies judged, those it applies to, and each verdict by Study Instance UID."""

    total: int
    would_fire: int
    verdicts: tuple[tuple[str, Verdict], ...]


def dry_run(workflow: Workflow, studies: Iterable[StudyRef], headers: Headers) -> DryRun:
    """Judge ``workflow`` on studies without running anything."""
    verdicts = tuple((study.study_instance_uid, judge(workflow, study, headers)) for study in studies)
    return DryRun(len(verdicts), sum(each.applies for _, each in verdicts), verdicts)


def test_file(workflow: Workflow, dataset: Dataset, called_ae: str = "", calling_ae: str = "") -> Verdict:  # noqa: PT028 - not a test
    """The verdict on a study made of this one object. Without AE titles the trigger is not judged.

    Conditions that count series or instances see one of each.
    """
    study = study_of_one(dataset, Source("dimse", calling_ae, called_ae, ""))
    if called_ae or calling_ae:
        return judge(workflow, study, lambda _: dataset)
    return _by_conditions(workflow, study, lambda _: dataset, ("trigger: not judged, no AE title was given",))


# pytest must not take the function for a test where it is imported.
test_file.__test__ = False  # type: ignore[attr-defined]


def study_of_one(dataset: Dataset, source: Source) -> StudyRef:
    """A study of one series with one instance, as one object alone would make."""
    meta = getattr(dataset, "file_meta", None) or Dataset()
    syntax, series_uid = _text_of(meta, "TransferSyntaxUID"), _text_of(dataset, "SeriesInstanceUID")
    instance = InstanceRef(
        _text_of(dataset, "SOPInstanceUID"), _text_of(dataset, "SOPClassUID"), series_uid, syntax, Path("one.dcm")
    )
    series = SeriesRef(series_uid, _text_of(dataset, "Modality"), _text_of(dataset, "SeriesDescription"), (instance,))
    return StudyRef(_text_of(dataset, "StudyInstanceUID"), 0, source, (series,))


def _text_of(dataset: Dataset, keyword: str) -> str:
    values = read(dataset, attribute(keyword)).values
    return str(values[0]) if values else ""


def explain(verdicts: Iterable[Verdict]) -> list[str]:
    """Verdicts as lines for people: each workflow with its reason, and under it every step that was judged."""
    found = []
    for each in sorted(verdicts, key=lambda verdict: (not verdict.applies, verdict.workflow)):
        found.append(f"{each.workflow} ({each.revision}) {'applies' if each.applies else 'does not apply'}: {each.reason}")
        found += [f"    {line}" for line in each.trail]
    return found


__all__ = [
    "DryRun",
    "dry_run",
    "explain",
    "judge",
    "parse_workflow",
    "priority_of",
    "revision_of",
    "study_of_one",
    "test_file",
    "topological_order",
    "trigger_missed",
    "warnings",
]
