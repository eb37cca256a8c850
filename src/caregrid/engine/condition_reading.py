"""Conditions read from YAML and checked: keywords against the DICOM dictionary, values against the type of the attribute."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time
from typing import Any

import yaml

from caregrid.domain.workflow import Condition
from caregrid.engine import yaml_lines as lines
from caregrid.engine.attributes import COUNTED, Attribute, age_in_years, attribute, did_you_mean
from caregrid.engine.conditions import LOGIC, TESTS, TESTS_BY_KIND, pattern
from caregrid.engine.yaml_lines import Node, Problems
from caregrid.errors import ConditionError

_SERIES = ("any_series", "all_series")
_INSTANCES = ("any_instance", "all_instances")
_TOP = (*LOGIC, "study", *_SERIES, *_INSTANCES, "result")
_MODIFIERS = ("ignoring_case", "all_values")
_TYPE_HINT = {
    "number": "a number",
    "age": "an age such as 45Y, 6M or a number of years",
    "date": "a date such as 2024-01-31",
    "time": "a time such as 08:30",
    "datetime": "a date and time such as 2024-01-31T08:30 (local clock, no offset)",
    "text": "a text",
}


class ConditionReader:
    """Reads condition trees of one file. results: whether values of earlier tasks may be asked for (only in branches).

    result_refs: (task id, line) of each ``result`` read, for the check that the task exists.
    """

    def __init__(self, problems: Problems, results: bool = False) -> None:
        self.problems = problems
        self.results = results
        self.result_refs: list[tuple[str, int]] = []

    def condition(self, node: Node | None, what: str) -> Condition | None:
        """A condition on a study: logic, ``study``, ``any_series`` and so on. None when absent or wholly unreadable."""
        return self._tree(node, what, self._top_entry)

    def series_tests(self, node: Node | None, what: str) -> Condition | None:
        """Tests on one series, as in a select task."""
        return self._tree(node, what, self._level_entry("series"))

    def _tree(self, node: Node | None, what: str, entry: Callable[[str, Node, Node], Condition | None]) -> Condition | None:
        if node is None:
            return None
        children = self._children(node, what, entry)
        if not children:
            self._empty(node, what)
            return None
        return children[0] if len(children) == 1 else Condition("all", tuple(children), line=lines.line_of(node))

    def _empty(self, node: Node, what: str) -> None:
        at = lines.line_of(node)
        if not any(line >= at for line, _ in self.problems.found):
            self.problems.add(node, f"{what} holds no condition")

    def _children(self, node: Node, what: str, entry: Callable[[str, Node, Node], Condition | None]) -> list[Condition]:
        """Conditions of a mapping (each key one) or of a list of mappings."""
        if isinstance(node, yaml.SequenceNode):
            trees = [self._tree(item, what, entry) for item in node.value]
            return [each for each in trees if each is not None]
        found = [entry(name, key, value) for name, (key, value) in lines.pairs(node, what, self.problems).items()]
        return [each for each in found if each is not None]

    def _logic(self, op: str, key: Node, value: Node, entry: Callable[[str, Node, Node], Condition | None]) -> Condition | None:
        children = self._children(value, op, entry)
        if not children:
            self._empty(value, op)
            return None
        return Condition(op, tuple(children), line=lines.line_of(key))

    def _top_entry(self, name: str, key: Node, value: Node) -> Condition | None:
        if name in LOGIC:
            return self._logic(name, key, value, self._top_entry)
        if name == "result":
            return self._result(key, value)
        if name in _TOP:
            return self._logic(name, key, value, self._level_entry(_level_of(name)))
        self.problems.add(key, f"unknown condition {name}{self._top_hint(name)}")
        return None

    def _top_hint(self, name: str) -> str:
        try:
            attribute(name)
        except ConditionError:
            return did_you_mean(name, _TOP)
        return f"; an attribute is asked of a level: study: {{{name}: …}} or any_series: {{{name}: …}}"

    def _level_entry(self, level: str) -> Callable[[str, Node, Node], Condition | None]:
        """How keys inside a level are read: logic, instances of a series, or tests on attributes."""

        def entry(name: str, key: Node, value: Node) -> Condition | None:
            if name in LOGIC:
                return self._logic(name, key, value, entry)
            if name in _INSTANCES and level != "instance":
                return self._logic(name, key, value, self._level_entry("instance"))
            if name in _TOP:
                self.problems.add(key, f"{name} cannot stand inside {level} conditions")
                return None
            return self._attribute(name, key, value, level)

        return entry

    def _attribute(self, name: str, key: Node, value: Node, level: str) -> Condition | None:
        try:
            attr = attribute(name)
        except ConditionError as error:
            self.problems.add(key, str(error.details["reason"]))
            return None
        if COUNTED.get(attr.name, level) != level:
            self.problems.add(key, f"{attr.name} is counted over a {COUNTED[attr.name]}, not over {level}")
            return None
        return self._tests(attr.name, attr, key, value)

    def _result(self, key: Node, value: Node) -> Condition | None:
        if not self.results:
            self.problems.add(key, "result can only be asked in the cases of a branch")
            return None
        entries = lines.pairs(value, "result", self.problems)
        if "task" not in entries:
            self.problems.add(value, "result needs task: the id of the run task that gave the value")
            return None
        task = lines.text_of(entries.pop("task")[1], "task", self.problems)
        self.result_refs.append((task, lines.line_of(value)))
        tests = [self._tests(name, None, each_key, each) for name, (each_key, each) in entries.items()]
        children = tuple(each for each in tests if each is not None)
        if not tests:
            self.problems.add(value, "result asks for no value")
        return Condition("result", children, task=task, line=lines.line_of(key)) if children else None

    # tests ------------------------------------------------------------------------------------------------------------

    def _tests(self, name: str, attr: Attribute | None, key: Node, value: Node) -> Condition | None:
        """``X: CT`` equals, ``X: [CT, MR]`` in, ``X: {at_least: 1, at_most: 5}`` one value passing all of them."""
        line = lines.line_of(key)
        if isinstance(value, yaml.SequenceNode):
            return self._one(name, attr, "in", value, line, False)
        if isinstance(value, yaml.ScalarNode):
            if lines.is_null(value):
                self.problems.add(key, f"{name} asks for nothing; write present or absent as {name}: {{present: true}}")
                return None
            return self._one(name, attr, "equals", value, line, False)
        entries = lines.pairs(value, name, self.problems, (*TESTS, *_MODIFIERS))
        if "all_values" in entries:
            return self._all_values(name, attr, entries, line)
        return self._several("one_value", name, attr, entries, value, line)

    def _all_values(
        self, name: str, attr: Attribute | None, entries: dict[str, tuple[Node, Node]], line: int
    ) -> Condition | None:
        key, value = entries["all_values"]
        if len(entries) > 1:
            self.problems.add(key, "all_values stands alone; put the other tests inside it")
        inner = lines.pairs(value, "all_values", self.problems, (*TESTS, "ignoring_case"))
        if presence := [each for each in inner if each in ("present", "absent")]:
            self.problems.add(key, f"{presence[0]} cannot be asked of every value")
            return None
        return self._several("all_values", name, attr, inner, value, line)

    def _several(
        self, op: str, name: str, attr: Attribute | None, entries: dict[str, tuple[Node, Node]], node: Node, line: int
    ) -> Condition | None:
        entries = dict(entries)
        case = entries.pop("ignoring_case", None)
        ignoring = lines.flag_of(case[1] if case else None, "ignoring_case", self.problems, False)
        if {"present", "absent"} & set(entries) and len(entries) > 1:
            self.problems.add(node, f"{name}: present and absent stand alone")
            return None
        tests = [self._one(name, attr, each, value, line, ignoring) for each, (_, value) in entries.items()]
        children = tuple(each for each in tests if each is not None)
        if not entries:
            self.problems.add(node, f"{name} asks for nothing")
        if len(children) == 1 and op == "one_value":
            return children[0]
        return Condition(op, children, name, line=line) if children else None

    def _one(self, name: str, attr: Attribute | None, op: str, node: Node, line: int, ignoring: bool) -> Condition | None:
        kind = attr.kind if attr else "unknown"
        if op not in TESTS_BY_KIND[kind]:
            allowed = ", ".join(TESTS_BY_KIND[kind])
            self.problems.add(node, f"{name} is {_article(kind)}, which {op} cannot judge; use one of: {allowed}")
            return None
        if op in ("present", "absent"):
            wanted = lines.flag_of(node, f"{name} {op}", self.problems, True)
            return Condition(op if wanted else {"present": "absent", "absent": "present"}[op], (), name, line=line)
        before = len(self.problems.found)
        value = self._value(name, kind, op, node, ignoring)
        if len(self.problems.found) > before:
            return None
        return Condition(op, (), name, value, line=line, ignoring_case=ignoring)

    def _value(self, name: str, kind: str, op: str, node: Node, ignoring: bool) -> Any:
        if op == "in":
            if not isinstance(node, yaml.SequenceNode) or not node.value:
                self.problems.add(node, f"{name} in needs a list of values")
                return ()
            return tuple(self._constant(name, kind, item) for item in node.value)
        value = self._constant(name, "text" if op in ("contains", "matches") else kind, node)
        if op in ("at_least", "at_most", "greater", "less") and isinstance(value, (str, bool)) and kind == "unknown":
            self.problems.add(node, f"{name} {op} needs a number, not {value}")
        if op == "matches" and isinstance(value, str):
            try:
                pattern(value, ignoring)
            except ConditionError as error:
                self.problems.add(node, f"{name}: {error.details['reason']}")
        return value

    def _constant(self, name: str, kind: str, node: Node) -> Any:
        """A wanted value, decoded to the attribute's type."""
        if not isinstance(node, yaml.ScalarNode) or lines.is_null(node):
            self.problems.add(node, f"{name} must be compared with a single value")
            return None
        text = str(node.value).strip()
        if kind == "unknown":
            return lines.scalar_of(node)
        try:
            return _CONSTANTS[kind](text)
        except ValueError:
            self.problems.add(node, f"{name} is compared with {text!r}, which is not {_TYPE_HINT[kind]}")
            return None


def _level_of(name: str) -> str:
    return "series" if name in _SERIES else "instance" if name in _INSTANCES else "study"


def _article(kind: str) -> str:
    return {"opaque": "a sequence or binary", "unknown": "of unknown type", "age": "an age"}.get(kind, f"a {kind}")


def _number(text: str) -> float:
    number = lines.number_in(text)
    if number is None:
        raise ValueError(text)
    return number


def _age(text: str) -> float:
    number = lines.number_in(text)
    return age_in_years(text) if number is None else number


def _datetime(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is not None:
        raise ValueError(text)
    return value


def _time(text: str) -> time:
    value = time.fromisoformat(text)
    if value.tzinfo is not None:
        raise ValueError(text)
    return value


_CONSTANTS: dict[str, Callable[[str], Any]] = {
    "number": _number,
    "age": _age,
    "date": date.fromisoformat,
    "time": _time,
    "datetime": _datetime,
    "text": str,
}
