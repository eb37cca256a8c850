"""One hospital put together: the only file that knows which parts are real.

A site is a folder with ``site.toml``, a database and a store. It runs as a few processes — receiver, web, supervisor,
workers — each of which may be killed at any moment and started again; ``keep`` does that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import structlog

from caregrid import __version__
from caregrid.config import read_site
from caregrid.domain.settings import Destination, SiteSettings
from caregrid.engine import reviews, runs
from caregrid.engine.completion import Completion, release
from caregrid.engine.durable import Queue, Worker, prepare_schema
from caregrid.engine.flow import RunFlow
from caregrid.engine.heartbeat import Heartbeat, take_over_dead
from caregrid.engine.judge import Judge
from caregrid.engine.kept import KeptResults
from caregrid.engine.outbox import Commit, Courier, Outbox, resend
from caregrid.engine.supervisor import Supervisor
from caregrid.engine.tasks import Equipment, Tasks
from caregrid.engine.withdraw import Withdrawal
from caregrid.errors import NotFound
from caregrid.plugs import load
from caregrid.registry.registry import Registry
from caregrid.results import warm_up
from caregrid.runtime.runtime import Runtime
from caregrid.store.database import open_engine
from caregrid.store.instances import InstanceStore, record_rejection
from caregrid.store.migrate import migrate
from caregrid.store.senders import allow_sender, is_allowed

if TYPE_CHECKING:
    import sqlalchemy as sa
    from fastapi import FastAPI

    from caregrid.web.actions import Actions

log = structlog.get_logger()


class Site:
    """A site's parts, made when first asked for."""

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings

    @classmethod
    def open(cls, home: Path) -> Site:
        """The site at ``home``. Raises SiteMissing and the other ConfigErrors."""
        return cls(read_site(home))

    @property
    def folder(self) -> Path:
        """Where instances, results and quarantine lie."""
        return self.settings.data / "store"

    @cached_property
    def engine(self) -> sa.Engine:
        """The site's database."""
        self.settings.data.mkdir(parents=True, exist_ok=True)
        return open_engine(self.settings.database_url)

    @cached_property
    def store(self) -> InstanceStore:
        """Where received objects are kept."""
        return InstanceStore(self.engine, self.folder, self.settings.engine.free_bytes_floor)

    @cached_property
    def registry(self) -> Registry:
        """The site's signed models."""
        return Registry(self.engine, self.settings.data / "models")

    @cached_property
    def queue(self) -> Queue:
        """The durable queue."""
        return Queue(self.engine)

    @cached_property
    def kept(self) -> KeptResults:
        """What runs have made."""
        return KeptResults(self.folder)

    @cached_property
    def equipment(self) -> Equipment:
        """How the site names itself in results."""
        return Equipment(
            institution=self.settings.institution,
            station_name=self.settings.station_name,
            device_serial=self.settings.name,
            software_version=__version__,
        )

    @cached_property
    def judge(self) -> Judge:
        """Judges complete studies."""
        return Judge(self.engine, self.folder, self.registry, self.queue, off_peak=self.settings.engine.off_peak)

    def prepare(self) -> None:
        """Make or upgrade the database and the store's folders."""
        self.settings.data.mkdir(parents=True, exist_ok=True)
        migrate(self.engine)
        prepare_schema(self.engine)
        self.store.sweep()

    # the processes --------------------------------------------------------------------------------------------------

    def run(self, role: str) -> None:
        """Be one of the site's processes until told to stop."""
        {"receiver": self.run_receiver, "web": self.run_web, "supervisor": self.run_supervisor, "worker": self.run_worker}[role]()

    def run_receiver(self) -> None:
        """The DIMSE and folder doors."""
        self.store.sweep()
        door = load("intake", "dimse").DimseDoor(
            self.settings.dimse,
            self.store.receive,
            allowed=lambda ae, ip: is_allowed(self.engine, ae, ip),
            rejected=self._rejected,
            spool=self.folder / "tmp",
        )
        doors = [door]
        if self.settings.folder.path:
            doors.append(load("intake", "folder").FolderDoor(self.settings.folder, self.store.receive, self._rejected))
        # The DIMSE door may fork, so it comes before any thread of ours.
        for each in doors:
            each.start()
        with self._beating("receiver"):
            wait_for_stop()
            for each in doors:
                each.stop()
        self.store.close()

    def run_web(self) -> None:
        """The web app, with the DICOMweb door and the viewer."""
        import uvicorn

        web = self.settings.web
        tls: dict[str, Any] = {}
        if web.tls:
            tls = {"ssl_certfile": str(web.tls.certificate), "ssl_keyfile": str(web.tls.key)}
        with self._beating("web"):
            uvicorn.run(
                self.app(), host=web.host, port=web.port, log_level="warning", access_log=False, server_header=False, **tls
            )

    def run_supervisor(self) -> None:
        """Completion, judging, takeover, off-peak release and the outbox."""
        supervisor = self.supervisor()
        with self._beating("supervisor"):
            thread = threading.Thread(target=supervisor.run, name="supervisor")
            thread.start()
            wait_for_stop()
            supervisor.stop()
            thread.join(timeout=30)

    def run_worker(self) -> None:
        """Runs algorithms."""
        name = process_name("worker")
        settings = self.settings.engine
        with self._beating("worker", name):
            runtime = self.runtime()
            warm_up()
            worker = Worker(self.engine, self.flow(runtime), name, settings.slots, settings.poll_seconds)
            worker.start()
            wait_for_stop()
            worker.stop()
            runtime.close()

    @contextlib.contextmanager
    def _beating(self, role: str, name: str | None = None) -> Iterator[None]:
        heart = Heartbeat(self.engine, name or process_name(role), role, self.settings.engine.heartbeat_seconds)
        heart.start()
        try:
            yield
        finally:
            heart.stop()

    # what they are made of ------------------------------------------------------------------------------------------

    def runtime(self) -> Runtime:
        """What runs algorithms; hands files over on the store's own disk."""
        return Runtime(self.settings.data / "scratch", self.settings.sandbox, self.settings.data / "environments")

    def flow(self, runtime: Runtime) -> RunFlow:
        """The flow that carries out runs."""
        names = [destination.name for destination in self.settings.destinations]
        tasks = Tasks(self.engine, self.folder, self.registry, runtime, self.kept, names, self.equipment)
        return RunFlow(self.engine, tasks.work, self.settings.engine.max_attempts)

    def supervisor(self) -> Supervisor:
        """The engine's own loop."""
        settings = self.settings.engine
        completion = Completion(self.engine, self.settings.completion, self.judge.study_closed, self._expected_count)
        duties: dict[str, Callable[[], object]] = {
            "completion": completion.tick,
            "takeover": lambda: take_over_dead(self.engine, self.queue, settings.dead_after_seconds),
            "off-peak": self.judge.release_off_peak,
        }
        return Supervisor(duties, self.outbox(), settings.poll_seconds)

    def outbox(self) -> Outbox:
        """A courier for every destination."""
        owner = process_name("courier")
        couriers = []
        for destination in self.settings.destinations:
            plug = load("results", destination.kind)
            commit = _commitment(plug, destination)
            couriers.append(Courier(self.engine, self.folder, destination, plug.send, owner, commit))
        return Outbox(couriers, self.settings.engine.poll_seconds)

    def withdrawal(self) -> Withdrawal:
        """Takes results back."""
        note = load("results", "dicom_kos").withdraw
        return Withdrawal(self.engine, self.folder, self.registry, self.kept, self.equipment, note)

    def actions(self) -> Actions:
        """What the web pages may do."""
        from caregrid.web.actions import Actions

        db, queue = self.engine, self.queue
        return Actions(
            decide=lambda run_id, task_id, decision, who, reason, corrections: reviews.decide(
                db, queue, run_id, task_id, decision, who, reason, corrections
            ),
            retry_run=lambda run_id, who, why: runs.retry(db, queue, run_id, who, why),
            cancel_run=lambda run_id, who, why: runs.cancel(db, queue, run_id, who, why),
            resend=lambda delivery_id, who, why: resend(db, delivery_id, who, why),
            release_study=lambda uid, proceed, who, why: release(db, uid, proceed, who, why),
            withdraw=lambda run_id, who, why: self.withdrawal().withdraw(run_id, who, why),
            allow_sender=lambda ae, address, who, why: allow_sender(db, ae, address, who, why),
            echo=self.echo,
        )

    def app(self) -> FastAPI:
        """The web app of the site."""
        from caregrid.web.app import create_app

        return create_app(self.engine, self.folder, self.settings, self.actions(), extra=self._add_dicomweb)

    def _add_dicomweb(self, app: FastAPI) -> None:
        from caregrid.web.auth import authorise_dicomweb
        from caregrid.web.viewer import mount

        if not self.settings.web.dicomweb:
            return
        door = load("intake", "dicomweb").router(
            self.engine, self.store, self.store.receive, self.settings.web, authorise_dicomweb
        )
        app.include_router(door, prefix="/dicom-web")
        mount(app, "/viewer", "/dicom-web")

    def echo(self, destination_name: str) -> str:
        """Ask a destination whether it is there; what it said, in words. Raises NotFound, DeliveryFailed."""
        destination = self._destination(destination_name)
        return str(load("results", destination.kind).echo(destination))

    def _destination(self, name: str) -> Destination:
        for destination in self.settings.destinations:
            if destination.name == name:
                return destination
        raise NotFound(thing="destination", key=name)

    def _expected_count(self, destination_name: str, study_instance_uid: str) -> int | None:
        destination = self._destination(destination_name)
        if destination.kind != "cstore":
            return None
        count: int | None = load("results", "cstore").expected_instances(destination, study_instance_uid)
        return count

    def _rejected(self, source: Any, what: str, reason: str) -> None:
        record_rejection(self.engine, source, what, reason)

    def close(self) -> None:
        """Let the database go."""
        if "queue" in self.__dict__:
            self.queue.close()
        if "engine" in self.__dict__:
            self.engine.dispose()


