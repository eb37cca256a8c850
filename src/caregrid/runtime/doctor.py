"""Probes of the machine: what a site needs here, whether it works, and what to do when it does not. Nothing is changed."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from caregrid.errors import CaregridError
from caregrid.runtime import _cgroups, _podman
from caregrid.runtime.sandbox import Cage, Python, bubblewrap

FREE_FLOOR, FREE_COMFORT = 500 << 20, 20 << 30
SLOW_SYNC_MS = 50.0
NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p")
DCMTK = ("dcmdjpeg", "dcmdump", "dsrdump")

_DECODERS = {
    "JPEG Baseline": "1.2.840.10008.1.2.4.50",
    "JPEG Extended": "1.2.840.10008.1.2.4.51",
    "JPEG Lossless": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "HTJ2K": "1.2.840.10008.1.2.4.201",
    "RLE": "1.2.840.10008.1.2.5",
}


@dataclass(frozen=True)
class Check:
    """One probe. ok: True works, False must be mended, None works with a limit worth knowing. remedy: "" when none is needed."""

    name: str
    ok: bool | None
    says: str
    remedy: str = ""


def probe(folder: Path) -> list[Check]:
    """Every check, for a site whose data lie (or will lie) in ``folder``."""
    place = folder if folder.is_dir() else next(parent for parent in folder.absolute().parents if parent.is_dir())
    on_disk: list[Callable[[Path], Check]] = [free_space, sync_time, disk_kind]
    anywhere = [sandbox, memory_limits, user, containers, dcmtk, decoders, onnx_providers, clock]
    return [check() for check in anywhere] + [check(place) for check in on_disk]


def sandbox() -> Check:
    """Whether bubblewrap runs a program here with everything it is asked to shut off."""
    name = "sandbox (bubblewrap)"
    if shutil.which("bwrap") is None:
        return Check(name, False, "not installed; no python or onnx package can run", "apt install bubblewrap")
    cage = Cage("probe", Python(Path("/usr/bin/true"), ()), {}, {}, memory_mb=256, cpus=1, tmp_mb=16)
    done = _run(bubblewrap(cage, ["/usr/bin/true"]))
    if done.returncode == 0:
        return Check(name, True, _first_line(["bwrap", "--version"]) + ": no network, read-only root, own processes")
    return Check(name, False, f"does not start: {_last(done.stderr)}", _user_namespace_remedy())


def _user_namespace_remedy() -> str:
    most = _number(Path("/proc/sys/user/max_user_namespaces"))
    if most == 0:
        return "sysctl user.max_user_namespaces=15000"
    if _number(Path("/proc/sys/kernel/unprivileged_userns_clone")) == 0:
        return "sysctl kernel.unprivileged_userns_clone=1"
    if _number(Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")) == 1:
        return "give bwrap an AppArmor profile with 'userns,' (apt install apparmor-profiles), or run on another host"
    return "in a container: run it with user namespaces allowed (seccomp and AppArmor of the outer container forbid them)"


def memory_limits() -> Check:
    """How the memory and the processes of an algorithm are limited."""
    name, found = "memory and process limits", _cgroups.bases()
    if found:
        return Check(name, True, f"control groups, version {found.version}")
    remedy = "run caregrid as a systemd service with Delegate=yes and DelegateSubgroup=main"
    says = "no control group can be made here; memory is limited by address space" + (
        ", and processes not at all, because caregrid runs as root" if os.getuid() == 0 else ""
    )
    return Check(name, None, says, remedy)


def user() -> Check:
    """Whether caregrid runs as a user of its own."""
    if os.getuid():
        return Check("user", True, f"user {os.getuid()}, not root")
    return Check(
        "user", None, "caregrid runs as root; a fault in the kernel's sandbox would then cost more", "run it as a user of its own"
    )


def containers() -> Check:
    """Whether podman starts a confined program here (only packages with runner container or map need it)."""
    name = "containers (podman)"
    try:
        program = _podman.program()
    except CaregridError:
        return Check(name, None, "not installed; packages with runner container or map cannot run", "apt install podman runc")
    done = _run([*program, "info", "--format", "{{.Host.OCIRuntime.Name}}, control groups {{.Host.CgroupsVersion}}"])
    if done.returncode:
        return Check(name, None, f"podman does not work: {_last(done.stderr)}", "podman info")
    trial = _trial_container(program)
    runtime = Path(program[-1]).name if len(program) > 1 else done.stdout.partition(",")[0].strip()
    if trial:
        return Check(name, None, f"podman with {runtime} does not start a container: {trial}", "apt install runc")
    return Check(name, True, f"{_first_line([program[0], '--version'])} with {runtime}")


def _trial_container(program: tuple[str, ...]) -> str:
    """Start /usr/bin/true of this machine in a confined container; why it failed, or nothing."""
    with tempfile.TemporaryDirectory(prefix="caregrid-doctor-") as folder:
        for name in ("lib", "lib64", "bin"):
            Path(folder, name).symlink_to(f"usr/{name}")
        for name in ("usr", "proc", "dev", "sys", "etc", "run", "tmp"):
            Path(folder, name).mkdir()
        flags = ["--rm", "--network", "none", "--cap-drop", "all", "--read-only", "--log-driver", "none", "--memory", "64m"]
        limits = [f"--ulimit={limit}" for limit in ("nofile=1024:1024", "nproc=4096:4096")]
        mount = ["--mount", "type=bind,source=/usr,destination=/usr,readonly=true"]
        done = _run([*program, "run", *flags, *limits, *mount, "--rootfs", folder, "/usr/bin/true"], folder)
    return "" if done.returncode == 0 else _last(done.stderr)


def dcmtk() -> Check:
    """The tools of dcmtk that caregrid calls."""
    missing = [tool for tool in DCMTK if shutil.which(tool) is None]
    if not missing:
        return Check("dcmtk", True, _first_line(["dcmdump", "--version"]).strip("$ ").replace("dcmtk: ", ""))
    says = f"{', '.join(missing)} not found; 12-bit JPEG cannot be decoded and results are checked less"
    return Check("dcmtk", None, says, "apt install dcmtk")


def decoders() -> Check:
    """Which compressed transfer syntaxes can be decoded."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    missing = [name for name, uid in _DECODERS.items() if not get_decoder(UID(uid)).is_available]
    if missing:
        return Check("pixel decoders", False, f"cannot decode {', '.join(missing)}", "install caregrid with all its dependencies")
    return Check("pixel decoders", True, ", ".join(_DECODERS))


