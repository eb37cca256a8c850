"""Warm workers: one sandboxed process per model version, kept between studies, recycled after some studies or minutes."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import caregrid
from caregrid import errors
from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Findings
from caregrid.errors import (
    AlgorithmBroken,
    AlgorithmCancelled,
    AlgorithmFailed,
    AlgorithmOutOfMemory,
    AlgorithmTimedOut,
    RuntimeFailure,
)
from caregrid.registry.manifest import manifest_as_json
from caregrid.runtime import _cgroups
from caregrid.runtime._spool import Home, Spool
from caregrid.runtime.exchange import read_findings
from caregrid.runtime.sandbox import FILE_MB, PROCESSES, Cage, Ended, Python, Sandboxed, Starter

START_SECONDS = 180.0
OUTGOING_MB = 4096

#: Errors a worker may report by name, and which of their details are believed (cut short).
_REPORTED = {
    "VolumeRefused": ("code", "reason"),
    "PixelsUndecodable": ("transfer_syntax", "reason"),
    "NoSuitableInput": ("input", "reason"),
    "InputRefused": ("reason",),
    "ManifestInvalid": ("file", "reason"),
    "AlgorithmBroken": ("reason",),
}


@dataclass(frozen=True)
class Answer:
    """What one run gave. worker: its process id outside the sandbox; worker_studies: how many it has done, with this one."""

    findings: Findings
    algorithm_seconds: float
    prepare_seconds: float = 0.0
    worker: int = 0
    worker_studies: int = 1
    files: tuple[Path, ...] = ()


class Worker:
    """One warm worker: a sandboxed process that has loaded one package and takes one study at a time."""

    def __init__(self, manifest: Manifest, package: Path, python: Python, home: Home, starter: Starter) -> None:
        self.manifest = manifest
        self.began = time.monotonic()
        self.studies = 0
        name = uuid.uuid4().hex[:8]
        self.spool = Spool(home.folder / name)
        cage = _cage(f"{home.mark}{home.id}-{name}", manifest, package, python, self.spool)
        command = [str(python.executable), "-s", "-P", "-B", "-m", "caregrid.runtime.worker"]
        self.process = Sandboxed(cage, command, starter)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        start = {"manifest": manifest_as_json(self.manifest), "limits": _limits(self.manifest)}
        try:
            self.process.send(json.dumps(start).encode())
            self.process.receive(START_SECONDS)
        except Ended as end:
            raise self._failure(end, START_SECONDS, starting=True) from end
        self.process.memory_kills_since_asked()

    def run(
        self,
        files_by_series: Mapping[str, Sequence[Path]],
        parameters: Mapping[str, Any],
        seconds: float,
        stop: Callable[[], bool] | None,
    ) -> Answer:
        """One study. The folders hold it only meanwhile."""
        job = uuid.uuid4().hex
        try:
            order = {"job": job, "series": self.spool.put(files_by_series), "parameters": dict(parameters)}
            self.process.send(json.dumps(order).encode())
            too_much = lambda: self.spool.outgoing_bytes() > OUTGOING_MB << 20  # noqa: E731
            said = self._understood(self.process.receive(seconds, stop, too_much), job)
            findings = read_findings(self.spool.outgoing, self.manifest)
        except Ended as end:
            raise self._failure(end, seconds) from end
        finally:
            self.spool.clear()
        self.studies += 1
        return Answer(
            findings,
            algorithm_seconds=_seconds(said.get("algorithm_seconds")),
            prepare_seconds=_seconds(said.get("prepare_seconds")),
            worker=self.process.pid,
            worker_studies=self.studies,
        )

    def _understood(self, line: bytes, job: str) -> dict[str, Any]:
        """The worker's answer, when it is about this job and says that it is done; raises the error it reports."""
        try:
            said = json.loads(line)
            fits = isinstance(said, dict) and said.get("job") == job
        except (ValueError, RecursionError):
            fits = False
        if not fits:
            raise self._error(AlgorithmBroken, reason="it spoke out of turn")
        if self.process.memory_kills_since_asked():
            raise self._error(AlgorithmOutOfMemory, memory_mb=self.manifest.resources.memory_mb)
        if said.get("done") is not True:
            raise self._reported(said)
        return dict(said)

    def _reported(self, said: dict[str, Any]) -> errors.CaregridError:
        kind = said.get("error")
        if kind == "MemoryError":
            return self._error(AlgorithmOutOfMemory, memory_mb=self.manifest.resources.memory_mb)
        if isinstance(kind, str) and kind in _REPORTED:
            given = said.get("details")
            details = {key: _short(given.get(key)) for key in _REPORTED[kind]} if isinstance(given, dict) else {}
            made: errors.CaregridError = getattr(errors, kind)(
                **{"name": self.manifest.name, "version": self.manifest.version, **details}
            )
            return made
        where = re.sub(r"[^\w/.:-]", "", str(said.get("where")))[:200]
        reason = _class_name(said.get("class")) + (f" at {where}" if where else "")
        return self._error(AlgorithmFailed, reason=reason)

    def _failure(self, end: Ended, seconds: float, starting: bool = False) -> RuntimeFailure:
        if end.how == "timeout":
            return self._error(AlgorithmTimedOut, seconds=round(seconds, 1))
        if end.how == "stopped":
            return self._error(AlgorithmCancelled)
        if end.how == "too-much":
            return self._error(AlgorithmFailed, reason=f"it wrote more than {OUTGOING_MB} MB")
        if end.how == "flood":
            return self._error(AlgorithmBroken, reason="it spoke out of turn")
        if end.memory or b"MemoryError" in end.errors.rstrip().rpartition(b"\n")[2] or b"std::bad_alloc" in end.errors:
            return self._error(AlgorithmOutOfMemory, memory_mb=self.manifest.resources.memory_mb)
        reason = how_it_ended(end.status)
        if starting:
            # Nothing of a patient has been handed in yet, so what it said may be shown.
            reason = f"it could not be loaded: {_last_line(end.errors) or reason}"
        return self._error(AlgorithmFailed, reason=reason)

    def _error(self, kind: type[RuntimeFailure], **details: Any) -> RuntimeFailure:
        return kind(name=self.manifest.name, version=self.manifest.version, **details)

    def close(self) -> None:
        """Stop the worker and remove its folders."""
        self.process.close()
        self.spool.remove()


