"""The condition expressions of MONAI Deploy workflows, read into conditions of ours (as the YAML would hold them).

Written by hand: the language is one level of comparisons joined by AND and OR, with one kind of bracket and one kind of
reference; a grammar for a parser generator would be as long as the parser, and one more library to keep.

    or   := and (OR and)*          and := term (AND term)*          term := "(" or ")" | operand operator operand
    operand := {{ reference }} | 'text' | number | NULL | [ text, … ]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from caregrid.engine.attributes import Attribute, attribute
from caregrid.errors import ConditionError

#: A condition that never holds: what stands in for one that cannot be said, so that nothing runs by mistake.
NEVER: dict[str, Any] = {"not": {"study": {"NumberOfStudyRelatedInstances": {"at_least": 0}}}}

PATIENT_DETAILS = {
    "patient_id": "PatientID",
    "id": "PatientID",
    "patient_name": "PatientName",
    "name": "PatientName",
    "patient_sex": "PatientSex",
    "sex": "PatientSex",
    "patient_dob": "PatientBirthDate",
    "dob": "PatientBirthDate",
    "patient_age": "PatientAge",
    "age": "PatientAge",
}

_TOKEN = re.compile(
    r"""\s*(?:(?P<ref>\{\{(?P<path>[^{}]*)\}\})
    |(?P<text>'[^']*'|"[^"]*"|[“”][^“”]*[“”]|‘[^‘’]*’)
    |(?P<op>==|!=|>=|=>|<=|=<|>|<)
    |(?P<mark>[()\[\],])
    |(?P<number>[-+]?\d+(?:\.\d+)?(?![\w.]))
    |(?P<word>[A-Za-z_]+))""",
    re.VERBOSE,
)
_SERIES_TAG = re.compile(r"context\.dicom\.series\.(any|all)\(\s*'([0-9A-Fa-f]{4})'\s*,\s*'([0-9A-Fa-f]{4})'\s*\)\Z")
_STUDY_TAG = re.compile(r"context\.dicom\.tags\[\s*\(?'([0-9A-Fa-f]{4})'?\s*,\s*'?([0-9A-Fa-f]{4})'\)?\s*\]\Z")
_PATIENT = re.compile(r"context\.input\.patient_details\.(\w+)\Z")
_RESULT = re.compile(r"context\.executions\.([\w-]+)\.result(?:\.([\w-]+)|\['([\w-]+)'\])\Z")

_SWAPPED = {">": "<", "<": ">", ">=": "<=", "<=": ">=", "==": "==", "!=": "!="}
_ALIASES = {"=>": ">=", "=<": "<="}
_ORDER = {">": "greater", "<": "less", ">=": "at_least", "<=": "at_most"}
_DATE_ORDER = {**_ORDER, ">": "after", "<": "before"}

LONGEST = 4000
DEEPEST = 20


class Untranslatable(Exception):
    """A part of an expression has no equivalent; the argument says why."""


@dataclass
class Translation:
    """A condition as YAML data; notes: what means something slightly different; tasks: whose results it asks for."""

    condition: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Ref:
    path: str


@dataclass(frozen=True)
class _Null:
    pass


Operand = _Ref | _Null | str | float | list[str]


def translate(expression: str) -> Translation:
    """One expression. Raises Untranslatable for what cannot be said or is not of the language."""
    if len(expression) > LONGEST:
        raise Untranslatable(f"the expression is longer than {LONGEST} characters")
    parser = _Parser(_tokens(expression))
    condition = parser.either()
    parser.end()
    return Translation(condition, list(dict.fromkeys(parser.notes)), list(dict.fromkeys(parser.tasks)))


def _tokens(expression: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while expression[at:].strip():
        token = _TOKEN.match(expression, at)
        if not token or token.lastgroup is None:
            raise Untranslatable(f"cannot be read from {expression[at : at + 20].strip()!r} on")
        kind = "ref" if token["ref"] else token.lastgroup
        found.append((kind, token["path"].strip() if kind == "ref" else token[kind]))
        at = token.end()
    return found


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.notes: list[str] = []
        self.tasks: list[str] = []

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.at += 1
        return token

    def word(self, *words: str) -> bool:
        """Take the next token when it is one of these words (in any case)."""
        kind, text = self.peek()
        if kind == "word" and text.upper() in words:
            self.at += 1
            return True
        return False

    def end(self) -> None:
        kind, text = self.peek()
        if kind != "end":
            raise Untranslatable(f"something follows the condition: {text!r}")

    def either(self) -> dict[str, Any]:
        parts = [self.both()]
        while self.word("OR"):
            parts.append(self.both())
        if len(parts) > 1 and any("all" in part for part in parts):
            self.notes.append("AND is taken before OR, as usual; put brackets where the original meant otherwise")
        return parts[0] if len(parts) == 1 else {"any": parts}

    def both(self) -> dict[str, Any]:
        parts = [self.term()]
        while self.word("AND"):
            parts.append(self.term())
        return parts[0] if len(parts) == 1 else {"all": parts}

    def term(self) -> dict[str, Any]:
        if self.peek() == ("mark", "("):
            self.depth += 1
            if self.depth > DEEPEST:
                raise Untranslatable("brackets are nested too deeply")
            self.at += 1
            inner = self.either()
            if self.take() != ("mark", ")"):
                raise Untranslatable("a bracket is not closed")
            self.depth -= 1
            return inner
        left = self.operand()
        op = self.operator()
        return self.comparison(left, op, self.operand())

    def operator(self) -> str:
        if self.word("NOT"):
            if self.word("CONTAINS"):
                return "NOT_CONTAINS"
            raise Untranslatable("NOT is only known before CONTAINS")
        kind, text = self.take()
        if kind == "op":
            return _ALIASES.get(text, text)
        if kind == "word" and text.upper() in ("CONTAINS", "NOT_CONTAINS"):
            return text.upper()
        raise Untranslatable(f"{text or 'the end'!r} stands where a comparison was expected")

    def operand(self) -> Operand:
        kind, text = self.take()
        if kind == "ref":
            return _Ref(text)
        if kind == "text":
            return text[1:-1]
        if kind == "number":
            return float(text)
        if kind == "word":
            return _Null() if text.upper() == "NULL" else text
        if (kind, text) == ("mark", "["):
            return self.listed()
        raise Untranslatable(f"{text or 'the end'!r} stands where a value was expected")

    def listed(self) -> list[str]:
        found = []
        while self.peek() != ("mark", "]"):
            kind, text = self.take()
            if kind not in ("text", "number", "word"):
                raise Untranslatable("a list holds something that is no text or number")
            found.append(text[1:-1] if kind == "text" else text)
            if self.peek() == ("mark", ","):
                self.at += 1
        self.at += 1
        return found

    def comparison(self, left: Operand, op: str, right: Operand) -> dict[str, Any]:
        if isinstance(right, _Ref) and not isinstance(left, _Ref):
            # 'x' CONTAINS {{ ref }} asks whether the value is in it either way round; the others turn.
            left, op, right = right, _SWAPPED.get(op, op), left
        if not isinstance(left, _Ref) or isinstance(right, _Ref):
            raise Untranslatable("compares two references, or two fixed values")
        negated = op == "NOT_CONTAINS"
        found = self.reference(left.path, "CONTAINS" if negated else op, right)
        return {"not": found} if negated else found

    def reference(self, path: str, op: str, value: Operand) -> dict[str, Any]:
        path = re.sub(r"\s+", "", path)
        if found := _SERIES_TAG.match(path):
            attr = _known(f"({found[2]},{found[3]})")
            test = self.tested(attr, op, value)
            return {"any_series" if found[1] == "any" else "all_series": {attr.name: test}}
        if found := _STUDY_TAG.match(path):
            attr = _known(f"({found[1]},{found[2]})")
            return {"study": {attr.name: self.tested(attr, op, value)}}
        if (found := _PATIENT.match(path)) and found[1] in PATIENT_DETAILS:
            attr = _known(PATIENT_DETAILS[found[1]])
            return {"study": {attr.name: self.tested(attr, op, value)}}
        if found := _RESULT.match(path):
            self.tasks.append(found[1])
            return {"result": {"task": found[1], (found[2] or found[3]): _result_test(op, value)}}
        raise Untranslatable(f"{path} has no counterpart")

    def tested(self, attr: Attribute, op: str, value: Operand) -> Any:
        """The test on a DICOM attribute, by the attribute's type instead of as texts."""
        if isinstance(value, _Null):
            return _presence(op)
        if attr.kind in ("number", "age", "date", "time", "datetime") and op != "CONTAINS":
            self.notes.append(f"{attr.name} is compared as a {attr.kind}, not as text")
        if isinstance(value, list):
            return _membership(attr.kind, op, value)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        if op == "!=":
            self.notes.append("a missing value differed there; here a test on a missing value is false")
            return {"not_equals": text}
        if op == "==":
            return text
        if op == "CONTAINS":
            if attr.kind != "text":
                raise Untranslatable(f"{attr.name} is a {attr.kind}, which cannot contain text")
            return {"contains": text}
        if attr.kind == "text":
            raise Untranslatable(f"{attr.name} is a text, which has no order")
        return {(_DATE_ORDER if attr.kind in ("date", "time", "datetime") else _ORDER)[op]: text}


