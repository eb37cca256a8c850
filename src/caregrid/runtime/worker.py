"""What runs inside the sandbox: reads jobs as JSON lines, prepares the input, calls the algorithm, writes its findings to /out.

Its standard output belongs to this conversation, so the algorithm's own prints are sent to standard error. Of an error only the
class and the place in the package are told: a message could hold patient data.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Findings
from caregrid.errors import AlgorithmBroken, InputRefused, ManifestInvalid
from caregrid.registry.manifest import manifest_from_json
from caregrid.runtime.exchange import write_findings
from caregrid.runtime.inputs import prepare

PACKAGE, IN, OUT = Path("/package"), Path("/in"), Path("/out")

#: Told before the algorithm is imported; nothing of a patient has been handed in by then.
READY = {"ready": True}


def main() -> None:
    """Serve jobs until standard input ends."""
    _require_sandbox()
    answers = _take_standard_output()
    jobs = iter(sys.stdin.buffer.readline, b"")
    start = json.loads(next(jobs))
    _limit(start["limits"])
    manifest = manifest_from_json(start["manifest"])
    entry = _load(manifest)
    # What is loaded by now stays; looking through it again at every collection costs a study tenths of a second.
    gc.collect()
    gc.freeze()
    _answer(answers, READY)
    for line in jobs:
        job = json.loads(line)
        _answer(answers, {"job": job["job"], **_do(manifest, entry, job)})
        _tidy()


def _require_sandbox() -> None:
    """End at once unless process 1 is bubblewrap's: the worker ends every other process it sees between studies."""
    if not _in_sandbox():
        raise SystemExit("this worker runs inside bubblewrap only")


def _in_sandbox() -> bool:
    return os.getpid() != 1 and Path("/proc/1/comm").read_text().strip() == "bwrap"


def _take_standard_output() -> IO[bytes]:
    """The real standard output for us alone; descriptor 1 becomes standard error for everybody else."""
    ours = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(ours, "wb")


def _answer(answers: IO[bytes], content: dict[str, Any]) -> None:
    answers.write(json.dumps(content).encode() + b"\n")
    answers.flush()


def _limit(limits: dict[str, int | None]) -> None:
    """Hard limits of the kernel on this process and its children; None: a control group sees to it."""
    names = {"core": resource.RLIMIT_CORE, "file": resource.RLIMIT_FSIZE, "files": resource.RLIMIT_NOFILE}
    names |= {"memory": resource.RLIMIT_AS, "processes": resource.RLIMIT_NPROC}
    for name, value in limits.items():
        if value is not None:
            resource.setrlimit(names[name], (value, value))


def _load(manifest: Manifest) -> Any:
    if manifest.runner == "onnx":
        from caregrid.runtime import onnx

        return onnx.load_entry(manifest, PACKAGE)
    from caregrid.runtime import python

    return python.load_entry(manifest, PACKAGE)


def _do(manifest: Manifest, entry: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job; the answer says how long preparing and the algorithm took, or what went wrong."""
    try:
        files = {uid: [IN / name for name in names] for uid, names in job["series"].items()}
        began = time.perf_counter()
        given = prepare(manifest.inputs, files, job["parameters"], PACKAGE)
        prepared = time.perf_counter()
        findings = entry(given)
        ended = time.perf_counter()
        _write(manifest, findings)
    except (InputRefused, ManifestInvalid, AlgorithmBroken) as error:
        details = {key: str(value) for key, value in error.details.items()}
        return {"error": type(error).__name__, "details": details}
    except MemoryError:
        return {"error": "MemoryError"}
    except BaseException as error:  # the edge of the algorithm: whatever it raises, SystemExit too, is its failure, told by class
        return {"error": "failed", "class": type(error).__qualname__, "where": _place(error)}
    return {"done": True, "prepare_seconds": prepared - began, "algorithm_seconds": ended - prepared}


def _write(manifest: Manifest, findings: Any) -> None:
    broken = {"name": manifest.name, "version": manifest.version}
    if not isinstance(findings, Findings):
        raise AlgorithmBroken(**broken, reason=f"it returned {type(findings).__name__}, not Findings")
    try:
        write_findings(findings, OUT)
    except (ValueError, TypeError, AttributeError) as error:
        raise AlgorithmBroken(**broken, reason=f"its findings cannot be written ({type(error).__name__})") from error


def _place(error: BaseException) -> str:
    """Where in the package's code the error came from: the innermost line that is the package's."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(f"{PACKAGE}/"):
            place = f"{file.removeprefix(f'{PACKAGE}/')}:{line}"
    return place


def _tidy() -> None:
    """Leave nothing of this study for the next: processes it started, and files in the private folders."""
    for process in _others() if _in_sandbox() else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    _reap()
    os.chdir("/tmp")  # noqa: S108 - private to this sandbox
    for folder in ("/tmp", "/dev/shm"):  # noqa: S108
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
    gc.collect()


def _reap() -> None:
    """Wait, a second at most, for the children that were killed."""
    deadline = time.monotonic() + 1
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)


def _others() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (1, os.getpid()):
            yield int(name)


if __name__ == "__main__":
    main()
