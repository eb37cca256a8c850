"""Conditions judged on a study: typed, never by eval, and with a reason that holds no patient data.

A missing, empty or undecodable attribute makes a test false (only ``absent`` is then true), never an error. What
the handed-in ``headers`` raises (a file that cannot be read) goes through: a broken disk must not look like a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import re2
from pydicom import Dataset

from caregrid.domain.study import InstanceRef, SeriesRef, StudyRef
from caregrid.domain.workflow import Condition
from caregrid.engine.attributes import Attribute, Reading, attribute, read, shown
from caregrid.errors import ConditionError

Headers = Callable[[InstanceRef], Dataset]

LOGIC = ("all", "any", "not")
LEVELS = ("study", "any_series", "all_series", "any_instance", "all_instances")
TESTS = (
    *("equals", "not_equals", "in", "contains", "matches", "at_least", "at_most", "greater", "less", "before", "after"),
    *("present", "absent"),
)
#: The tests each kind of attribute can be put to.
TESTS_BY_KIND = {
    "number": ("equals", "not_equals", "in", "at_least", "at_most", "greater", "less", "present", "absent"),
    "age": ("equals", "not_equals", "in", "at_least", "at_most", "greater", "less", "present", "absent"),
    "date": ("equals", "not_equals", "in", "at_least", "at_most", "before", "after", "present", "absent"),
    "time": ("equals", "not_equals", "in", "at_least", "at_most", "before", "after", "present", "absent"),
    "datetime": ("equals", "not_equals", "in", "at_least", "at_most", "before", "after", "present", "absent"),
    "text": ("equals", "not_equals", "in", "contains", "matches", "present", "absent"),
    "unknown": tuple(test for test in TESTS if test not in ("before", "after")),
    "opaque": ("present", "absent"),
}
CHOICES = ("all", "first", "newest", "most_instances")

LONGEST_PATTERN = 256
LONGEST_TRAIL = 200


@dataclass(frozen=True)
class Scope:
    """What conditions may look at. results: task id → value name → number, text or bool, of run tasks that are done."""

    study: StudyRef
    headers: Headers
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """Whether a condition holds, the one-line reason, and every step taken (one line each); all without patient data."""

    holds: bool
    reason: str
    trail: tuple[str, ...] = ()


class Selection(NamedTuple):
    """The series a select task takes; when there are none, ``reason`` says why."""

    series: list[SeriesRef]
    reason: str


def evaluate(condition: Condition, scope: Scope) -> Judgement:
    """Judge a condition tree on a study. Attribute tests outside any level are put to the study."""
    judge = _Judge(scope)
    holds, reason = judge.node(condition, judge.study_target(), 0)
    return Judgement(holds, reason, tuple(judge.trail))


def choose_case(
    cases: Iterable[tuple[str, Condition]],
    otherwise: str,
    study: StudyRef,
    headers: Headers,
    results: Mapping[str, Mapping[str, Any]],
) -> tuple[str, str]:
    """The first case of a branch that holds, else ``otherwise``; and why."""
    scope = Scope(study, headers, results)
    missed = []
    for name, condition in cases:
        judged = evaluate(condition, scope)
        if judged.holds:
            return name, judged.reason
        missed.append(judged.reason)
    return otherwise, f"no case holds: {'; '.join(missed)}"


def select_series(condition: Condition | None, choose: str, study: StudyRef, headers: Headers) -> Selection:
    """The series whose first instance fits ``condition`` (None: all), narrowed by ``choose`` (one of CHOICES)."""
    judge = _Judge(Scope(study, headers))
    fitting, reasons = [], []
    for number, series in enumerate(study.series, 1):
        if not series.instances:
            continue
        holds, reason = (True, "") if condition is None else judge.node(condition, judge.series_target(number, series), 0)
        if holds:
            fitting.append(series)
        else:
            reasons.append(reason)
    if not fitting:
        why = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        return Selection([], f"no series fits: {why}" if why else "the study has no series with images")
    return Selection(_chosen(choose, fitting, headers), "")


def _chosen(choose: str, fitting: list[SeriesRef], headers: Headers) -> list[SeriesRef]:
    if choose == "most_instances":
        return [max(fitting, key=lambda series: len(series.instances))]
    if choose == "newest":
        return [max(fitting, key=lambda series: _moment(headers(series.instances[0])))]
    return fitting[:1] if choose == "first" else fitting


def _moment(header: Dataset) -> datetime:
    """When a series was made, for ``newest``: acquisition, else series, else content date and time."""
    for stem in ("Acquisition", "Series", "Content"):
        day = read(header, attribute(f"{stem}Date")).values
        if day:
            hour = read(header, attribute(f"{stem}Time")).values
            return datetime.combine(day[0], hour[0] if hour else datetime.min.time())
    return datetime.min


@dataclass(frozen=True)
class _Target:
    """What attribute tests are put to: a study, a series or an instance, by its headers."""

    label: str
    instances: tuple[InstanceRef, ...]
    headers: Callable[[], Iterator[Dataset]]
    counted: Mapping[str, tuple[Any, ...]]


class _Judge:
    """One walk over a condition tree, noting each step."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.trail: list[str] = []

    def study_target(self) -> _Target:
        study = self.scope.study
        filled = [series for series in study.series if series.instances]
        instances = tuple(each for series in filled for each in series.instances)
        counted: dict[str, tuple[Any, ...]] = {
            "ModalitiesInStudy": tuple(sorted({series.modality for series in filled if series.modality})),
            "NumberOfStudyRelatedSeries": (float(len(filled)),),
            "NumberOfStudyRelatedInstances": (float(len(instances)),),
        }
        headers = self.scope.headers
        return _Target("the study", instances, lambda: (headers(series.instances[0]) for series in filled), counted)

    def series_target(self, number: int, series: SeriesRef) -> _Target:
        headers, first = self.scope.headers, series.instances[:1]
        counted = {"NumberOfSeriesRelatedInstances": (float(len(series.instances)),)}
        return _Target(f"series {number}", series.instances, lambda: (headers(each) for each in first), counted)

    def instance_target(self, number: int, instance: InstanceRef) -> _Target:
        headers = self.scope.headers
        return _Target(f"instance {number}", (instance,), lambda: iter((headers(instance),)), {})

    def note(self, depth: int, line: int, text: str, at: int | None = None) -> None:
        """Add a step to the trail; before the steps it sums up when ``at`` is given."""
        if len(self.trail) < LONGEST_TRAIL:
            self.trail.insert(len(self.trail) if at is None else at, f"{'  ' * depth}line {line}: {text}")
        elif len(self.trail) == LONGEST_TRAIL:
            self.trail.append("… more steps left out")

    def node(self, condition: Condition, target: _Target, depth: int) -> tuple[bool, str]:
        op = condition.op
        if op in LOGIC:
            return self.logic(condition, target, depth)
        if op in LEVELS:
            return self.level(condition, target, depth)
        if op == "result":
            return self.result(condition, depth)
        return self.test(condition, target, depth)

    def logic(self, condition: Condition, target: _Target, depth: int) -> tuple[bool, str]:
        op = condition.op
        at = len(self.trail)
        wanted = op == "any"
        verdicts: list[tuple[bool, str]] = []
        for child in condition.children:
            if op != "not" and any(holds == wanted for holds, _ in verdicts) and _costly(child):
                self.note(depth + 1, child.line, f"{child.op} not judged: already decided")
                continue
            verdicts.append(self.node(child, target, depth + 1))
        holds, reason = _combined(op, verdicts, condition.line)
        self.note(depth, condition.line, f"{op}: {_yes(holds)}", at)
        return holds, reason

    def conjunction(self, children: Iterable[Condition], target: _Target, depth: int) -> tuple[bool, str]:
        """All children on one series, instance or study; stops at the first that fails."""
        reasons = []
        for child in children:
            holds, reason = self.node(child, target, depth)
            if not holds:
                return False, reason
            reasons.append(reason)
        return True, " and ".join(reasons) if reasons else f"{target.label} asks for nothing"

    def level(self, condition: Condition, target: _Target, depth: int) -> tuple[bool, str]:
        op, line = condition.op, condition.line
        if op == "study":
            return self.conjunction(condition.children, self.study_target(), depth)
        what = "series" if op.endswith("series") else "instance"
        want, at = op.startswith("any"), len(self.trail)
        count, failed = 0, ""
        for each in self.targets(what, target):
            count += 1
            holds, reason = self.conjunction(condition.children, each, depth + 1)
            if holds == want:
                word = "fits" if want else "does not fit"
                self.note(depth, line, f"{op}: {_yes(holds)}: {each.label} {word}", at)
                return holds, f"line {line}: {each.label} {word}" + ("" if holds else f": {reason}")
            failed = failed or reason
        if count == 0:
            self.note(depth, line, f"{op}: no: there is no {what}")
            return False, f"line {line}: the study has no {what}"
        self.note(depth, line, f"{op}: {_yes(not want)}: {count} judged", at)
        if want:
            return False, f"line {line}: no {what} of {count} fits: {failed}"
        return True, f"line {line}: every {what} fits"

    def targets(self, what: str, target: _Target) -> Iterator[_Target]:
        if what == "series":
            filled = ((n, series) for n, series in enumerate(self.scope.study.series, 1) if series.instances)
            return (self.series_target(number, series) for number, series in filled)
        return (self.instance_target(number, each) for number, each in enumerate(target.instances, 1))

    def result(self, condition: Condition, depth: int) -> tuple[bool, str]:
        values = self.scope.results.get(condition.task)
        outcome, reason = True, f"line {condition.line}: {condition.task} gave what was asked"
        for child in condition.children:
            reading = _result_reading(values, child.attribute)
            holds, text = _tested(child, reading, f"{condition.task}.{child.attribute}", None)
            self.note(depth, child.line, f"{text}: {_yes(holds)}")
            if outcome and not holds:
                outcome, reason = False, f"line {child.line}: {text} does not hold"
            elif outcome:
                reason = f"line {child.line}: {text} holds"
        return outcome, reason

    def test(self, condition: Condition, target: _Target, depth: int) -> tuple[bool, str]:
        try:
            attr = attribute(condition.attribute)
        except ConditionError as error:
            return False, f"line {condition.line}: {error}"
        reading = Reading(problem="absent")
        for header in target.headers():
            reading = read(header, attr, target.counted)
            if reading.values or reading.there:
                break
        holds, text = _tested(condition, reading, attr.name, attr)
        told = _told(attr, reading)
        self.note(depth, condition.line, f"{text} in {target.label}: {_yes(holds)}{told}")
        return holds, f"line {condition.line}: {text} {'holds' if holds else 'does not hold'} in {target.label}{told}"


