"""A MONAI Deploy or AIDE workflow (JSON) as a workflow of ours, with a report of what changed or has no equivalent.

What cannot be said is never widened: a condition without equivalent becomes one that never holds, and a task that
needs something this site does not have is left out with all that lives on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from caregrid.domain.roles import ACTIONS
from caregrid.engine import yaml_lines
from caregrid.engine.monai_conditions import NEVER, Untranslatable, translate
from caregrid.engine.workflows import parse_workflow
from caregrid.errors import WorkflowInvalid

RUN_TYPES = ("argo", "docker")
ROUTER_TYPES = ("router",)
REVIEW_TYPES = ("aide_clinical_review",)
EXPORT_TYPES = ("export", "dicom_export")
LONGEST_FILE = 1 << 20
MOST_TASKS = 100

_ARTIFACT = re.compile(r"\{\{\s*context\.executions\.([\w-]+)\.(?:artifacts|output_dir)\b")


@dataclass(frozen=True)
class ReportLine:
    """What became of one thing. kind: kept, changed or no equivalent."""

    kind: str
    what: str
    why: str


@dataclass(frozen=True)
class MonaiImport:
    """The workflow as YAML, which parse_workflow accepts, and the report."""

    yaml: str
    report: tuple[ReportLine, ...]


def import_monai(text: str) -> MonaiImport:
    """Translate a workflow JSON. Raises WorkflowInvalid when it is not one, or when nothing of it can be said here."""
    source = _load(text)
    importer = _Importer(source)
    workflow = importer.workflow()
    report = tuple(dict.fromkeys(importer.report))
    made = _written(workflow, report)
    try:
        parse_workflow(made, "imported.yaml")
    except WorkflowInvalid as error:
        reason = f"cannot be expressed here: {error.details['reason']}"
        raise WorkflowInvalid(file="workflow.json", line=1, reason=reason, problems=((1, reason),)) from None
    return MonaiImport(made, report)


def _load(text: str) -> dict[str, Any]:
    try:
        if len(text) > LONGEST_FILE:
            raise ValueError(f"longer than {LONGEST_FILE >> 20} MiB")
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise yaml_lines.invalid("workflow.json", [(error.lineno, f"not JSON: {error.msg}")]) from None
    except (ValueError, RecursionError) as error:
        raise yaml_lines.invalid("workflow.json", [(1, f"not JSON: {str(error)[:100]}")]) from None
    # The workflow manager's own API wraps the workflow in its revision.
    source = _dict(loaded).get("workflow", loaded)
    tasks = _list(_dict(source).get("tasks"))
    if not tasks or not all(isinstance(each, dict) and _text(each.get("id")) and _text(each.get("type")) for each in tasks):
        raise yaml_lines.invalid("workflow.json", [(1, "not a MONAI Deploy workflow: it needs tasks with id and type")])
    ids = [_text(each["id"]) for each in tasks]
    if len(set(ids)) < len(ids) or len(ids) > MOST_TASKS:
        raise yaml_lines.invalid("workflow.json", [(1, f"task ids must be different, and at most {MOST_TASKS}")])
    return _dict(source)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _number(value: Any) -> float:
    """A positive finite number, written as number or text; else 0."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        return 0.0
    return number if 0 < number < 1e9 else 0.0


def _words(value: Any) -> list[str]:
    """Texts of a list, or of one text with commas."""
    found = value if isinstance(value, list) else _text(value).split(",")
    return [each.strip() for each in found if isinstance(each, str) and each.strip()]


def _name_of(each: Any) -> str:
    """The name of a destination; both spellings are about."""
    return _text(_dict(each).get("name")) or _text(_dict(each).get("Name"))


def _slug(text: str, longest: int = 40) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", text.lower().encode("ascii", "ignore").decode()).strip("-")[:longest].strip("-")
    return slug if slug[:1].isalpha() else f"w-{slug}".rstrip("-")[:longest]


@dataclass
class _Edge:
    """A way from one task to another, and the conditions on it."""

    source: str
    target: str
    conditions: list[str] = field(default_factory=list)


