"""The one way an algorithm is run, whatever its runner: inputs in, findings out, or a named error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Findings
from caregrid.errors import AlgorithmBroken, ConfigError
from caregrid.runtime import _cgroups
from caregrid.runtime._spool import Home
from caregrid.runtime._warm import Answer, Workers
from caregrid.runtime.container import Containers
from caregrid.runtime.map import Maps
from caregrid.runtime.sandbox import Python, check_apart, require_bubblewrap

SANDBOXES = ("bubblewrap",)

__all__ = ["SANDBOXES", "Answer", "Runtime"]


class Runtime:
    """Runs model packages. Call it from any thread; ``close`` when done.

    scratch: where files of a running study are handed over; on the disk of the instance store they are linked, not copied.
    environments: the site's private Python environments. recycle: a warm worker ends after this many studies or minutes.
    """

    def __init__(
        self,
        scratch: Path,
        sandbox: str = "bubblewrap",
        environments: Path | None = None,
        recycle_studies: int = 200,
        recycle_minutes: float = 60,
    ) -> None:
        if sandbox not in SANDBOXES:
            raise ConfigError(reason=f"sandbox {sandbox} is not one of {', '.join(SANDBOXES)}; there is no way to run without")
        self.environments = environments
        self._home = Home(scratch)
        self._workers = Workers(self._home, recycle_studies, recycle_minutes)
        self._containers = Containers(self._home)
        self._maps = Maps(self._containers)
        _cgroups.sweep(self._home.mark, self._home.living)

    def run(
        self,
        manifest: Manifest,
        package: Path,
        files_by_series: Mapping[str, Sequence[Path]],
        parameters: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Findings:
        """The findings of one model on one study; see ``answer``."""
        return self.answer(manifest, package, files_by_series, parameters, timeout_seconds, stop).findings

    def answer(
        self,
        manifest: Manifest,
        package: Path,
        files_by_series: Mapping[str, Sequence[Path]],
        parameters: Mapping[str, Any] | None = None,
        timeout_seconds: float | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Findings, the algorithm's own time and the worker that did it.

        files_by_series: Series Instance UID → the study's files. parameters: on top of the manifest's defaults.
        timeout_seconds: the smaller of this and the manifest's holds. stop: asked often; when true the algorithm is killed.
        Raises SandboxMissing, AlgorithmFailed, AlgorithmTimedOut, AlgorithmOutOfMemory, AlgorithmCancelled, AlgorithmBroken, and
        InputRefused (VolumeRefused, PixelsUndecodable, NoSuitableInput).
        """
        seconds = min(timeout_seconds or manifest.timeout_seconds, manifest.timeout_seconds)
        merged = {**manifest.parameters, **(parameters or {})}
        if manifest.runner == "map":
            answer = self._maps.run(manifest, package, files_by_series, seconds, stop)
        elif manifest.runner == "container":
            answer = self._containers.run(manifest, package, files_by_series, merged, seconds, stop)
        else:
            python = self._python(manifest)
            require_bubblewrap()
            check_apart(self._home.scratch, python)
            answer = self._workers.run(manifest, package, python, files_by_series, merged, seconds, stop)
        _check_sources(answer.findings, manifest, files_by_series)
        return answer

    def _python(self, manifest: Manifest) -> Python:
        if manifest.environment is None:
            return Python.own()
        return Python.of_environment((self.environments or Path("/nowhere")) / manifest.environment)

    @staticmethod
    def forget(answer: Answer) -> None:
        """Remove the files that came with an answer (runner map), once they are kept elsewhere."""
        for path in answer.files:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the warm workers and remove what was handed over."""
        self._workers.close()
        self._home.close()


def _check_sources(findings: Findings, manifest: Manifest, files_by_series: Mapping[str, Sequence[Path]]) -> None:
    """A segment must lie on a series that was handed in."""
    for segment in findings.segments:
        if segment.source_series not in files_by_series:
            reason = "a segment names a series that is not of this study"
            raise AlgorithmBroken(name=manifest.name, version=manifest.version, reason=reason)
