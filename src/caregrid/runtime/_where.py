"""The small language of an input's ``where``: which series it takes. The words are those of workflow conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from caregrid.errors import ManifestInvalid

Test = Callable[[list[Any], Any], bool]


def check(where: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """Why a series with ``header`` (DICOM keyword → plain value) is not taken; empty when it is.

    where: keyword → the value wanted, or {operator: operand, …}. An attribute with several values passes when any one of
    them does (not_equals: when none is equal). Text is compared without case and outer blanks.
    Raises ManifestInvalid for an unknown operator.
    """
    for keyword, wanted in where.items():
        tests = wanted if isinstance(wanted, Mapping) else {"equals": wanted}
        values = _values(header.get(keyword))
        for operator, operand in tests.items():
            if not _test(operator, keyword)(values, operand):
                return f"{keyword} does not meet {operator} {_shown(operand)}"
    return ""


def _test(operator: str, keyword: str) -> Test:
    try:
        return _TESTS[operator]
    except KeyError:
        known = ", ".join(_TESTS)
        raise ManifestInvalid(
            file="algorithm.toml", reason=f"{keyword}: unknown operator {operator}; known are {known}"
        ) from None


def _values(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _shown(operand: Any) -> str:
    return ", ".join(map(str, operand)) if isinstance(operand, list | tuple) else str(operand)


def _same(value: Any, operand: Any) -> bool:
    if isinstance(value, str) and isinstance(operand, str):
        return value.strip().casefold() == operand.strip().casefold()
    number, other = _number(value), _number(operand)
    return number == other if number is not None and other is not None else bool(value == operand)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _compare(test: Callable[[float, float], bool]) -> Test:
    def any_value(values: list[Any], operand: Any) -> bool:
        limit = _number(operand)
        numbers = [number for value in values if (number := _number(value)) is not None]
        return limit is not None and any(test(number, limit) for number in numbers)

    return any_value


def _in(values: list[Any], operand: Any) -> bool:
    return any(_same(value, one) for value in values for one in _values(operand))


def _contains(values: list[Any], operand: Any) -> bool:
    """Some value is, or as text holds, the operand."""
    wanted = str(operand).strip().casefold()
    return any(wanted in str(value).casefold() if isinstance(value, str) else _same(value, operand) for value in values)


def _matches(values: list[Any], operand: Any) -> bool:
    return any(re.search(str(operand), str(value), re.IGNORECASE) is not None for value in values)


_TESTS: dict[str, Test] = {
    "equals": lambda values, operand: any(_same(value, operand) for value in values),
    "not_equals": lambda values, operand: not any(_same(value, operand) for value in values),
    "in": _in,
    "contains": _contains,
    "matches": _matches,
    "at_least": _compare(lambda value, limit: value >= limit),
    "at_most": _compare(lambda value, limit: value <= limit),
    "greater": _compare(lambda value, limit: value > limit),
    "less": _compare(lambda value, limit: value < limit),
    "present": lambda values, operand: bool(values) == bool(operand),
    "absent": lambda values, operand: bool(values) != bool(operand),
}
