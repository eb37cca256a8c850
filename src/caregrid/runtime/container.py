"""Runner ``container``: an image, run once per study with podman; job.json and files in /in, findings.json in /out."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caregrid.domain.algorithm import Manifest
from caregrid.errors import (
    AlgorithmCancelled,
    AlgorithmFailed,
    AlgorithmOutOfMemory,
    AlgorithmTimedOut,
    RuntimeFailure,
    SandboxMissing,
)
from caregrid.runtime import _podman
from caregrid.runtime._spool import Home, Spool
from caregrid.runtime._warm import OUTGOING_MB, Answer, how_it_ended
from caregrid.runtime.exchange import read_findings

MIN_MEMORY_MB = 64


class Containers:
    """Images of packages on this machine, and runs of them. Safe to use from several threads."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._images: dict[str, str] = {}
        self._lock = threading.Lock()
        self._swept = False

    def run(
        self,
        manifest: Manifest,
        package: Path,
        files_by_series: Mapping[str, Sequence[Path]],
        parameters: Mapping[str, Any],
        seconds: float,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """One study in a fresh container."""
        image = self.image(manifest, package)
        with self.spool() as spool:
            job = {"parameters": dict(parameters), "series": spool.put(files_by_series, readable_by_all=True)}
            (spool.incoming / "job.json").write_text(json.dumps(job), encoding="utf-8")
            box = _podman.Box(
                image=image,
                label=self.label,
                mounts=[(spool.incoming, "/in", False), (spool.outgoing, "/out", True)],
                memory_mb=max(MIN_MEMORY_MB, manifest.resources.memory_mb),
                cpus=manifest.resources.cpus,
                seconds=seconds,
                gpu=manifest.resources.gpu,
            )
            took = run_box(manifest, box, spool, stop)
            return Answer(read_findings(spool.outgoing, manifest), algorithm_seconds=took)

    def image(self, manifest: Manifest, package: Path) -> str:
        """The id of the package's image, loaded from its archive if need be. AlgorithmFailed when it is not here."""
        key = f"{manifest.digest or package.resolve()} {manifest.entry}"
        with self._lock, podman_errors(manifest):
            self._sweep()
            if key not in self._images:
                archive = manifest.entry.endswith(".tar")
                self._images[key] = _podman.load(package / manifest.entry) if archive else _podman.image_id(manifest.entry)
            return self._images[key]

    @property
    def label(self) -> str:
        """What containers of this process are marked with."""
        return f"{self.home.mark}{self.home.id}"

    @contextmanager
    def spool(self) -> Iterator[Spool]:
        """Folders for one study, removed afterwards."""
        spool = Spool(self.home.folder / uuid.uuid4().hex[:8])
        spool.outgoing.chmod(0o777)  # the container's user is another; nobody else can reach it, its parent is ours alone
        try:
            yield spool
        finally:
            spool.clear()
            spool.remove()

    def _sweep(self) -> None:
        if not self._swept:
            _podman.sweep(self.home.mark, self.home.living)
            self._swept = True


def run_box(manifest: Manifest, box: _podman.Box, spool: Spool, stop: Callable[[], bool] | None) -> float:
    """Run a container and return the seconds it took; raises the named error for every other end than status 0."""
    began = time.monotonic()
    with podman_errors(manifest):
        end = _podman.run(box, stop, lambda: spool.outgoing_bytes() > OUTGOING_MB << 20, spool.folder)
    known = {"name": manifest.name, "version": manifest.version}
    if end.how == "timeout":
        raise AlgorithmTimedOut(**known, seconds=round(box.seconds, 1))
    if end.how == "stopped":
        raise AlgorithmCancelled(**known)
    if end.how == "too-much":
        raise AlgorithmFailed(**known, reason=f"it wrote more than {OUTGOING_MB} MB")
    if end.memory:
        raise AlgorithmOutOfMemory(**known, memory_mb=box.memory_mb)
    if end.status:
        raise AlgorithmFailed(**known, reason=how_it_ended(end.status))
    return round(time.monotonic() - began, 3)


@contextlib.contextmanager
def podman_errors(manifest: Manifest) -> Iterator[None]:
    """podman's own complaints as AlgorithmFailed; a missing podman stays SandboxMissing."""
    try:
        yield
    except SandboxMissing:
        raise
    except _podman.PodmanError as error:
        failure: RuntimeFailure = AlgorithmFailed(name=manifest.name, version=manifest.version, reason=f"podman: {error}")
        raise failure from error