def _costly(condition: Condition) -> bool:
    """Whether judging it reads every instance."""
    return condition.op.endswith(("_instance", "_instances")) or any(_costly(child) for child in condition.children)


def _combined(op: str, verdicts: list[tuple[bool, str]], line: int) -> tuple[bool, str]:
    if op == "not":
        inner = all(holds for holds, _ in verdicts)
        return not inner, f"line {line}: not: {verdicts[0][1] if verdicts else 'nothing to judge'}"
    if op == "all":
        bad = [reason for holds, reason in verdicts if not holds]
        return not bad, bad[0] if bad else f"line {line}: all {len(verdicts)} conditions hold"
    good = [reason for holds, reason in verdicts if holds]
    if good:
        return True, good[0]
    return False, f"line {line}: none of {len(verdicts)} holds: {verdicts[0][1] if verdicts else 'nothing to judge'}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _told(attr: Attribute, reading: Reading) -> str:
    if reading.problem:
        return f" ({reading.problem})"
    value = shown(attr, reading.values)
    return f" (it is {value})" if value else ""


def _result_reading(values: Mapping[str, Any] | None, name: str) -> Reading:
    if values is None:
        return Reading(problem="the task gave no result")
    if name not in values or values[name] is None:
        return Reading(problem="absent")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Reading((value if isinstance(value, bool) else str(value).strip(),), "", True)
    return Reading((float(value),), "", True) if math.isfinite(value) else Reading(problem="not a finite number", there=True)