class _Importer:
    """One import: the source's tasks by id, the tasks made so far, and the report."""

    def __init__(self, source: dict[str, Any]) -> None:
        self.source = source
        self.report: list[ReportLine] = []
        self.tasks: dict[str, dict[str, Any]] = {_text(each["id"]): each for each in _list(source["tasks"])}
        self.ids = self._new_ids()
        self.made: list[dict[str, Any]] = []
        #: source task id → what a task after it waits for; None when it was left out with all after it
        self.ends: dict[str, list[str] | None] = {}

    def say(self, kind: str, what: str, why: str) -> None:
        self.report.append(ReportLine(kind, what[:200], why[:500]))

    def _new_ids(self) -> dict[str, str]:
        ids: dict[str, str] = {}
        for old in self.tasks:
            new, number = _slug(old, 30), 2
            while new in ids.values():
                new, number = f"{_slug(old, 26)}-{number}", number + 1
            ids[old] = new
            if new != old:
                self.say("changed", f"task {old}", f"is called {new}: ids are lower-case letters, digits and -")
        return ids

    # the whole --------------------------------------------------------------------------------------------------------

    def workflow(self) -> dict[str, Any]:
        """The workflow as data, in the order it is written."""
        name = _text(self.source.get("name")) or "imported"
        found: dict[str, Any] = {"workflow": _slug(name)}
        if _slug(name) != name:
            self.say("changed", f"name {name}", f"is {_slug(name)}: names are lower-case letters, digits and -")
        version = _text(self.source.get("version"))
        description = " ".join(_text(self.source.get("description")).split())
        found["description"] = f"{description} (imported from {name} {version})".strip()[:500]
        self._head(found)
        for task_id in self._in_order():
            self._task(task_id)
        found["tasks"] = self.made
        return found

    def _head(self, found: dict[str, Any]) -> None:
        gateway = _dict(self.source.get("informatics_gateway"))
        trigger = {"called_ae": _words(gateway.get("ae_title")), "source": _words(gateway.get("data_origins"))}
        trigger = {key: value for key, value in trigger.items() if value}
        if trigger:
            found["trigger"] = trigger
            self.say("kept", "ae_title and data_origins", "are the trigger")
        predicate = _words_or_text(self.source.get("predicate"))
        if predicate:
            found["when"] = self._condition(predicate, "predicate", branch=False)[0]
        for key in ("dataRetentionDays", "data_retention_days", "retention_policies"):
            if key in self.source:
                self.say("no equivalent", key, "how long data is kept is the site's rule, not a workflow's")

    def _in_order(self) -> Iterator[str]:
        """Tasks from the first on, each after the tasks that lead to it; what the first never reaches does not run there."""
        edges = self._edges()
        first = next(iter(self.tasks))
        reached, stack = {first}, [first]
        while stack:
            here = stack.pop()
            onward = {edge.target for edge in edges if edge.source == here} - reached
            reached |= onward
            stack += onward
        for task_id in self.tasks:
            if task_id not in reached:
                self.say("no equivalent", f"task {task_id}", "no task leads to it, so it never ran; left out")
        placed: set[str] = set()
        while len(placed) < len(reached):
            free = [t for t in self.tasks if t in reached - placed and self._before(t, edges, reached) <= placed]
            if not free:
                circle = min(reached - placed)
                raise yaml_lines.invalid("workflow.json", [(1, f"tasks lead to each other in a circle at {circle[:60]}")])
            placed.add(free[0])
            yield free[0]

    def _before(self, task_id: str, edges: list[_Edge], reached: set[str]) -> set[str]:
        return {edge.source for edge in edges if edge.target == task_id and edge.source in reached}

    def _edges(self) -> list[_Edge]:
        found = []
        for task_id, each in self.tasks.items():
            for destination in _list(each.get("task_destinations")):
                target = _name_of(destination)
                conditions = _words_or_text(_dict(destination).get("conditions"))
                if target in self.tasks:
                    found.append(_Edge(task_id, target, conditions))
        return found

    # one task ---------------------------------------------------------------------------------------------------------

    def _task(self, task_id: str) -> None:
        each = self.tasks[task_id]
        after = self._after(task_id)
        if after is None:
            self.say("no equivalent", f"task {task_id}", "it comes after a task that was left out; left out too")
            self.ends[task_id] = None
            return
        kind = _text(each.get("type")).lower()
        for destination in _list(each.get("task_destinations")):
            if _name_of(destination) not in self.tasks:
                self.say("no equivalent", f"task {task_id}", f"leads to {_name_of(destination) or 'nothing'}, which is no task")
        if kind in ROUTER_TYPES:
            self.say("kept", f"router {task_id}", "each of its conditions is a branch, so several ways may be taken as before")
            self.ends[task_id] = after
        elif kind in RUN_TYPES:
            self._run(task_id, each, after)
        elif kind in REVIEW_TYPES:
            self._review(task_id, each, after)
        elif kind in EXPORT_TYPES:
            self._export(task_id, each, after)
        elif kind == "email":
            self._email(task_id, each, after)
        else:
            self._unknown(task_id, kind, after)

    def _after(self, task_id: str) -> list[str] | None:
        """What the task waits for; None when every way to it was left out. Several ways meet in a join, as any led there."""
        incoming = [edge for edge in self._edges() if edge.target == task_id and edge.source in self.ends]
        if not incoming:
            return []
        ways = [way for way in (self._way(edge) for edge in incoming) if way is not None]
        if not ways:
            return None
        refs = list(dict.fromkeys(to for way in ways for to in way))
        if len(refs) < 2 or any(not way for way in ways):
            return [] if any(not way for way in ways) else refs
        joined = self._fresh(f"{self.ids[task_id]}-join")
        self.made.append({"id": joined, "kind": "join", "wait_for": refs})
        return [joined]

    def _way(self, edge: _Edge) -> list[str] | None:
        """The refs that stand for an edge: the source's own end, or a branch on the edge's conditions."""
        end = self.ends[edge.source]
        if end is None or not edge.conditions:
            return end
        condition, needs = self._condition(edge.conditions, f"{edge.source} → {edge.target}", branch=True)
        several = sum(other.source == edge.source for other in self._edges()) > 1
        stem = self.ids[edge.source] if _text(self.tasks[edge.source].get("type")).lower() in ROUTER_TYPES else ""
        name = f"{stem}-{self.ids[edge.target]}" if stem and several else stem or f"to-{self.ids[edge.target]}"
        branch: dict[str, Any] = {"id": self._fresh(name[:40].strip("-")), "kind": "branch"}
        waits = [to for to in end if to not in needs]
        if waits:
            branch["after"] = waits
        self.made.append({**branch, "cases": {"go": condition}, "otherwise": "stay"})
        return [f"{branch['id']}.go"]

    def _fresh(self, name: str) -> str:
        """An id that is free. Routers leave theirs, as they become branches."""
        staying = {self.ids[old] for old, each in self.tasks.items() if _text(each.get("type")).lower() not in ROUTER_TYPES}
        taken = staying | {each["id"] for each in self.made}
        new, number = name[:40], 2
        while new in taken:
            new, number = f"{name[:36]}-{number}", number + 1
        return new

    def _condition(self, expressions: list[str], where: str, branch: bool) -> tuple[dict[str, Any], list[str]]:
        """All expressions together as YAML data, and the (new) ids of the tasks whose results they ask for."""
        parts, needs = [], []
        for expression in expressions:
            try:
                translation = translate(expression)
                parts.append(self._renamed(translation.condition, translation.tasks, branch))
            except Untranslatable as error:
                self.say("no equivalent", f"condition {expression}", f"{where}: {error}; it never holds until you write it")
                parts.append(NEVER)
                continue
            needs += [self.ids[task] for task in translation.tasks]
            for note in translation.notes:
                self.say("changed", f"condition {expression}", f"{where}: {note}")
            if not translation.notes:
                self.say("kept", f"condition {expression}", where)
        return (parts[0] if len(parts) == 1 else {"all": parts}), needs

    def _renamed(self, condition: dict[str, Any], tasks: list[str], branch: bool) -> dict[str, Any]:
        for task in tasks:
            if not branch:
                raise Untranslatable("a predicate cannot ask for results")
            if not self._is_made_run(task):
                raise Untranslatable(f"{task} is no task with results here")
        return dict(_rename_results(condition, self.ids))

    def _is_made_run(self, task_id: str) -> bool:
        return any(each["kind"] == "run" and each["id"] == self.ids.get(task_id) for each in self.made)

    # kinds ------------------------------------------------------------------------------------------------------------

    def _add(self, task_id: str, kind: str, after: list[str], options: dict[str, Any]) -> None:
        entry: dict[str, Any] = {"id": self.ids[task_id], "kind": kind}
        if after:
            entry["after"] = list(dict.fromkeys(after))
        self.made.append({**entry, **options})
        self.ends[task_id] = [self.ids[task_id]]

    def _leave_out(self, task_id: str, why: str) -> None:
        self.say("no equivalent", f"task {task_id}", f"{why}; left out, and what comes after it")
        self.ends[task_id] = None

    def _run(self, task_id: str, each: dict[str, Any], after: list[str]) -> None:
        args = _dict(each.get("args"))
        image = _text(args.get("container_image")) or _text(args.get("workflow_template_name")) or task_id
        algorithm = _slug(re.split(r"[:@]", image.rsplit("/", 1)[-1])[0], 64)
        if others := [name for name in self._artifacts_of(each) if name != task_id]:
            self._leave_out(task_id, f"it reads what {', '.join(others)} wrote; an algorithm here reads the study")
            return
        what = "container image" if args.get("container_image") else "Argo template"
        self.say(
            "changed", f"task {task_id}: {what} {image}", f"runs the model package {algorithm}, to be packaged, signed and added"
        )
        moved = [key for key in args if key not in ("container_image", "workflow_template_name", "task_timeout_minutes")]
        if moved:
            self.say("changed", f"task {task_id}: {', '.join(sorted(map(str, moved)))}", "belong in the package's manifest")
        if _dict(each.get("artifacts")).get("output"):
            self.say("changed", f"task {task_id}: output artifacts", "are declared in the package's manifest")
        options: dict[str, Any] = {"algorithm": algorithm}
        options.update(self._timeout(task_id, each.get("timeout_minutes"), args.get("task_timeout_minutes")))
        self._add(task_id, "run", after, options)

    def _timeout(self, task_id: str, *given: Any) -> dict[str, str]:
        minutes = next((number for number in map(_number, given) if number), 0.0)
        if not minutes:
            if any(each not in (None, "") for each in given):
                self.say("changed", f"task {task_id}: timeout", "had no limit; the usual one of its kind holds")
            return {}
        if not 1 / 60 <= minutes <= 43200:
            self.say("changed", f"task {task_id}: timeout", "is at most 30 days")
        return {"timeout": f"{min(max(round(minutes * 60), 1), 2592000)}s"}

    def _artifacts_of(self, each: dict[str, Any]) -> list[str]:
        """The tasks whose output this one reads."""
        values = [_text(_dict(item).get("value")) for item in _list(_dict(each.get("artifacts")).get("input"))]
        return list(dict.fromkeys(found[1] for value in values if (found := _ARTIFACT.search(value))))

    def _runs_behind(self, names: list[str]) -> list[str]:
        """New ids of the run tasks among ``names``; a reviewed task stands for what was reviewed."""
        runs = []
        for name in names:
            reviewed = _text(_dict(_dict(self.tasks.get(name)).get("args")).get("reviewed_task_id"))
            runs += [self.ids[each] for each in (name, reviewed) if self._is_made_run(each)]
        return list(dict.fromkeys(runs))

    def _review(self, task_id: str, each: dict[str, Any], after: list[str]) -> None:
        args = _dict(each.get("args"))
        reviewed = self._runs_behind([_text(args.get("reviewed_task_id")), *self._artifacts_of(each)])
        if not reviewed:
            self._leave_out(task_id, "it reviews no task that gives a result here")
            return
        known = sorted(ACTIONS["decide review"])
        asked = _words(args.get("reviewer_roles")) or ["clinician"]
        roles = [role for role in asked if role in known] or known
        if roles != asked:
            self.say("changed", f"task {task_id}: reviewer_roles {', '.join(asked)}", f"is decided by {', '.join(roles)}")
        if mode := _text(args.get("mode")):
            self.say("no equivalent", f"task {task_id}: mode {mode}", "a review here always decides whether the result goes on")
        if _text(args.get("notifications")):
            self.say("no equivalent", f"task {task_id}: notifications", "open reviews stand in the clinicians' worklist")
        question = " ".join(_text(each.get("description")).split())[:500]
        options: dict[str, Any] = {"of": reviewed, "roles": roles, **({"question": question} if question else {})}
        options.update(self._timeout(task_id, each.get("timeout_minutes")))
        self.say("kept", f"task {task_id}", "is a review; what comes after it waits for acceptance")
        self._add(task_id, "review", [to for to in after if to not in reviewed], options)

    def _export(self, task_id: str, each: dict[str, Any], after: list[str]) -> None:
        results = self._runs_behind(self._artifacts_of(each))
        if not results:
            self._leave_out(task_id, "it sends on images as received, or the output of a task that is not here")
            return
        named = [_name_of(item) for item in _list(each.get("export_destinations"))]
        destinations = [name for name in dict.fromkeys(named) if name]
        if not destinations:
            self._leave_out(task_id, "it names no destination")
            return
        self.say("kept", f"task {task_id}", f"delivers to {', '.join(destinations)}; name them in the site's settings")
        self.say(
            "changed", f"task {task_id}: files", "the findings are written as SEG, SR and SC; the algorithm's own files stay here"
        )
        self._add(
            task_id, "deliver", [to for to in after if to not in results], {"results": results, "destinations": destinations}
        )

    def _email(self, task_id: str, each: dict[str, Any], after: list[str]) -> None:
        args = _dict(each.get("args"))
        to = ", ".join([*_words(args.get("recipient_emails")), *_words(args.get("recipient_roles"))])[:500]
        message = " ".join(_text(each.get("description")).split())[:500] or f"Task {task_id} was reached"
        self.say("changed", f"task {task_id}", "is a notification in the log; there is no mail server here")
        if args.get("metadata_values"):
            self.say("no equivalent", f"task {task_id}: metadata_values", "a notification holds no patient data")
        self._add(task_id, "notify", after, {"channel": "log", **({"to": to} if to else {}), "message": message})

    def _unknown(self, task_id: str, kind: str, after: list[str]) -> None:
        if kind == "test":
            self.say("no equivalent", f"task {task_id} (test)", "does nothing; what comes after it follows what came before")
            self.ends[task_id] = after
        elif kind == "remote_app_execution":
            self._leave_out(task_id, "sending to a remote application and waiting for its answer is not there")
        elif "hl7" in kind:
            self._leave_out(task_id, "results are not sent by HL7 yet")
        else:
            self._leave_out(task_id, f"task type {kind[:40]} is not known")


