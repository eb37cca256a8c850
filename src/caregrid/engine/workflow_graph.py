"""The graph of a workflow: references checked, implied edges added, cycles and tasks that can never run refused."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from caregrid.domain.workflow import Task
from caregrid.engine.attributes import did_you_mean
from caregrid.engine.workflow_reading import Ref
from caregrid.engine.yaml_lines import Problems

#: What a review can end in, for ``after: [look.accepted]``.
DECISIONS = ("accepted", "corrected", "rejected")
_KIND_FOR_ROLE = {"input": "select", "of": "run", "results": "run", "result": "run"}


def connect(tasks: Sequence[Task], refs: Iterable[Ref], problems: Problems) -> tuple[Task, ...]:
    """The tasks with every edge in ``after``; what is wrong with the graph is noted."""
    by_id = {task.id: task for task in tasks}
    sound = [ref for ref in refs if ref.by in by_id and _check(ref, by_id, problems)]
    explicit = {task.id: [r.to for r in sound if r.by == task.id and r.role in ("after", "input", "wait_for")] for task in tasks}
    if _cycle(by_id, explicit, sound, problems):
        return tuple(tasks)
    implied: dict[str, list[str]] = {
        task.id: [r.to for r in sound if r.by == task.id and r.role in ("of", "results", "result")] for task in tasks
    }
    connected = []
    for task in tasks:
        # A result that comes through a join may be one of several, of which only some are there; the join has waited.
        above = ancestors(explicit[task.id], explicit, implied)
        edges = explicit[task.id] + [to for to in implied[task.id] if to not in above]
        connected.append(replace(task, after=tuple(dict.fromkeys(edges))))
    _check_reachable(connected, problems)
    return tuple(connected)


def head(ref: str) -> str:
    """The task part of ``task`` or ``task.case``."""
    return ref.partition(".")[0]


def ancestors(starts: Iterable[str], *edges: Mapping[str, Sequence[str]]) -> set[str]:
    """Every task before those named, and they themselves."""
    seen: set[str] = set()
    stack = [head(each) for each in starts]
    while stack:
        each = stack.pop()
        if each not in seen:
            seen.add(each)
            stack += [head(to) for graph in edges for to in graph.get(each, ())]
    return seen


def order(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Each task after all it waits for; file order where that leaves a choice. Raises graphlib.CycleError."""
    place = {task.id: number for number, task in enumerate(tasks)}
    sorter = graphlib.TopologicalSorter({task.id: {head(to) for to in task.after} for task in tasks})
    sorter.prepare()
    found: list[Task] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=place.__getitem__)
        first = ready.pop(0)
        found.append(tasks[place[first]])
        sorter.done(first)
    return tuple(found)


def _check(ref: Ref, by_id: Mapping[str, Task], problems: Problems) -> bool:
    name, dot, case = ref.to.partition(".")
    where = f"task {ref.by}: {ref.role}"
    if name not in by_id:
        problems.add(ref.line, f"{where} names {name}, which is no task{did_you_mean(name, list(by_id))}")
        return False
    if name == ref.by:
        problems.add(ref.line, f"{where} names the task itself")
        return False
    target = by_id[name]
    wanted = _KIND_FOR_ROLE.get(ref.role)
    if wanted and target.kind != wanted:
        problems.add(ref.line, f"{where} needs a {wanted} task, but {name} is a {target.kind} task")
        return False
    return not dot or _check_case(ref, target, case, where, problems)


def _check_case(ref: Ref, target: Task, case: str, where: str, problems: Problems) -> bool:
    if ref.role not in ("after", "wait_for") or target.kind not in ("branch", "review"):
        problems.add(ref.line, f"{where} {ref.to}: only branches and reviews have cases")
        return False
    cases = DECISIONS
    if target.kind == "branch":
        cases = (*(name for name, _ in target.options["cases"]), target.options["otherwise"])
    if case not in cases:
        hint = did_you_mean(case, cases) or f"; it has: {', '.join(cases)}"
        problems.add(ref.line, f"{where}: {target.id} has no case {case}{hint}")
        return False
    return True


def _cycle(by_id: Mapping[str, Task], explicit: Mapping[str, Sequence[str]], sound: Sequence[Ref], problems: Problems) -> bool:
    graph = {name: sorted({head(ref.to) for ref in sound if ref.by == name}) for name in by_id}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        problems.add(by_id[circle[0]].line, f"tasks wait for each other in a circle: {' ← '.join(reversed(circle))}")
        return True
    return False


def _check_reachable(tasks: Sequence[Task], problems: Problems) -> None:
    """Refuse a task that needs two outcomes of one branch or review, both at once. A join needs only one of its ways."""
    needs: dict[str, dict[str, frozenset[str]]] = {}
    for task in order(tasks):
        ways = [_way(to, needs) for to in task.after]
        combined = _either(ways) if task.kind == "join" else _both(ways)
        clash = next((name for name, cases in combined.items() if not cases), None)
        if clash:
            problems.add(task.line, f"task {task.id} can never run: it needs two cases of {clash} at once; put a join before it")
            combined = {}
        needs[task.id] = combined


def _way(ref: str, needs: Mapping[str, dict[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    """branch → the cases under which ``ref`` can be done."""
    name, dot, case = ref.partition(".")
    found = dict(needs[name])
    if dot:
        found[name] = frozenset({case})
    return found


def _both(ways: Sequence[Mapping[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    combined: dict[str, frozenset[str]] = {}
    for way in ways:
        for name, cases in way.items():
            combined[name] = combined.get(name, cases) & cases
    return combined


def _either(ways: Sequence[Mapping[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    shared = set.intersection(*(set(way) for way in ways)) if ways else set()
    return {name: frozenset().union(*(way[name] for way in ways)) for name in shared}
