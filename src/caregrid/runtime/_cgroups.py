"""Memory and process limits by control group, version 1 or 2, where this machine lets us make one."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MOUNTS, _OWN = Path("/proc/self/mounts"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Bases:
    """Folders under which groups can be made: one for memory and pids (version 2), or one each (version 1)."""

    version: int
    memory: Path
    pids: Path


@functools.cache
def bases() -> Bases | None:
    """Where groups can be made and joined; None when nowhere (then memory is limited by address space)."""
    for found in (*_version_2(), *_version_1()):
        if _usable(found):
            return found
    return None


class Group:
    """A control group for one sandbox: at most memory_mb (no swap) and ``processes`` processes and threads."""

    def __init__(self, base: Bases, name: str, memory_mb: int, processes: int) -> None:
        self.version = base.version
        self.memory, self.pids = base.memory / name, base.pids / name
        for folder in self.folders:
            folder.mkdir()
        if base.version == 2:
            _write(self.memory / "memory.max", memory_mb << 20)
            _write_if_there(self.memory / "memory.swap.max", 0)
            _write_if_there(self.memory / "memory.oom.group", 1)
        else:
            _write(self.memory / "memory.limit_in_bytes", memory_mb << 20)
            _write_if_there(self.memory / "memory.memsw.limit_in_bytes", memory_mb << 20)
        _write(self.pids / "pids.max", processes)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.memory,) if self.memory == self.pids else (self.memory, self.pids)

    def joining(self, command: list[str]) -> list[str]:
        """``command``, started inside this group."""
        script = 'for f in "$1" "$2"; do echo $$ >"$f" || exit 97; done; shift 2; exec "$@"'
        procs = [str(folder / "cgroup.procs") for folder in (self.memory, self.pids)]
        return ["/bin/sh", "-c", script, "sh", *procs, *command]

    def kills_for_memory(self) -> int:
        """How many processes of the group the kernel has killed for want of memory."""
        file = self.memory / ("memory.events" if self.version == 2 else "memory.oom_control")
        with contextlib.suppress(OSError):
            for line in file.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def kill(self) -> None:
        """Kill every process of the group, also those made meanwhile."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = [int(line) for folder in self.folders for line in _lines(folder / "cgroup.procs")]
            if not found:
                return
            for process in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    def remove(self) -> None:
        """Take the (empty) group away."""
        for folder in self.folders:
            _remove(folder)


def sweep(prefix: str, living: set[str]) -> None:
    """Take away empty groups named ``prefix`` + id + … that a killed process left behind; living: ids still in use."""
    found = bases()
    for base in {found.memory, found.pids} if found else set():
        for folder in base.glob(f"{prefix}*"):
            if folder.name.removeprefix(prefix).partition("-")[0] not in living:
                _remove(folder)


def _remove(folder: Path) -> None:
    for _attempt in range(20):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)  # the kernel needs a moment after the last process has gone
        else:
            return


def _version_2() -> Iterator[Bases]:
    for mount, kind, _options in _mounts():
        for line in _lines(_OWN) if kind == "cgroup2" else []:
            if line.startswith("0::"):
                own = Path(mount + line[3:]).resolve()
                # A group that holds processes cannot have limited children; a delegated parent can (systemd: DelegateSubgroup).
                yield from (Bases(2, base, base) for base in (own, own.parent) if base.is_relative_to(mount))


def _version_1() -> Iterator[Bases]:
    places: dict[str, tuple[str, str]] = {}
    for line in _lines(_OWN):
        _number, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            for mount, kind, options in _mounts():
                if kind == "cgroup" and controller and controller in options:
                    places[controller] = (mount, path)
    if "memory" in places and "pids" in places:
        (memory, memory_path), (pids, pids_path) = places["memory"], places["pids"]
        yield Bases(1, Path(memory + memory_path), Path(pids + pids_path))
        yield Bases(1, Path(memory), Path(pids))  # in a container the own path may lie outside what is mounted


def _mounts() -> Iterator[tuple[str, str, list[str]]]:
    for line in _lines(_MOUNTS):
        _device, mount, kind, options = line.split()[:4]
        yield mount, kind, options.split(",")


def _usable(base: Bases) -> bool:
    name = f"caregrid-probe-{uuid.uuid4().hex[:12]}"
    if base.version == 2:
        with contextlib.suppress(OSError):
            _write(base.memory / "cgroup.subtree_control", "+memory +pids")
    try:
        group = Group(base, name, 64, 16)
    except OSError:
        for folder in (base.memory / name, base.pids / name):
            if folder.is_dir():
                _remove(folder)
        return False
    done = subprocess.run(group.joining(["/bin/true"]), check=False, capture_output=True)
    group.remove()
    return done.returncode == 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _write(path: Path, value: object) -> None:
    path.write_text(str(value))


def _write_if_there(path: Path, value: object) -> None:
    with contextlib.suppress(OSError):
        if path.exists():
            _write(path, value)