def _words_or_text(value: Any) -> list[str]:
    """Expressions: a list of texts, or one text (never split at commas)."""
    return [each.strip() for each in (value if isinstance(value, list) else [value]) if isinstance(each, str) and each.strip()]


def _rename_results(node: Any, ids: dict[str, str]) -> Any:
    """The same condition with the new ids of tasks in its ``result`` parts."""
    if isinstance(node, list):
        return [_rename_results(each, ids) for each in node]
    if not isinstance(node, dict):
        return node
    if "result" in node:
        return {"result": {**node["result"], "task": ids[node["result"]["task"]]}}
    return {key: _rename_results(value, ids) for key, value in node.items()}


class _Dumper(yaml.SafeDumper):
    """Without aliases, which workflows do not have."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written(workflow: dict[str, Any], report: tuple[ReportLine, ...]) -> str:
    """The YAML text, with what a person must look at on top."""
    notes = [f"# {line.kind}: {line.what} — {line.why}" for line in report if line.kind != "kept"]
    head = ["# Imported from a MONAI Deploy workflow. Look at each line below before it is added.", *notes, ""]
    clean = [re.sub(r"[^\x20-\x7e\u00a0-\ud7ff\ue000-\ufffd]", " ", line) for line in head]
    body = yaml.dump(workflow, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return "\n".join(clean) + "\n" + body
