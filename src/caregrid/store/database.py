"""The site's database: SQLite (WAL, synchronous FULL, BEGIN IMMEDIATE) or PostgreSQL, through SQLAlchemy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from caregrid.store import tables


def open_engine(url: str, pool_size: int = 10) -> sa.Engine:
    """A SQLAlchemy engine for ``url`` (``sqlite:///…`` or ``postgresql+psycopg://…``) with caregrid's durability settings."""
    if url.startswith("sqlite"):
        return _sqlite(url)
    return sa.create_engine(url, pool_size=pool_size, max_overflow=20, pool_pre_ping=True, hide_parameters=True)


def _sqlite(url: str) -> sa.Engine:
    # Parameters are hidden in errors, since they hold patient data.
    # A read that becomes a write must hold the write lock from its first statement: busy_timeout does not help
    # a transaction that has to upgrade (SQLITE_BUSY comes at once).
    engine = sa.create_engine(url, connect_args={"timeout": 30}, pool_size=10, max_overflow=20, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("pragma journal_mode=wal")
        cursor.execute("pragma synchronous=full")
        cursor.execute("pragma busy_timeout=30000")
        cursor.execute("pragma foreign_keys=on")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # Readers ask for a deferred transaction (see ``reading``); everything else may write.
        deferred = connection.get_execution_options().get("caregrid_reading", False)
        connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")

    return engine


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A connection for reading only: it never waits for, or blocks, a writer."""
    with engine.connect().execution_options(caregrid_reading=True) as connection:
        yield connection
        connection.rollback()


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that may write; committed when the block ends, rolled back when it raises."""
    with engine.begin() as connection:
        yield connection


def create_all(engine: sa.Engine) -> None:
    """Make every table that is missing (tests and throw-away sites; installed sites migrate with ``migrate``)."""
    tables.metadata.create_all(engine)
