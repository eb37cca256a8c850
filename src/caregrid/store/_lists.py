"""A page of a list, what a person asked of it, and the few ways the views read rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from caregrid.store.database import reading
from caregrid.store.tables import study

Row = dict[str, Any]

PAGE_SIZE = 25


@dataclass(frozen=True)
class Page:
    """One page of a longer list. number starts at 1; total counts the whole list."""

    items: list[Row]
    number: int
    total: int
    size: int = PAGE_SIZE

    @property
    def pages(self) -> int:
        """How many pages there are, at least one."""
        return max(1, -(-self.total // self.size))


@dataclass(frozen=True)
class Filter:
    """What a person asked a list for; an empty text means no such limit. search: patient ID, accession number, name, UID."""

    state: str = ""
    modality: str = ""
    search: str = ""
    source: str = ""


def matching(query: sa.Select[Any], asked: Filter) -> sa.Select[Any]:
    """The query limited to the modality and search text asked for."""
    if asked.modality:
        query = query.where(study.c.modalities.contains(asked.modality, autoescape=True))
    if asked.search:
        text = asked.search.strip()
        query = query.where(
            sa.or_(
                study.c.patient_id.startswith(text, autoescape=True),
                study.c.accession_number.startswith(text, autoescape=True),
                study.c.study_instance_uid == text,
                study.c.patient_name.icontains(text, autoescape=True),
            )
        )
    return query


def page_of(connection: sa.Connection, query: sa.Select[Any], number: int) -> Page:
    """One page of a query, and how long the whole is; a number past the end gives the last page."""
    total = connection.execute(sa.select(sa.func.count()).select_from(query.order_by(None).subquery())).scalar_one()
    number = min(max(1, number), max(1, -(-total // PAGE_SIZE)))
    items = rows_of(connection, query.limit(PAGE_SIZE).offset((number - 1) * PAGE_SIZE))
    return Page(items=items, number=number, total=total)


def of_study(connection: sa.Connection, table: sa.Table, study_uid: str, *order: Any) -> list[Row]:
    """A table's rows of one study, in order."""
    return rows_of(connection, sa.select(table).where(table.c.study_instance_uid == study_uid).order_by(*order))


def rows_of(connection: sa.Connection, query: sa.Select[Any]) -> list[Row]:
    """What a query finds, as dicts."""
    return [dict(row) for row in connection.execute(query).mappings()]


def all_of(engine: sa.Engine, query: sa.Select[Any]) -> list[Row]:
    """What a query finds, in a transaction of its own."""
    with reading(engine) as connection:
        return rows_of(connection, query)


def grouped(rows: Iterable[Any], key: str) -> defaultdict[str, list[Row]]:
    """Rows by the value of one of their columns."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(dict(row))
    return groups


def count(connection: sa.Connection, table: sa.Table, *where: Any) -> int:
    """How many of a table's rows hold to all of ``where``."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one())


def counts(connection: sa.Connection, column: sa.Column[str]) -> dict[str, int]:
    """How many rows have each value of a column."""
    rows = connection.execute(sa.select(column, sa.func.count()).group_by(column))
    return {str(value): int(n) for value, n in rows}
