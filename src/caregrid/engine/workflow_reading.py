"""Workflow files read into tasks: every key checked, references noted with their lines for the graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from caregrid.domain.roles import ACTIONS
from caregrid.domain.workflow import PRIORITIES, RESULT_FORMATS, TASK_KINDS, Condition, Retry, Task, Trigger
from caregrid.engine import yaml_lines as lines
from caregrid.engine.attributes import did_you_mean
from caregrid.engine.condition_reading import ConditionReader
from caregrid.engine.conditions import CHOICES
from caregrid.engine.yaml_lines import Node, Problems

PROTOCOLS = ("dimse", "dicomweb", "folder")
CHANNELS = ("log", "webhook")
ON_ERROR = ("fail", "continue")
WORKFLOW_KEYS = ("workflow", "description", "owner", "priority", "trigger", "when", "tasks")
COMMON_KEYS = ("id", "kind", "after", "timeout", "retry", "on_error")
KEYS_BY_KIND = {
    "select": ("series", "choose", "frames"),
    "run": ("algorithm", "version", "input", "parameters"),
    "branch": ("cases", "otherwise"),
    "join": ("wait_for",),
    "review": ("of", "roles", "question"),
    "deliver": ("results", "formats", "destinations", "only_if_accepted"),
    "notify": ("channel", "to", "message"),
}
#: How long a task may take unless it says so. A review waits for a person.
TIMEOUTS = {"run": 600.0, "review": 7 * 86400.0}

LONGEST_SECONDS = 30 * 86400.0
MOST_TASKS = 200
MOST_FRAMES = 10_000

_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}\Z")
_ID = re.compile(r"[a-z][a-z0-9_-]{0,39}\Z")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)?\Z")
_UNIT_SECONDS = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FRAMES = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?\Z")


@dataclass(frozen=True)
class Ref:
    """A task named by another: by, to (``task`` or ``task.case``), the key it stands under, and the line."""

    by: str
    to: str
    role: str
    line: int


Entries = dict[str, tuple[Node, Node]]


def _value(entries: Entries, key: str) -> Node | None:
    return entries[key][1] if key in entries else None


def _choices(node: Node | None, what: str, choices: tuple[str, ...], problems: Problems) -> tuple[str, ...]:
    """One or several of ``choices``, each once."""
    for item in lines.items(node):
        value = lines.text_of(item, what, problems)
        if value and value not in choices:
            hint = did_you_mean(value, choices) or f"; known are: {', '.join(choices)}"
            problems.add(item, f"unknown {what} {value}{hint}")
    return tuple(dict.fromkeys(each for each in lines.texts_of(node, what, problems) if each in choices))


class TaskReader:
    """Reads the tasks of one file; ``refs`` are the references found on the way."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.refs: list[Ref] = []

    def tasks(self, node: Node | None) -> list[Task]:
        """The tasks in file order; what cannot be read at all is left out and noted."""
        found: list[Task] = []
        if node is not None and not isinstance(node, yaml.SequenceNode):
            self.problems.add(node, "tasks must be a list")
            return found
        nodes = lines.items(node)
        if len(nodes) > MOST_TASKS:
            self.problems.add(nodes[MOST_TASKS], f"more than {MOST_TASKS} tasks")
        for item in nodes[:MOST_TASKS]:
            each = self._task(item)
            if each and any(each.id == other.id for other in found):
                self.problems.add(item, f"task id {each.id} is used twice")
            elif each:
                found.append(each)
        return found

    def _task(self, node: Node) -> Task | None:
        entries = lines.pairs(node, "a task", self.problems)
        if not entries:
            return None
        task_id, kind = self._word(entries, "id", node), self._word(entries, "kind", node)
        if kind and kind not in TASK_KINDS:
            self.problems.add(entries["kind"][1], f"unknown task kind {kind}{did_you_mean(kind, TASK_KINDS)}")
        if task_id and not _ID.match(task_id):
            self.problems.add(entries["id"][1], f"task id {task_id} must be lower-case letters, digits, - and _")
        if kind not in TASK_KINDS or not _ID.match(task_id):
            return None
        known = (*COMMON_KEYS, *KEYS_BY_KIND[kind])
        entries = lines.pairs(node, f"task {task_id}", self.problems, known)
        after = self._refs(task_id, entries, "after")
        options = getattr(self, f"_{kind}")(task_id, entries, node)
        return Task(
            id=task_id,
            kind=kind,
            after=after,
            options=options,
            timeout_seconds=self._duration(_value(entries, "timeout"), "timeout", TIMEOUTS.get(kind, 600.0)),
            retry=self._retry(_value(entries, "retry")),
            on_error=self._choice(entries, "on_error", ON_ERROR, "fail"),
            line=lines.line_of(node),
        )

    def _word(self, entries: Entries, key: str, node: Node) -> str:
        value = lines.text_of(_value(entries, key), key, self.problems)
        if not value:
            self.problems.add(node, f"a task needs {key}")
        return value

    def _refs(self, task_id: str, entries: Entries, key: str, at_least: int = 0) -> tuple[str, ...]:
        node = _value(entries, key)
        found = []
        for item in lines.items(node):
            to = lines.text_of(item, key, self.problems)
            if to and to not in found:
                found.append(to)
                self.refs.append(Ref(task_id, to, key, lines.line_of(item)))
        if len(found) < at_least and node is not None:
            self.problems.add(node, f"task {task_id}: {key} needs at least {at_least} {'task' if at_least == 1 else 'tasks'}")
        return tuple(found)

    def _required(self, task_id: str, entries: Entries, key: str, node: Node) -> None:
        if key not in entries:
            self.problems.add(node, f"task {task_id} needs {key}")

    def _choice(self, entries: Entries, key: str, choices: tuple[str, ...], default: str) -> str:
        node = _value(entries, key)
        value = lines.text_of(node, key, self.problems, default)
        if value not in choices and node is not None:
            hint = did_you_mean(value, choices) or f"; it is one of: {', '.join(choices)}"
            self.problems.add(node, f"unknown {key} {value}{hint}")
            return default
        return value

    def _duration(self, node: Node | None, what: str, default: float, least: float = 1.0) -> float:
        """Seconds: ``10s``, ``5m``, ``2h``, ``3d`` or a number."""
        text = lines.text_of(node, what, self.problems)
        if node is None or not text:
            return default
        found = _DURATION.match(text)
        seconds = float(found[1]) * _UNIT_SECONDS[found[2]] if found else 0.0
        if not found:
            self.problems.add(node, f"{what} {text} is not a duration such as 30s, 5m, 2h or 1d")
        elif not least <= seconds <= LONGEST_SECONDS:
            self.problems.add(node, f"{what} {text} must be between {least:g} s and {LONGEST_SECONDS / 86400:g} days")
        return seconds

    def _retry(self, node: Node | None) -> Retry:
        entries = lines.pairs(node, "retry", self.problems, ("attempts", "backoff"))
        attempts = lines.text_of(_value(entries, "attempts"), "attempts", self.problems, "3")
        if not attempts.isascii() or not attempts.isdigit() or not 1 <= int(attempts[:6]) <= 20:
            self.problems.add(_value(entries, "attempts") or 0, f"attempts must be a whole number from 1 to 20, not {attempts}")
            attempts = "3"
        return Retry(int(attempts), self._duration(_value(entries, "backoff"), "backoff", 5.0))

    # options by kind --------------------------------------------------------------------------------------------------

    def _select(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        reader = ConditionReader(self.problems)
        return {
            "series": reader.series_tests(_value(entries, "series"), "series"),
            "choose": self._choice(entries, "choose", CHOICES, "all"),
            "frames": self._frames(_value(entries, "frames")),
        }

    def _frames(self, node: Node | None) -> tuple[int, ...] | None:
        frames: list[int] = []
        for item in lines.items(node):
            text = lines.text_of(item, "frames", self.problems)
            found = _FRAMES.match(text)
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
            if not 1 <= first <= last or last - first >= MOST_FRAMES:
                self.problems.add(item, f"frames are numbered from 1 and given as 5 or 1-30, not {text}")
            else:
                frames += range(first, last + 1)
        if len(frames) > MOST_FRAMES and node is not None:
            self.problems.add(node, f"more than {MOST_FRAMES} frames")
        return tuple(dict.fromkeys(frames[:MOST_FRAMES])) if frames else None

    def _run(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        self._required(task_id, entries, "algorithm", node)
        name = lines.text_of(_value(entries, "algorithm"), "algorithm", self.problems)
        if name and not _NAME.match(name):
            self.problems.add(entries["algorithm"][1], f"algorithm {name} must be lower-case letters, digits and -")
        parameters = lines.plain(entries["parameters"][1], "parameters", self.problems) if "parameters" in entries else {}
        if not isinstance(parameters, dict):
            self.problems.add(entries["parameters"][1], "parameters must be a mapping (name: value)")
            parameters = {}
        chosen = self._refs(task_id, entries, "input")
        if len(chosen) > 1:
            self.problems.add(entries["input"][1], f"task {task_id}: input is one select task")
        return {
            "algorithm": name,
            "version": lines.text_of(_value(entries, "version"), "version", self.problems),
            "input": chosen[0] if chosen else "",
            "parameters": parameters,
        }

    def _branch(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        self._required(task_id, entries, "cases", node)
        reader = ConditionReader(self.problems, results=True)
        cases: list[tuple[str, Condition]] = []
        for name, (key, value) in lines.pairs(_value(entries, "cases"), f"the cases of {task_id}", self.problems).items():
            self._case_name(name, key)
            condition = reader.condition(value, f"case {name}")
            if condition:
                cases.append((name, condition))
        self.refs += [Ref(task_id, to, "result", line) for to, line in reader.result_refs]
        if "cases" in entries and not isinstance(entries["cases"][1], yaml.MappingNode):
            return {"cases": (), "otherwise": "otherwise"}
        if "cases" in entries and not entries["cases"][1].value:
            self.problems.add(entries["cases"][1], f"task {task_id}: cases is empty")
        otherwise = lines.text_of(_value(entries, "otherwise"), "otherwise", self.problems, "otherwise")
        self._case_name(otherwise, _value(entries, "otherwise") or node)
        return {"cases": tuple(cases), "otherwise": otherwise}

    def _case_name(self, name: str, node: Node) -> None:
        if not _ID.match(name):
            self.problems.add(node, f"case name {name} must be lower-case letters, digits, - and _")

    def _join(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        self._required(task_id, entries, "wait_for", node)
        return {"wait_for": self._refs(task_id, entries, "wait_for", at_least=2)}

    def _review(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        self._required(task_id, entries, "of", node)
        may_decide = tuple(sorted(ACTIONS["decide review"]))
        roles = _choices(_value(entries, "roles"), "role that may decide a review", may_decide, self.problems)
        return {
            "of": self._refs(task_id, entries, "of", at_least=1),
            "roles": roles or may_decide,
            "question": lines.text_of(_value(entries, "question"), "question", self.problems),
        }

    def _deliver(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        for key in ("results", "destinations"):
            self._required(task_id, entries, key, node)
        destinations = lines.texts_of(_value(entries, "destinations"), "destinations", self.problems)
        if "destinations" in entries and not destinations:
            self.problems.add(entries["destinations"][0], f"task {task_id}: destinations is empty")
        formats = _choices(_value(entries, "formats"), "format", RESULT_FORMATS, self.problems)
        if "formats" in entries and not lines.items(entries["formats"][1]):
            self.problems.add(entries["formats"][0], f"task {task_id}: formats is empty")
        return {
            "results": self._refs(task_id, entries, "results", at_least=1),
            "formats": formats or RESULT_FORMATS,
            "destinations": tuple(dict.fromkeys(destinations)),
            "only_if_accepted": lines.flag_of(_value(entries, "only_if_accepted"), "only_if_accepted", self.problems, False),
        }

    def _notify(self, task_id: str, entries: Entries, node: Node) -> dict[str, Any]:
        channel = self._choice(entries, "channel", CHANNELS, "log")
        to = lines.text_of(_value(entries, "to"), "to", self.problems)
        if channel == "webhook" and not to.startswith(("https://", "http://")):
            self.problems.add(_value(entries, "to") or node, f"task {task_id}: a webhook needs to: an http(s) address")
        self._required(task_id, entries, "message", node)
        return {"channel": channel, "to": to, "message": lines.text_of(_value(entries, "message"), "message", self.problems)}


# the head of a file ---------------------------------------------------------------------------------------------------


def read_name(entries: Entries, root: Node, problems: Problems) -> str:
    """``workflow:``, the name."""
    name = lines.text_of(_value(entries, "workflow"), "workflow", problems)
    if not name:
        problems.add(root, "the workflow needs a name (workflow: my-workflow)")
    elif not _NAME.match(name):
        problems.add(entries["workflow"][1], f"workflow name {name} must be lower-case letters, digits and -")
    return name


def read_trigger(node: Node | None, problems: Problems) -> Trigger:
    """``trigger:`` with called_ae, source and protocol; each a text or a list."""
    entries = lines.pairs(node, "trigger", problems, ("called_ae", "source", "protocol"))
    return Trigger(
        called_ae=lines.texts_of(_value(entries, "called_ae"), "called_ae", problems),
        source=lines.texts_of(_value(entries, "source"), "source", problems),
        protocol=_choices(_value(entries, "protocol"), "protocol", PROTOCOLS, problems),
    )


def read_priority(node: Node | None, problems: Problems) -> tuple[str, tuple[tuple[str, Condition], ...]]:
    """``priority:`` a word, or {default: word, emergency: condition, …}; the default and the conditional ones."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return _priority_word(node, problems), ()
    entries = lines.pairs(node, "priority", problems, ("default", *PRIORITIES))
    reader = ConditionReader(problems)
    special = []
    for name in PRIORITIES:
        condition = reader.condition(_value(entries, name), f"priority {name}")
        if condition:
            special.append((name, condition))
    return _priority_word(_value(entries, "default"), problems), tuple(special)


def _priority_word(node: Node | None, problems: Problems) -> str:
    word = lines.text_of(node, "priority", problems, "routine")
    if word not in PRIORITIES and node is not None:
        problems.add(
            node, f"unknown priority {word}{did_you_mean(word, PRIORITIES) or '; it is one of: ' + ', '.join(PRIORITIES)}"
        )
        return "routine"
    return word