def _tested(condition: Condition, reading: Reading, name: str, attr: Attribute | None) -> tuple[bool, str]:
    """Whether the reading passes, and the test in words (the wanted value left out for attributes that identify people)."""
    tests = condition.children if condition.op in ("one_value", "all_values") else (condition,)
    hidden = attr is not None and attr.disclosure == "closed"
    words = " and ".join(_words(each, hidden) for each in tests)
    text = f"{name} {'(every value) ' if condition.op == 'all_values' else ''}{words}"
    if condition.op == "all_values":
        return bool(reading.values) and all(all(_passes(t, value) for t in tests) for value in reading.values), text
    if any(each.op in ("present", "absent") for each in tests):
        return all(reading.there == (each.op == "present") for each in tests), text
    if condition.op == "not_equals":
        # "differs" means that no value is equal; a missing value differs from nothing.
        return bool(reading.values) and all(_passes(condition, value) for value in reading.values), text
    return any(all(_passes(each, value) for each in tests) for value in reading.values), text


def _words(test: Condition, hidden: bool) -> str:
    if test.op in ("present", "absent"):
        return test.op
    return f"{test.op} {'…' if hidden else _constant(test.value)}"


def _constant(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_constant(each) for each in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _passes(test: Condition, value: Any) -> bool:
    op, wanted = test.op, test.value
    if op == "in":
        return any(_equal(value, each, test.ignoring_case) for each in wanted)
    if op in ("equals", "not_equals"):
        return _equal(value, wanted, test.ignoring_case) == (op == "equals")
    if op in ("contains", "matches"):
        return isinstance(value, str) and _text_passes(op, value, wanted, test.ignoring_case)
    return _comparable(value, wanted) and _ordered(op, value, wanted)


def _equal(value: Any, wanted: Any, ignoring_case: bool) -> bool:
    if isinstance(value, str) and isinstance(wanted, str):
        return value.casefold() == wanted.casefold() if ignoring_case else value == wanted
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, float) and isinstance(wanted, float):
        return _close(value, wanted)
    return type(value) is type(wanted) and bool(value == wanted)


