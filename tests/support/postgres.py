"""A throw-away PostgreSQL server of the tests' own (Debian's binaries, a data folder in tmp, a free port)."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.support.ports import free_port


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found and not shutil.which("initdb"):
        pytest.skip("PostgreSQL is not installed")
    return found[-1].parent if found else Path(str(shutil.which("initdb"))).parent


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of a running server (``postgresql+psycopg://…/postgres``)."""
    binaries, data, port = _binaries(), folder / "pg", free_port()
    as_user = _unprivileged(folder)
    run = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **as_user}
    subprocess.run([binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"], **run)  # type: ignore[call-overload]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c max_connections=200"
    subprocess.run([binaries / "pg_ctl", "-D", data, "-w", "-o", options, "start"], **run)  # type: ignore[call-overload]
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **(run | {"check": False}))  # type: ignore[call-overload]


def _unprivileged(folder: Path) -> dict[str, object]:
    """PostgreSQL will not run as root: root hands it to the postgres user."""
    if os.getuid() != 0:
        return {}
    account = pwd.getpwnam("postgres")
    for each in [folder, *folder.parents]:
        if each.stat().st_uid == 0 and each.is_relative_to("/tmp") and str(each) != "/tmp":
            each.chmod(each.stat().st_mode | 0o711)
    shutil.chown(folder, "postgres", "postgres")
    return {"user": account.pw_uid, "group": account.pw_gid}


def new_database(server_url: str) -> str:
    """An empty database on the server; its URL."""
    name = f"t{uuid.uuid4().hex[:12]}"
    plain = server_url.replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"create database {name}")  # type: ignore[call-overload]
    return server_url.rsplit("/", 1)[0] + f"/{name}"