def _known(tag: str) -> Attribute:
    try:
        return attribute(tag)
    except ConditionError as error:
        raise Untranslatable(str(error.details["reason"])) from None


def _presence(op: str) -> dict[str, Any]:
    if op not in ("==", "!="):
        raise Untranslatable(f"NULL cannot be compared with {op}")
    return {"absent" if op == "==" else "present": True}


def _membership(kind: str, op: str, values: list[str]) -> Any:
    if op not in ("CONTAINS", "==") or not values:
        raise Untranslatable("a list can only be asked whether it contains a value")
    return {"in": values}


def _result_test(op: str, value: Operand) -> Any:
    if isinstance(value, _Null):
        return _presence(op)
    if isinstance(value, list):
        return {"in": [_typed(each) for each in value]} if value and op == "CONTAINS" else _no_list(op)
    wanted = _typed(value)
    if op in ("==", "!="):
        return {"equals" if op == "==" else "not_equals": wanted}
    if op == "CONTAINS":
        return {"contains": str(value)}
    if not isinstance(wanted, float):
        raise Untranslatable(f"{wanted} is no number to order by")
    return {_ORDER[op]: wanted}


def _no_list(op: str) -> Any:
    raise Untranslatable(f"a list cannot be compared with {op}")


def _typed(value: str | float | Any) -> float | bool | str:
    """Results are numbers, texts and true/false here; the expressions hold only texts."""
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return float(text) if re.fullmatch(r"[-+]?\d{1,15}(\.\d{1,15})?", text) else text