def _close(value: float, wanted: float) -> bool:
    # A slice thickness sent as a 32-bit float is 1.2000000477; it is still 1.2.
    return math.isclose(value, wanted, rel_tol=1e-6)


def _comparable(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and not isinstance(value, (str, bool))


def _ordered(op: str, value: Any, wanted: Any) -> bool:
    near = isinstance(value, float) and _close(value, wanted)
    if op in ("at_least", "at_most"):
        return near or bool(value >= wanted if op == "at_least" else value <= wanted)
    return not near and bool(value > wanted if op in ("greater", "after") else value < wanted)


def _text_passes(op: str, value: str, wanted: str, ignoring_case: bool) -> bool:
    if op == "contains":
        return (wanted.casefold() in value.casefold()) if ignoring_case else (wanted in value)
    # Text that came in with a broken character set may hold lone surrogates, which RE2 cannot be given.
    return pattern(wanted, ignoring_case).search(value.encode("utf-8", "replace").decode()) is not None


@lru_cache(maxsize=256)
def pattern(text: str, ignoring_case: bool) -> Any:
    """A compiled regular expression. Raises ConditionError when it is too long or not RE2 syntax.

    RE2 takes time linear in the text, so no pattern in a workflow and no text from a scanner can hold up the engine.
    """
    if len(text) > LONGEST_PATTERN:
        raise ConditionError(condition="matches", reason=f"the pattern is longer than {LONGEST_PATTERN} characters")
    options = re2.Options()
    options.case_sensitive = not ignoring_case
    options.log_errors = False
    options.max_mem = 1 << 20
    try:
        return re2.compile(text, options)
    except re2.error as error:
        said = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ConditionError(condition="matches", reason=f"the pattern is not a regular expression (RE2): {said}") from None
