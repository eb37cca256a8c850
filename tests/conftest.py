"""Fixtures every room's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from caregrid.store.database import create_all, open_engine
from tests.support.ports import free_port as find_free_port
from tests.support.postgres import new_database, postgres


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty site database on SQLite."""
    engine = open_engine(f"sqlite:///{tmp_path}/site.db")
    create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server; skips where it is not installed."""
    with postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/both.db"
    return new_database(request.getfixturevalue("postgres_server"))


@pytest.fixture
def free_port() -> int:
    """A TCP port nobody listens on."""
    return find_free_port()
