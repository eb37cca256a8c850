"""QIDO-RS (PS3.18 10.6): matching on the indexed attributes, over what was received and what caregrid made.

Matching follows PS3.4 C.2.2.2: single value, list of UID, universal, wildcard (``*`` and ``?``) and range; text is
compared exactly, names without regard to case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from pydicom.datadict import dictionary_has_tag, tag_for_keyword

from caregrid.errors import QueryInvalid
from caregrid.intake import _dicomweb_index as index
from caregrid.intake._dicomweb_index import LEVELS, Attribute

#: Rows of one answer when the client sets no limit, or a larger one; a Warning header tells of the rest.
MOST_ROWS = 20_000

_TAG = re.compile(r"[0-9A-Fa-f]{8}")
_CONTROL = frozenset({"limit", "offset", "fuzzymatching", "includefield", "accept", "charset", "emptyvaluematching"})


@dataclass
class Query:
    """A search as asked. level: study, series or instance; matches: attribute → value; notes: what was not done as asked."""

    level: str
    study_uid: str = ""
    series_uid: str = ""
    matches: list[tuple[Attribute, str]] = field(default_factory=list)
    limit: int = MOST_ROWS
    offset: int = 0
    notes: list[str] = field(default_factory=list)


def parse(level: str, parameters: Iterable[tuple[str, str]], study_uid: str = "", series_uid: str = "") -> Query:
    """A query from the address's parameters. Raises QueryInvalid for what is no DICOM attribute or no number."""
    query = Query(level, study_uid, series_uid)
    for name, value in parameters:
        lower = name.lower()
        if lower in ("limit", "offset"):
            _count(query, lower, value)
        elif lower == "fuzzymatching":
            if value.lower() == "true":
                query.notes.append("The fuzzymatching parameter is not supported. Only literal matching has been performed.")
        elif lower == "includefield":
            for each in value.split(","):
                _check_field(each.strip())
        elif lower not in _CONTROL:
            _match(query, name, value)
    return query


def _count(query: Query, name: str, value: str) -> None:
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise QueryInvalid(reason=f"{name} must be a whole number, 0 or more")
    if name == "limit":
        query.limit = min(int(value), MOST_ROWS)
    else:
        query.offset = int(value)


def _check_field(name: str) -> None:
    if name and name != "all":
        tag_of(name)


def tag_of(name: str) -> str:
    """The tag (8 hex digits) of a keyword or tag; of a path within a sequence, the first. Raises QueryInvalid."""
    first = name.split(".")[0]
    if _TAG.fullmatch(first):
        return first.upper()
    tag = tag_for_keyword(first)
    if tag is None or not dictionary_has_tag(tag):
        raise QueryInvalid(reason="a parameter is neither a DICOM keyword nor a tag")
    return f"{tag:08X}"


def _match(query: Query, name: str, value: str) -> None:
    tag = tag_of(name)
    attribute = next((each for each in index.matchable(query.level) if each.tag == tag), None)
    if attribute is None or "." in name:
        query.notes.append(f"The attribute {tag} is not matched on.")
    elif value not in ("", "*"):
        query.matches.append((attribute, value))


def search(connection: sa.Connection, query: Query) -> list[dict[str, Any]]:
    """The rows that match, keyword → value, in a fixed order; at most the limit (``notes`` tells when there are more)."""
    statement, columns = index.statement(query.level, query.study_uid, query.series_uid)
    for attribute, value in query.matches:
        statement = statement.where(condition(columns[attribute.keyword], attribute.vr, value, connection.dialect.name))
    rows = connection.execute(statement.limit(query.limit + 1).offset(query.offset)).mappings().all()
    if len(rows) > query.limit and query.limit:
        query.notes.append("There are additional results that can be requested.")
    return [dict(row) for row in rows[: query.limit]]


def condition(column: sa.ColumnElement[Any], vr: str, value: str, dialect: str) -> sa.ColumnElement[bool]:
    """What a row must meet for its ``column`` of ``vr`` to match ``value``. Raises QueryInvalid for a number that is none."""
    if vr == "UI":
        return column.in_([uid for uid in re.split(r"[,\\]", value) if uid])
    if vr in ("DA", "TM") and "-" in value:
        return _within(column, vr, value)
    if vr == "IS":
        return column == _whole(value)
    if vr == "MULTI":
        return sa.or_(*(_one_of(column, each) for each in re.split(r"[,\\]", value) if each))
    if vr == "CS":
        return sa.or_(*(_text(column, each, dialect) for each in re.split(r"[,\\]", value) if each))
    if vr == "PN":
        return _text(sa.func.lower(column), value.lower(), dialect)
    return _text(column, value, dialect)


def _whole(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise QueryInvalid(reason="a number is expected") from None
    if abs(number) >= 1 << 31:
        raise QueryInvalid(reason="a number is out of range")
    return number


def _within(column: sa.ColumnElement[Any], vr: str, value: str) -> sa.ColumnElement[bool]:
    first, _, last = (part.replace(":", "") for part in value.partition("-"))
    bounds: list[sa.ColumnElement[bool]] = [column != ""]
    if first:
        bounds.append(column >= first)
    if last:
        # A time is compared as precisely as it is given: -1200 takes in 120059.
        bounds.append(column <= (last + "~" if vr == "TM" else last))
    return sa.and_(*bounds)


def _one_of(column: sa.ColumnElement[Any], value: str) -> sa.ColumnElement[bool]:
    listed = sa.literal("\\").concat(column).concat("\\")
    return listed.contains(f"\\{value}\\", autoescape=True)


def _text(column: sa.ColumnElement[Any], value: str, dialect: str) -> sa.ColumnElement[bool]:
    if "*" not in value and "?" not in value:
        return column == value
    if dialect == "sqlite":
        # LIKE knows no case there.
        return column.op("GLOB")(value.replace("[", "[[]"))
    escaped = re.sub(r"([/%_])", r"/\1", value)
    return column.like(escaped.replace("*", "%").replace("?", "_"), escape="/")


def as_json(query: Query, row: dict[str, Any], root: str) -> dict[str, Any]:
    """A row as DICOM JSON with the attributes of its level (PS3.18 tables 10.6.3-3 to -5). root: address of the service."""
    shown: dict[str, Any] = {"00080005": {"vr": "CS", "Value": ["ISO_IR 192"]}, "00080056": {"vr": "CS", "Value": ["ONLINE"]}}
    for level in _levels_shown(query):
        for attribute in LEVELS[level]:
            shown[attribute.tag] = attribute.as_json(row.get(attribute.keyword))
    shown["00081190"] = {"vr": "UR", "Value": [index.address(query.level, row, root)]}
    return dict(sorted(shown.items()))


def _levels_shown(query: Query) -> list[str]:
    """The level asked for, and those above it which the address does not fix."""
    levels = [query.level]
    if query.level == "instance" and not query.series_uid:
        levels.append("series")
    if query.level != "study" and not query.study_uid:
        levels.append("study")
    return levels
