"""Bubblewrap around a process: no network, read-only root, nothing of the site but what is handed in, limits, and one hard kill.

What it holds back and why is in docs/why/sandbox.md; tests/unit/runtime/test_sandbox_escape.py tries to get out.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from caregrid.errors import ConfigError, SandboxMissing
from caregrid.runtime import _cgroups

PROCESSES = 512
FILE_MB = 4096
ERROR_BYTES = 8192
LINE_BYTES = 1 << 20
NOBODY = 65534


@dataclass(frozen=True)
class Python:
    """An interpreter to run inside: its path and the folders it needs to see."""

    executable: Path
    folders: tuple[Path, ...]

    @classmethod
    def own(cls) -> Python:
        """The interpreter and environment caregrid itself runs in."""
        return cls(Path(sys.executable), _outermost([Path(sys.prefix), Path(sys.base_prefix)]))

    @classmethod
    def of_environment(cls, folder: Path) -> Python:
        """The interpreter of a virtual environment; SandboxMissing when there is none at ``folder``."""
        executable = folder / "bin" / "python"
        if not executable.exists():
            raise SandboxMissing(sandbox=f"Python environment {folder.name}")
        return cls(executable, _outermost([folder, executable.resolve().parent.parent]))


@dataclass(frozen=True)
class Cage:
    """What a sandboxed process may see and use. binds: path inside → folder outside; only ``writable`` ones can be written.

    memory_mb: hard; tmp_mb: size of the private /tmp (memory too); processes: with threads.
    """

    name: str
    python: Python
    read_only: Mapping[str, Path]
    writable: Mapping[str, Path]
    memory_mb: int
    cpus: int
    gpu: bool = False
    tmp_mb: int = 1024
    processes: int = PROCESSES
    environment: Mapping[str, str] = field(default_factory=dict)


def require_bubblewrap() -> str:
    """The path of bwrap; SandboxMissing when it is not installed."""
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxMissing(sandbox="bubblewrap")
    return program


def bubblewrap(cage: Cage, command: Sequence[str]) -> list[str]:
    """The bwrap command line that runs ``command`` in ``cage``."""
    arguments = [
        require_bubblewrap(),
        "--unshare-user",
        "--unshare-all",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
    ]
    arguments += ["--cap-drop", "ALL", "--hostname", "caregrid", "--clearenv"]
    if os.getuid() == 0:
        arguments += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    for name, value in _environment(cage).items():
        arguments += ["--setenv", name, value]
    arguments += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for name in ("lib", "lib32", "lib64", "bin", "sbin"):
        arguments += _system_folder(name)
    for path in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts"):
        arguments += ["--ro-bind-try", path, path]
    arguments += ["--perms", "1777", "--size", str(cage.tmp_mb << 20), "--tmpfs", "/tmp"]  # noqa: S108 - made inside the sandbox
    arguments += ["--perms", "1777", "--size", str(cage.tmp_mb << 20), "--tmpfs", "/dev/shm"]  # noqa: S108
    for folder in cage.python.folders:
        arguments += ["--ro-bind", str(folder), str(folder)]
    for inside, outside in cage.read_only.items():
        arguments += ["--ro-bind", str(outside), inside]
    for inside, outside in cage.writable.items():
        arguments += ["--bind", str(outside), inside]
    for device in sorted(Path("/dev").glob("nvidia*")) if cage.gpu else []:
        arguments += ["--dev-bind-try", str(device), str(device)]
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--", *command]  # noqa: S108


def _system_folder(name: str) -> list[str]:
    """/lib and friends as this machine has them: links into /usr, or folders of their own."""
    path = Path("/", name)
    if path.is_symlink():
        return ["--symlink", os.readlink(path).lstrip("/"), str(path)]
    return ["--ro-bind", str(path), str(path)] if path.is_dir() else []


def _environment(cage: Cage) -> dict[str, str]:
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "CAREGRID_CPUS")
    return {
        "PATH": f"{cage.python.executable.parent}:/usr/bin:/bin",
        "HOME": "/tmp",  # noqa: S108
        "USER": "nobody",
        "LOGNAME": "nobody",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "MPLCONFIGDIR": "/tmp",  # noqa: S108
        "NUMBA_CACHE_DIR": "/tmp",  # noqa: S108
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        **dict.fromkeys(threads, str(cage.cpus)),
        **cage.environment,
    }


def check_apart(data: Path, python: Python) -> None:
    """Raise ConfigError when the site's data lie in a folder that every sandbox can read."""
    for folder in (Path("/usr"), *python.folders):
        if data.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(reason=f"the site's data must not lie in {folder}, which every algorithm can read")