def onnx_providers() -> Check:
    """What onnxruntime can compute on."""
    try:
        import onnxruntime
    except ImportError:
        return Check("onnxruntime", False, "not installed; packages with runner onnx cannot run", "pip install onnxruntime")
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return Check("onnxruntime", True, f"{onnxruntime.__version__} on {', '.join(providers)}")


def clock() -> Check:
    """Whether the kernel says that the clock is kept by a time server."""
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(512))  # a zeroed struct timex only reads
    if 0 <= state < 5:
        return Check("clock", True, "kept by a time server")
    return Check("clock", None, "not kept by a time server, as far as the kernel knows", "apt install chrony")


def free_space(folder: Path) -> Check:
    """Room for studies."""
    free = shutil.disk_usage(folder).free
    ok = False if free < FREE_FLOOR else None if free < FREE_COMFORT else True
    return Check(
        "free space", ok, f"{free / (1 << 30):.1f} GiB in the data folder", "" if ok else "make room, or move the data folder"
    )


def sync_time(folder: Path, times: int = 20) -> Check:
    """How long it takes to make 4 KiB durable: this is waited for before a sender is told success."""
    took = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(times):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append((time.perf_counter() - began) * 1000)
    middle, worst = statistics.median(took), max(took)
    slow = middle > SLOW_SYNC_MS
    remedy = "put the data folder on a faster disk (SSD, or a controller with a protected write cache)" if slow else ""
    return Check("disk sync", None if slow else True, f"median {middle:.1f} ms, worst of {times} {worst:.1f} ms", remedy)


def disk_kind(folder: Path) -> Check:
    """Whether the data folder is on a disk of this machine: SQLite's write-ahead log needs one."""
    kind, longest = "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mount, found = line.split()[1:3]
        if folder.resolve().is_relative_to(mount.encode().decode("unicode_escape")) and len(mount) >= longest:
            kind, longest = found, len(mount)
    if kind in NETWORK_DISKS:
        return Check("disk kind", False, f"{kind}: SQLite is not safe on a network disk", "use a local disk, or PostgreSQL")
    if kind == "tmpfs":
        return Check("disk kind", None, "tmpfs: everything is lost when the machine stops", "use a disk")
    return Check("disk kind", True, kind)


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    nothing = subprocess.DEVNULL
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=nothing, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", type(error).__name__)


def _first_line(command: list[str]) -> str:
    return (_run(command).stdout.strip().splitlines() or [command[0]])[0]


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "no reason given"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
