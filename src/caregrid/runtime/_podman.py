"""One container with podman, confined: no network, read-only root, no capabilities, limits, one hard kill. Nothing is pulled."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caregrid.errors import SandboxMissing
from caregrid.runtime.sandbox import FILE_MB, NOBODY, PROCESSES

LABEL = "caregrid.scratch"
COMMAND_SECONDS = 120.0
LOAD_SECONDS = 1800.0
_KILLED = 128 + signal.SIGKILL
_NOTHING = subprocess.DEVNULL


@dataclass(frozen=True)
class Box:
    """A container to be run. mounts: (outside, inside, writable). user "" is nobody. command empty: the image's own."""

    image: str
    label: str
    mounts: Sequence[tuple[Path, str, bool]]
    memory_mb: int
    cpus: int
    seconds: float
    gpu: bool = False
    shared_memory_mb: int = 64
    user: str = ""
    folder: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()


@dataclass(frozen=True)
class End:
    """How a container ended. how: exit, timeout, stopped, too-much."""

    how: str
    status: int = 0
    memory: bool = False


class PodmanError(Exception):
    """podman itself refused; the message is podman's, about images and settings, never about a patient."""


@functools.cache
def program() -> tuple[str, ...]:
    """podman with the runtime to use: runc where there is one, since crun refuses hosts with mixed control groups."""
    podman = shutil.which("podman")
    if podman is None:
        raise SandboxMissing(sandbox="podman")
    runc = shutil.which("runc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    return (podman, "--runtime", runc) if runc else (podman,)


def call(*arguments: str, seconds: float = COMMAND_SECONDS, folder: str = "/") -> str:
    """What podman said; PodmanError with the last line of its complaint. folder: where it is called."""
    try:
        command = [*program(), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=folder)
    except subprocess.TimeoutExpired as error:
        raise PodmanError(f"podman {arguments[0]} did not finish in {seconds:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise PodmanError(lines[-1][:500] if lines else f"podman {arguments[0]} ended with status {done.returncode}")
    return done.stdout.strip()


def image_id(reference: str) -> str:
    """The id of an image of this machine; PodmanError when it is not here."""
    return call("image", "inspect", "--format", "{{.Id}}", reference)


def load(archive: Path) -> str:
    """Load an image archive and return the image's id. What it calls itself is not used."""
    said = call("load", "--quiet", "--input", str(archive), seconds=LOAD_SECONDS)
    return image_id(said.splitlines()[-1].removeprefix("Loaded image: ").removeprefix("Loaded image(s): ").strip())


def image_settings(image: str) -> dict[str, Any]:
    """The image's own settings (User, Entrypoint, Cmd, Labels …)."""
    settings: dict[str, Any] = json.loads(call("image", "inspect", "--format", "{{json .Config}}", image))
    return settings


def read_files(image: str, paths: Sequence[str], folder: Path) -> dict[str, Path]:
    """Copy files out of an image without starting it; those that are there."""
    container = call("create", "--pull", "never", "--network", "none", *_ulimits(), image, "nothing")
    found = {}
    try:
        for number, path in enumerate(paths):
            with contextlib.suppress(PodmanError):
                call("cp", f"{container}:{path}", str(folder / str(number)))
                found[path] = folder / str(number)
    finally:
        call("rm", "--force", "--time", "0", container)
    return found


def run(box: Box, stop: Callable[[], bool] | None, too_much: Callable[[], bool], folder: Path) -> End:
    """Run the container to its end, or to box.seconds, or until ``stop()`` or ``too_much()``. Nothing of it is left.

    folder: where podman's monitor is started; it leaves a file there when memory runs out.
    """
    container = call("create", *_options(box), box.image, *box.command)
    try:
        call("init", container, folder=str(folder))
        killed = _MemoryKills(container, box.memory_mb << 20)
        command = [*program(), "start", "--attach", container]
        running = subprocess.Popen(command, stdin=_NOTHING, stdout=_NOTHING, stderr=_NOTHING, cwd=folder, start_new_session=True)
        try:
            how = _watch(running, box.seconds, stop, lambda: killed.look() or too_much())
        finally:
            running.kill()
            running.wait()
        state = json.loads(call("inspect", "--format", "{{json .State}}", container))
        status = int(state.get("ExitCode", -1))
        return End(how, status, bool(state.get("OOMKilled")) or (killed.seen and status == _KILLED))
    finally:
        call("rm", "--force", "--time", "0", container)


def _watch(
    running: subprocess.Popen[bytes], seconds: float, stop: Callable[[], bool] | None, too_much: Callable[[], bool]
) -> str:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.01)
            return "exit"
        if time.monotonic() > deadline:
            return "timeout"
        if stop is not None and stop():
            return "stopped"
        if too_much():
            return "too-much"


class _MemoryKills:
    """Whether a container ran into its memory limit, looked up while it runs: its control group goes with it.

    podman's own OOMKilled stays false on hosts with mixed control groups.
    """

    def __init__(self, container: str, limit: int) -> None:
        self.limit = limit
        self.seen = False
        self.peaks: list[Path] = []
        process = call("inspect", "--format", "{{.State.Pid}}", container)
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
                number, controllers, path = line.split(":", 2)
                if "memory" in controllers.split(","):
                    self.peaks.append(Path(f"/sys/fs/cgroup/memory{path}/memory.max_usage_in_bytes"))
                elif number == "0":
                    self.peaks += [Path(f"/sys/fs/cgroup{path}/{name}") for name in ("memory.peak", "memory.current")]

    def look(self) -> bool:
        """Look once; always false, so that it can be asked beside other questions."""
        for file in self.peaks:
            with contextlib.suppress(OSError, ValueError):
                self.seen |= int(file.read_text()) > self.limit * 0.98
        return False


def sweep(mark: str, living: set[str]) -> None:
    """Remove containers that a killed process of this scratch folder left behind."""
    for line in call("ps", "--all", "--filter", f"label={LABEL}", "--format", "{{.ID}} {{.Labels}}").splitlines():
        container, _, labels = line.partition(" ")
        for label in [part for part in labels.replace("]", " ").replace("[", " ").split() if f"{LABEL}:{mark}" in part]:
            if label.rpartition("-")[2] not in living:
                call("rm", "--force", "--time", "0", container)


def _options(box: Box) -> list[str]:
    rootless = os.getuid() != 0
    user = box.user or f"{NOBODY}:{NOBODY}"
    options = ["--name", f"caregrid-{uuid.uuid4().hex[:12]}", "--label", f"{LABEL}={box.label}", "--pull", "never"]
    options += ["--network", "none", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--ipc", "private"]
    options += ["--security-opt", "no-new-privileges", "--log-driver", "none", "--hostname", "caregrid", "--no-healthcheck"]
    options += ["--memory", f"{box.memory_mb}m", "--memory-swap", f"{box.memory_mb}m", "--pids-limit", str(PROCESSES)]
    options += ["--cpus", str(min(box.cpus, os.cpu_count() or 1)), *_ulimits()]
    options += ["--tmpfs", f"/tmp:rw,nosuid,nodev,mode=1777,size={max(16, box.memory_mb // 2)}m"]  # noqa: S108 - inside the container
    options += ["--shm-size", f"{box.shared_memory_mb}m", "--timeout", str(int(box.seconds) + 15)]  # if we are killed meanwhile
    options += ["--userns", "keep-id", "--user", str(os.getuid())] if rootless else ["--user", user]
    for outside, inside, writable in box.mounts:
        options += ["--mount", f"type=bind,source={outside},destination={inside},readonly={'false' if writable else 'true'}"]
    for name, value in {"HOME": "/tmp", "TZ": "UTC", "OMP_NUM_THREADS": str(box.cpus), **box.environment}.items():  # noqa: S108
        options += ["--env", f"{name}={value}"]
    options += ["--workdir", box.folder] if box.folder else []
    return options + (["--device", "nvidia.com/gpu=all"] if box.gpu else [])


def _ulimits() -> list[str]:
    # podman's own defaults ask for more than a process without CAP_SYS_RESOURCE may set.
    return [
        "--ulimit",
        "nofile=1024:1024",
        "--ulimit",
        "nproc=4096:4096",
        "--ulimit",
        "core=0:0",
        f"--ulimit=fsize={FILE_MB << 20}",
    ]
