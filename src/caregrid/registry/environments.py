"""Private Python environments of a site, for packages whose pins would clash with caregrid's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from caregrid.errors import RegistryError
from caregrid.registry.manifest import NAME

#: What caregrid's part of the worker imports inside the environment.
_CHECK = "import sys, numpy, pydicom, PIL; assert sys.version_info >= (3, 11)"
_TIMEOUT_SECONDS = 3600


def create_environment(folder: Path, requirements: Path, python: Path | None = None) -> Path:
    """Make the virtual environment ``folder`` from a pip requirements file and return it.

    folder: ``<environments>/<name>``; the name is what ``environment`` in algorithm.toml says. python: the interpreter to build
    on (3.11 or newer), caregrid's own by default. Raises RegistryError when it is there already, pip fails, or a module that
    caregrid's worker needs is missing; nothing is left then. This is the only time anything is fetched for it.
    """
    if not NAME.match(folder.name):
        raise RegistryError(reason=f"{folder.name!r} is no name for an environment (lower-case letters, digits, hyphens)")
    if folder.exists():
        raise RegistryError(reason=f"environment {folder.name} is there already; a changed one needs another name")
    if not requirements.is_file():
        raise RegistryError(reason=f"there is no requirements file {requirements}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A virtual environment holds its own path in its scripts, so it is built in place and marked ready by being complete.
    try:
        _call([str(python or sys.executable), "-m", "venv", str(folder)], "venv")
        inside = str(folder / "bin" / "python")
        quiet = ["-q", "--disable-pip-version-check", "--no-input"]
        _call([inside, "-m", "pip", "install", *quiet, "-r", str(requirements.resolve())], "pip install")
        _call([inside, "-c", _CHECK], "the check that it holds Python 3.11, numpy, pydicom and pillow")
    except BaseException:
        _discard(folder)
        raise
    return folder


def environments(folder: Path) -> tuple[str, ...]:
    """The names of the environments made in ``folder``."""
    return tuple(sorted(path.parent.parent.name for path in folder.glob("*/bin/python")))


def _call(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise RegistryError(reason=f"{what} did not finish in {_TIMEOUT_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RegistryError(reason=f"{what} failed: {lines[-1][:500]}")


def _discard(folder: Path) -> None:
    """Out of the way at once, then removed, so that half an environment is never found under its name."""
    if folder.exists():
        away = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)