class Ended(Exception):
    """The sandboxed process ended, was stopped, or went silent. how: exit, timeout, stopped, flood, too-much."""

    def __init__(self, how: str, status: int | None = None, memory: bool = False, errors: bytes = b"") -> None:
        super().__init__(how)
        self.how, self.status, self.memory, self.errors = how, status, memory, errors


class Sandboxed:
    """A process in a cage, talked to in lines. Everything it started ends with it."""

    def __init__(self, cage: Cage, command: Sequence[str], starter: Starter) -> None:
        whole = bubblewrap(cage, command)
        base = _cgroups.bases()
        self.group = _cgroups.Group(base, cage.name, cage.memory_mb, cage.processes) if base else None
        try:
            self.process = starter.start(self.group.joining(whole) if self.group else whole)
        except OSError:
            self._forget_group()
            raise
        self.errors, self._pending = b"", b""
        self._memory_kills = 0
        for pipe in (self._stdout, self._stderr):
            os.set_blocking(pipe.fileno(), False)

    @property
    def pid(self) -> int:
        """Process id outside the sandbox."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def send(self, line: bytes) -> None:
        """Write one line; Ended when the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self._ended("exit") from error

    def receive(self, seconds: float, stop: Callable[[], bool] | None = None, check: Callable[[], bool] | None = None) -> bytes:
        """The next line. Ended: after ``seconds``, when ``stop()`` or ``check()`` is true (asked often), or at its end.

        Whenever Ended is raised the process and all it started are gone.
        """
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._ended("timeout")
                self._take(selector, min(left, 0.25))
                if stop is not None and stop():
                    raise self._ended("stopped")
                if check is not None and check():
                    raise self._ended("too-much")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _take(self, selector: selectors.BaseSelector, seconds: float) -> None:
        for key, _events in selector.select(seconds):
            pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
            content = os.read(pipe.fileno(), 65536)
            if pipe is self._stderr:
                self.errors = (self.errors + content)[-ERROR_BYTES:]
                if not content:
                    selector.unregister(pipe)
            elif not content:
                raise self._ended("exit")
            else:
                self._pending += content
                if len(self._pending) > LINE_BYTES:
                    raise self._ended("flood")

    def memory_kills_since_asked(self) -> int:
        """Processes killed for want of memory since this was last asked."""
        total = self.group.kills_for_memory() if self.group else 0
        new, self._memory_kills = total - self._memory_kills, total
        return new

    def close(self) -> int | None:
        """Kill it and everything it started; wait until they are gone. Returns the exit status it had."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.group:
            self.group.kill()
        self.process.wait()
        self._drain()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._forget_group()
        return status

    def _drain(self) -> None:
        """Read the error pipe to its end: it closes when the last process of the sandbox has gone."""
        deadline = time.monotonic() + 5
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            selector.register(self._stderr, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if selector.select(0.1):
                    content = os.read(self._stderr.fileno(), 65536)
                    if not content:
                        return
                    self.errors = (self.errors + content)[-ERROR_BYTES:]

    def _ended(self, how: str) -> Ended:
        if how == "exit":
            # The pipe closes a moment before the process can be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
        memory = self.memory_kills_since_asked() > 0
        status = self.close()
        return Ended(how, status, memory, self.errors)

    def _forget_group(self) -> None:
        if self.group:
            self.group.remove()

    @property
    def _stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def _stderr(self) -> IO[bytes]:
        assert self.process.stderr is not None
        return self.process.stderr


class Starter:
    """Starts processes from one thread that lives as long as they may.

    bwrap's --die-with-parent is tied to the thread that started it, not to the process: started from a passing worker thread, a
    sandbox would be killed when that thread ends.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sandbox-starter")

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start ``command`` with pipes, an empty environment and a process group of its own."""
        return self._thread.submit(self._start, list(command)).result()

    @staticmethod
    def _start(command: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, cwd="/", start_new_session=True)

    def close(self) -> None:
        """End the thread; sandboxes it started end with it."""
        self._thread.shutdown()


def _outermost(folders: Sequence[Path]) -> tuple[Path, ...]:
    """The folders without those inside another one or inside /usr, which is always there."""
    whole = [Path("/usr")]
    for folder in sorted({folder.resolve() for folder in folders} | set(folders)):
        if not any(folder.is_relative_to(other) for other in whole):
            whole.append(folder)
    return tuple(whole[1:])