def _commitment(plug: ModuleType, destination: Destination) -> Commit | None:
    """How storage commitment is asked for, where the destination's protocol has it."""
    request = getattr(plug, "request_commitment", None)
    if request is None or destination.commitment_port is None:
        return request
    return functools.partial(request, listen=(destination.commitment_host, destination.commitment_port))


def process_name(role: str) -> str:
    """What this process is called in the database: no two that are alive share a name."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}"


def stop_signal() -> threading.Event:
    """An event that is set when the process is asked to end (SIGTERM, SIGINT)."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def wait_for_stop() -> None:
    """Return when the process is asked to end."""
    stop = stop_signal()
    while not stop.wait(1.0):
        if os.getppid() == 1 and os.environ.get("CAREGRID_KEPT"):
            # The keeper is gone; a process nobody keeps would run against an operator's wish.
            return


@dataclass
class _Kept:
    role: str
    process: subprocess.Popen[bytes]
    started: float
    restarts: int = 0


class Keeper:
    """Starts a site's processes and starts again what dies, with a growing pause for what dies at once.

    workers: how many worker processes; 0: as the settings say.
    """

    def __init__(self, settings: SiteSettings, workers: int = 0) -> None:
        self.settings = settings
        self.roles = ["receiver", "web", "supervisor"] + ["worker"] * (workers or settings.engine.workers)
        self.kept: list[_Kept] = []

    def start(self) -> None:
        """Start every process."""
        self.kept = [_Kept(role, self._spawn(role), time.monotonic()) for role in self.roles]

    def _spawn(self, role: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "caregrid.cli", "site", "part", role, "--home", str(self.settings.home)]
        return subprocess.Popen(command, env={**os.environ, "CAREGRID_KEPT": "1"}, stdin=subprocess.DEVNULL)

    def look(self) -> list[str]:
        """Start again what has died; the roles that had."""
        died = []
        for each in self.kept:
            if each.process.poll() is None:
                continue
            lived = time.monotonic() - each.started
            each.restarts = 0 if lived > 30 else each.restarts + 1
            if lived < min(2.0**each.restarts * 0.1, 30.0):
                continue
            died.append(each.role)
            log.warning("process died; starting it again", role=each.role, status=each.process.returncode)
            each.process, each.started = self._spawn(each.role), time.monotonic()
        return died

    def stop(self, seconds: float = 30.0) -> None:
        """Ask every process to end; kill what does not."""
        for each in self.kept:
            if each.process.poll() is None:
                each.process.terminate()
        deadline = time.monotonic() + seconds
        for each in self.kept:
            try:
                each.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    def run(self) -> None:
        """Keep the site going until told to stop."""
        stop = stop_signal()
        self.start()
        while not stop.wait(0.5):
            self.look()
        self.stop()
