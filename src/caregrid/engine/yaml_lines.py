"""YAML read with line numbers, and every problem of a file gathered instead of only the first.

Only PyYAML's composer is used, so no object is ever built from the file; aliases, duplicate keys and unknown keys are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

from caregrid.engine.attributes import did_you_mean
from caregrid.errors import WorkflowInvalid

LONGEST_FILE = 64 << 10
DEEPEST = 32
Node = yaml.nodes.Node

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class Problems:
    """What is wrong with a file: (line, text), in any order while gathering."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[tuple[int, str]] = []

    def add(self, where: Node | int, text: str) -> None:
        """Note a problem at a node, or at a line (from 1)."""
        entry = (where if isinstance(where, int) else line_of(where), text)
        if entry not in self.found:
            self.found.append(entry)

    def raise_if_any(self) -> None:
        """Raise WorkflowInvalid for the first line with a problem; all are in its ``problems``."""
        if self.found:
            raise invalid(self.file, sorted(self.found))


def invalid(file: str, problems: list[tuple[int, str]]) -> WorkflowInvalid:
    """The error for a file: line and reason of the first problem, all of them in details."""
    line, reason = problems[0]
    return WorkflowInvalid(file=file, line=line, reason=reason, problems=tuple(problems))


def line_of(node: Node) -> int:
    """The line a node starts on, from 1."""
    return int(node.start_mark.line) + 1


def compose(text: str, file: str) -> Node:
    """The root node. Raises WorkflowInvalid for text that is not one plain, small YAML document without aliases."""
    if len(text) > LONGEST_FILE:
        raise invalid(file, [(1, f"the file is longer than {LONGEST_FILE >> 10} KiB")])
    try:
        _check_events(text, file)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise invalid(file, [((mark.line if mark else 0) + 1, f"not YAML: {said}")]) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        said = str(error).splitlines()[0] if str(error) else "not readable"
        raise invalid(file, [(1, f"not YAML: {said}")]) from None
    if root is None:
        raise invalid(file, [(1, "the file is empty")])
    return root


def _check_events(text: str, file: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise invalid(file, [(line, "anchors and aliases are not used in workflows; write the value out")])
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise invalid(file, [(line, f"nested deeper than {DEEPEST} levels")])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def pairs(node: Node | None, what: str, problems: Problems, known: Collection[str] | None = None) -> dict[str, tuple[Node, Node]]:
    """A mapping as key → (key node, value node). Notes what is no mapping, a duplicate key, or a key not in ``known``."""
    if not isinstance(node, yaml.MappingNode):
        if node is not None:
            problems.add(node, f"{what} must be a mapping (key: value)")
        return {}
    found: dict[str, tuple[Node, Node]] = {}
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else ""
        if not name:
            problems.add(key, f"{what}: a key must be a plain word")
        elif name in found:
            problems.add(key, f"{what}: {name} is given twice (first on line {line_of(found[name][0])})")
        elif known is not None and name not in known:
            problems.add(key, f"{what}: unknown key {name}{did_you_mean(name, list(known))}")
        else:
            found[name] = (key, value)
    return found


def items(node: Node | None) -> list[Node]:
    """The elements of a list; a single value counts as a list of one."""
    if node is None or is_null(node):
        return []
    return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]


def is_null(node: Node) -> bool:
    """Whether the value was left out (``key:``) or is null."""
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def text_of(node: Node | None, what: str, problems: Problems, default: str = "", longest: int = 500) -> str:
    """A scalar as text, trimmed; the default when absent."""
    if node is None or is_null(node):
        return default
    if not isinstance(node, yaml.ScalarNode):
        problems.add(node, f"{what} must be a text")
        return default
    value = str(node.value).strip()
    if len(value) > longest:
        problems.add(node, f"{what} is longer than {longest} characters")
    return value[:longest]


def texts_of(node: Node | None, what: str, problems: Problems) -> tuple[str, ...]:
    """A text or a list of texts; empty ones are problems."""
    found = []
    for item in items(node):
        value = text_of(item, what, problems)
        if value:
            found.append(value)
        elif isinstance(item, yaml.ScalarNode):
            problems.add(item, f"{what} holds an empty value")
    return tuple(found)


def flag_of(node: Node | None, what: str, problems: Problems, default: bool) -> bool:
    """true or false."""
    if node is None or is_null(node):
        return default
    value = str(node.value).lower() if isinstance(node, yaml.ScalarNode) else ""
    if value not in (*_TRUE, *_FALSE):
        problems.add(node, f"{what} must be true or false")
    return value in _TRUE if value in (*_TRUE, *_FALSE) else default


def number_in(text: str) -> float | None:
    """The decimal number written in ``text``, or None. (YAML 1.1 would read 12:30 as 750.)"""
    return float(text) if _NUMBER.match(text) and abs(float(text)) != float("inf") else None


def scalar_of(node: Node) -> float | bool | str:
    """A scalar by the type it is written as: number, true/false, else text (always text when quoted)."""
    value = str(node.value)
    if getattr(node, "style", None) in ("'", '"', "|", ">"):
        return value
    if node.tag == "tag:yaml.org,2002:bool":
        return value.lower() in _TRUE
    number = number_in(value)
    return value.strip() if number is None else number


def plain(node: Node, what: str, problems: Problems) -> Any:
    """A value as JSON knows it: mapping, list, text, number (int when whole and written so), true/false, None."""
    if isinstance(node, yaml.MappingNode):
        return {key: plain(value, what, problems) for key, (_, value) in pairs(node, what, problems).items()}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item, what, problems) for item in node.value]
    if is_null(node):
        return None
    value = scalar_of(node)
    return int(str(node.value)) if isinstance(value, float) and re.fullmatch(r"[-+]?\d{1,18}", str(node.value)) else value
