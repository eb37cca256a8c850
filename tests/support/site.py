"""A real site in a temporary folder, with a quick test algorithm signed and active."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from caregrid.engine.judge import add_workflow
from caregrid.setup import add_signed, init_site
from caregrid.site import Site
from caregrid.store.database import reading

PACKAGE = Path(__file__).parent / "packages" / "mean_value"

WORKFLOW = """\
workflow: mean-value
description: Mean pixel value of everything
owner: tests@caregrid.example
priority: {priority}
when:
  any_series: {{Modality: {{in: [CT, MR, CR, US]}}}}
tasks:
  - {{id: mean, kind: run, algorithm: mean-value, timeout: 60s, retry: {{attempts: 2, backoff: 1s}}, parameters: {parameters}}}
{review}  - {{id: send, kind: deliver, {after}results: [mean], formats: [dicom_sr, dicom_sc], destinations: [PACS]}}
"""


def workflow_text(*, priority: str = "routine", parameters: str = "{}", review: bool = False) -> str:
    """The test workflow; with ``review`` a clinician decides before anything is delivered."""
    ask = "  - {id: look, kind: review, of: [mean], roles: [clinician]}\n" if review else ""
    return WORKFLOW.format(priority=priority, parameters=parameters, review=ask, after="after: [look], " if review else "")


def settings_text(
    pacs_port: int,
    *,
    database: str = "",
    dimse_port: int = 0,
    web_port: int = 0,
    workers: int = 1,
    extra: str = "",
    quiet: float = 0.5,
) -> str:
    """site.toml of a test site whose PACS is a C-STORE destination."""
    return f"""
[site]
name = "Test Hospital"
{f'database = "{database}"' if database else ""}
[dimse]
host = "127.0.0.1"
port = {dimse_port}
[web]
port = {web_port}
[engine]
workers = {workers}
slots = 2
poll_seconds = 0.1
heartbeat_seconds = 0.5
dead_after_seconds = 3.0
free_bytes_floor = 1000000
[[completion]]
source = "*"
quiet_seconds = {quiet}
[[destination]]
name = "PACS"
kind = "cstore"
host = "127.0.0.1"
port = {pacs_port}
ae_title = "PACS"
timeout_seconds = 10
first_backoff_seconds = 0.5
longest_backoff_seconds = 2
{extra}
"""


def make_site(home: Path, settings: str, workflow: str = "", *, builtin: bool = False) -> Site:
    """A prepared site with the test package and, if given, a workflow."""
    init_site(home, "Test Hospital", builtin=builtin, who="test", settings=settings)
    site = Site.open(home)
    add_signed(site, PACKAGE, (home / "keys" / "site.key").read_bytes(), "test", "for tests")
    if workflow:
        add_workflow(site.engine, workflow, "test.yaml", "test", "for tests")
    return site


class Part:
    """One process of a site, to be killed and started again."""

    def __init__(self, home: Path, role: str) -> None:
        self.home, self.role = home, role
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        log = open(self.home / f"{self.role}.log", "ab")  # noqa: SIM115 - the child keeps it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "caregrid.cli", "site", "part", self.role, "--home", str(self.home)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """kill -9, as a crash would."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Ask it to end; whatever it started goes too."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@contextmanager
def running(site: Site, *roles: str) -> Iterator[dict[str, Part]]:
    """The site's processes; several of a role as ``worker``, ``worker#2``."""
    parts = {name: Part(site.settings.home, name.partition("#")[0]) for name in roles}
    for part in parts.values():
        part.start()
    try:
        if "receiver" in parts:
            wait_for(lambda: _listens(site.settings.dimse.port), 30, "the DIMSE door")
        if "web" in parts:
            wait_for(lambda: _listens(site.settings.web.port), 30, "the web app")
        yield parts
    finally:
        for part in parts.values():
            part.stop()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until ``holds()`` is true; AssertionError with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = holds()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come about within {seconds:g} s")


def rows(site: Site, query: str, **values: Any) -> list[dict[str, Any]]:
    """Rows of a query on the site's database."""
    with reading(site.engine) as connection:
        return [dict(row) for row in connection.execute(sa.text(query), values).mappings()]