class Workers:
    """The warm workers of a process, by model version. Safe to use from several threads: a worker is lent to one at a time."""

    def __init__(self, home: Home, recycle_studies: int = 200, recycle_minutes: float = 60, idle: int = 8) -> None:
        self.home = home
        self.recycle_studies, self.recycle_minutes, self.idle = recycle_studies, recycle_minutes, idle
        self.started = 0
        self._starter = Starter()
        self._idle: list[tuple[str, Worker]] = []  # longest idle first
        self._lock = threading.Lock()

    def run(
        self,
        manifest: Manifest,
        package: Path,
        python: Python,
        files_by_series: Mapping[str, Sequence[Path]],
        parameters: Mapping[str, Any],
        seconds: float,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Run one study in an idle worker of this model, or in a new one. A worker that failed is not used again."""
        key = f"{manifest.digest or package.resolve()} {python.executable}"
        worker = self._take(key) or self._new(manifest, package, python)
        reusable = False
        try:
            answer = worker.run(files_by_series, parameters, seconds, stop)
            reusable = True
            return answer
        except errors.InputRefused:
            reusable = worker.process.alive  # the study's fault, found before the algorithm was called
            raise
        finally:
            self._give_back(key, worker, reusable)

    def _take(self, key: str) -> Worker | None:
        stale: list[Worker] = []
        found = None
        with self._lock:
            for entry in [entry for entry in reversed(self._idle) if entry[0] == key]:
                self._idle.remove(entry)
                if self._fresh(entry[1]):
                    found = entry[1]
                    break
                stale.append(entry[1])
        for worker in stale:
            worker.close()
        return found

    def _new(self, manifest: Manifest, package: Path, python: Python) -> Worker:
        worker = Worker(manifest, package, python, self.home, self._starter)
        with self._lock:
            self.started += 1
        return worker

    def _give_back(self, key: str, worker: Worker, reusable: bool) -> None:
        stale = [] if reusable and self._fresh(worker) else [worker]
        with self._lock:
            if not stale:
                self._idle.append((key, worker))
            while len(self._idle) > self.idle:
                stale.append(self._idle.pop(0)[1])
        for old in stale:
            old.close()

    def _fresh(self, worker: Worker) -> bool:
        young = time.monotonic() - worker.began < self.recycle_minutes * 60
        return worker.process.alive and worker.studies < self.recycle_studies and young

    def close(self) -> None:
        """Stop every idle worker."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _key, worker in idle:
            worker.close()
        self._starter.close()


def how_it_ended(status: int | None) -> str:
    """An exit status in words: bwrap and podman report a signal as 128 + its number."""
    if status is None:
        return "it closed its output and was stopped"
    number = -status if status < 0 else status - 128
    if number > 0:
        with contextlib.suppress(ValueError):
            return f"it was ended by {signal.Signals(number).name}"
    return f"it ended with status {status} and no answer"


def _cage(name: str, manifest: Manifest, package: Path, python: Python, spool: Spool) -> Cage:
    source = Path(caregrid.__file__).parent
    return Cage(
        name=name,
        python=python,
        read_only={"/package": package, "/caregrid/caregrid": source, "/in": spool.incoming},
        writable={"/out": spool.outgoing},
        memory_mb=manifest.resources.memory_mb,
        cpus=manifest.resources.cpus,
        gpu=manifest.resources.gpu,
        tmp_mb=min(1024, manifest.resources.memory_mb // 2),
        environment={"PYTHONPATH": "/caregrid"},
    )


def _limits(manifest: Manifest) -> dict[str, int | None]:
    grouped = _cgroups.bases() is not None
    # Address space counts libraries and thread stacks too; a GPU's driver reserves far more than it uses.
    memory = None if grouped or manifest.resources.gpu else (manifest.resources.memory_mb + 512) << 20
    processes = None if grouped else PROCESSES
    return {"core": 0, "file": FILE_MB << 20, "files": 1024, "memory": memory, "processes": processes}


def _seconds(value: Any) -> float:
    return round(float(value), 6) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


def _short(value: Any) -> str:
    return "".join(letter for letter in str(value) if letter.isprintable())[:500]


def _class_name(value: Any) -> str:
    return re.sub(r"[^\w.]", "", str(value))[:80] or "an error"


def _last_line(content: bytes) -> str:
    lines = content.decode("utf-8", "replace").strip().splitlines()
    return _short(lines[-1])[:300] if lines else ""
