"""Fixtures every room's tests share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from caregrid.store.database import create_all, open_engine


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty site database on SQLite."""
    engine = open_engine(f"sqlite:///{tmp_path}/site.db")
    create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
