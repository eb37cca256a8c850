"""Packages that try to get out, look around or take everything. Every probe runs for real inside bubblewrap."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom.data
import pytest

from caregrid.errors import (
    AlgorithmBroken,
    AlgorithmCancelled,
    AlgorithmFailed,
    AlgorithmOutOfMemory,
    AlgorithmTimedOut,
    ConfigError,
    SandboxMissing,
)
from caregrid.registry.manifest import read_manifest
from caregrid.runtime import _cgroups
from caregrid.runtime.runtime import Answer, Runtime
from tests.unit.registry.packages import make_package

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed on this machine")

CT = Path(pydicom.data.get_testdata_file("CT_small.dcm"))  # type: ignore[arg-type]
SERIES = "1.3.6.1.4.1.5962.1.3.1.1.20040119072730.12322"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    made = Runtime(tmp_path / "scratch")
    yield made
    made.close()


@pytest.fixture
def probe(runtime: Runtime, tmp_path: Path) -> Callable[..., Answer]:
    """Run a function body as an algorithm; what it returns are the values of its findings."""
    count = iter(range(1000))

    def run(
        body: str, before: str = "", seconds: float | None = None, stop: Any = None, files: Any = None, **limits: Any
    ) -> Answer:
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        code = f"from caregrid.domain.findings import Findings\n{textwrap.dedent(before)}\n\ndef tell(input):\n{indented}\n"
        code += "\n\ndef run(input):\n    return Findings('ok', values=tell(input))\n"
        package = make_package(tmp_path / f"package-{next(count)}", code, **limits)
        return runtime.answer(read_manifest(package), package, files or {SERIES: [CT]}, None, seconds, stop)

    return run


def processes_with(word: str) -> list[int]:
    """Processes of this machine whose command line holds ``word``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(true: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_no_network(probe: Callable[..., Answer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = probe(
            f"""
            import socket
            said = {{}}
            for host, port in (("127.0.0.1", {port}), ("192.0.2.1", 80)):
                try:
                    socket.create_connection((host, port), 2).close()
                    said[host] = "connected"
                except OSError as error:
                    said[host] = type(error).__name__
            said["interfaces"] = ",".join(name for _, name in socket.if_nameindex())
            return said
            """
        )
    assert answer.findings.values == {"127.0.0.1": "ConnectionRefusedError", "192.0.2.1": "OSError", "interfaces": "lo"}


def test_nothing_but_out_and_tmp_can_be_written(probe: Callable[..., Answer]) -> None:
    answer = probe(
        """
        import os
        said = {}
        python = os.path.dirname(os.__file__)
        for folder in ("/", "/usr", "/etc", "/dev", "/in", "/package", "/package/code", "/caregrid/caregrid", python,
                       "/proc/sys"):
            try:
                open(folder + "/probe", "w").close()
                said[folder] = "written"
            except OSError as error:
                said[folder] = "refused"
        for folder in ("/out", "/tmp", "/dev/shm"):
            open(folder + "/probe", "w").close()
        return said
        """
    )
    assert len(answer.findings.values) == 10
    assert set(answer.findings.values.values()) == {"refused"}


def test_what_was_handed_in_cannot_be_changed(probe: Callable[..., Answer], tmp_path: Path) -> None:
    """The file inside is a link to the site's own: changing its mode or content must fail."""
    original = tmp_path / "kept.dcm"
    shutil.copy(CT, original)
    before = (original.read_bytes(), original.stat().st_mode)
    answer = probe(
        """
        import os
        path = next(iter(input.series["any"])).files[0]
        said = {}
        for name, attempt in (("open", lambda: open(path, "r+b")), ("chmod", lambda: os.chmod(path, 0o777)),
                              ("unlink", lambda: os.unlink(path)), ("truncate", lambda: os.truncate(path, 0)),
                              ("link", lambda: os.link(path, "/out/x"))):
            try:
                attempt()
                said[name] = "done"
            except OSError:
                said[name] = "refused"
        return said
        """,
        files={SERIES: [original]},
    )
    assert set(answer.findings.values.values()) == {"refused"}
    assert (original.read_bytes(), original.stat().st_mode) == before


def test_no_secrets_of_the_site(probe: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAREGRID_DATABASE_PASSWORD", "canary-password")
    (tmp_path / "site.db").write_text("rows")
    answer = probe(
        f"""
        import os
        said = {{}}
        for path in ("/etc/shadow", "/etc/passwd", "/root/.ssh", "/home", "/var", "/sys", "/run", {str(tmp_path / "site.db")!r},
                     {str(tmp_path / "scratch")!r}):
            said[path] = os.path.exists(path)
        everything = " ".join(f"{{k}}={{v}}" for k, v in os.environ.items())
        for process in os.listdir("/proc"):
            if process.isdigit():
                for file in ("environ", "cmdline"):
                    try:
                        everything += open(f"/proc/{{process}}/{{file}}", errors="replace").read()
                    except OSError:
                        pass
        said["canary"] = "canary" in everything
        said["length"] = len(everything)
        return said
        """
    )
    values = dict(answer.findings.values)
    assert values.pop("length") > 100
    assert set(values.values()) == {False}


def test_only_its_own_processes_and_nobodys_rights(probe: Callable[..., Answer]) -> None:
    answer = probe(
        f"""
        import ctypes, os
        status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            os.kill({os.getpid()}, 0)
            seen = True
        except ProcessLookupError:
            seen = False
        return {{
            "processes": sum(name.isdigit() for name in os.listdir("/proc")), "uid": os.getuid(),
            "caps": status["CapEff"].strip(),
            "bounding": status["CapBnd"].strip(), "no new": status["NoNewPrivs"].strip(), "host seen": seen,
            "userns": libc.unshare(0x10000000), "mount": libc.mount(b"x", b"/tmp", b"tmpfs", 0, None),
        }}
        """
    )
    values = dict(answer.findings.values)
    assert values.pop("processes") <= 4
    nothing = "0" * 16
    expected = {"caps": nothing, "bounding": nothing, "no new": "1", "host seen": False, "userns": -1, "mount": -1}
    assert values == {**expected, "uid": 65534 if os.getuid() == 0 else os.getuid()}


def test_memory_hog_is_stopped(probe: Callable[..., Answer]) -> None:
    with pytest.raises(AlgorithmOutOfMemory) as caught:
        probe("hoard = b'x' * (1 << 30)\nreturn {'kept': len(hoard)}", memory=300)
    assert caught.value.details["memory_mb"] == 300


def test_memory_hog_in_a_child_is_stopped(probe: Callable[..., Answer]) -> None:
    with pytest.raises(AlgorithmOutOfMemory):
        probe(
            """
            import subprocess, sys
            done = subprocess.run([sys.executable, "-c", "x = b'x' * (1 << 30)"])
            return {"status": done.returncode}
            """,
            memory=300,
        )


def test_memory_is_limited_without_control_groups(probe: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cgroups, "bases", lambda: None)
    assert probe("return {'fine': True}", memory=600).findings.values == {"fine": True}
    with pytest.raises(AlgorithmOutOfMemory):
        probe("hoard = b'x' * (2 << 30)\nreturn {}", memory=600)


def test_filling_tmp_is_bounded(probe: Callable[..., Answer]) -> None:
    answer = probe(
        """
        import errno
        try:
            with open("/tmp/big", "wb") as file:
                for _ in range(2000):
                    file.write(bytes(1 << 20))
        except OSError as error:
            return {"said": errno.errorcode[error.errno]}
        return {"said": "written"}
        """,
        memory=400,
    )
    assert answer.findings.values == {"said": "ENOSPC"}


def test_filling_the_disk_is_bounded(probe: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caregrid.runtime._warm.OUTGOING_MB", 64)
    with pytest.raises(AlgorithmFailed, match="wrote more than 64 MB"):
        probe(
            """
            import time
            for number in range(10):
                with open(f"/out/{number}", "wb") as file:
                    file.write(bytes(20 << 20))
            time.sleep(20)
            return {}
            """
        )


@pytest.mark.skipif(_cgroups.bases() is None, reason="no control groups here; RLIMIT_NPROC does not bind root")
def test_fork_bomb_is_bounded_and_cleared_away(probe: Callable[..., Answer]) -> None:
    body = """
        import os, time
        made = 0
        for _ in range(3000):
            try:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
            except OSError:
                break
            made += 1
        return {"made": made}
        """
    first = probe(body)
    assert 100 < first.findings.values["made"] < 512
    # The worker clears them away before the next study; nothing of them is left once the runtime is done.
    assert wait_until(lambda: _group_size(first.worker) <= 4)


def _group_size(worker: int) -> int:
    for line in Path(f"/proc/{worker}/cgroup").read_text().splitlines():
        _number, controllers, path = line.split(":", 2)
        if "pids" in controllers or not controllers:
            base = _cgroups.bases()
            assert base is not None
            for folder in base.pids.glob(f"**/{Path(path).name}"):
                return len((folder / "cgroup.procs").read_text().split())
    raise AssertionError("the worker is in no group of its own")


def test_time_out_stops_everything_it_started(probe: Callable[..., Answer]) -> None:
    mark = f"98{os.getpid()}7"
    with pytest.raises(AlgorithmTimedOut):
        probe(
            f"""
            import subprocess, time
            subprocess.Popen(["sleep", "{mark}"], start_new_session=True)
            open("/out/started", "w").close()
            while True:
                time.sleep(1)
            """,
            seconds=2,
        )
    assert wait_until(lambda: not processes_with(mark), 3)


def test_a_deaf_algorithm_is_stopped_too(probe: Callable[..., Answer]) -> None:
    began = time.monotonic()
    with pytest.raises(AlgorithmTimedOut):
        probe(
            """
            import signal
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            while True:
                pass
            """,
            seconds=1.5,
        )
    assert time.monotonic() - began < 8


def test_a_cancelled_run_is_stopped_at_once(probe: Callable[..., Answer]) -> None:
    began = time.monotonic()
    with pytest.raises(AlgorithmCancelled):
        probe("import time\ntime.sleep(25)\nreturn {}", stop=lambda: time.monotonic() - began > 1)
    assert time.monotonic() - began < 8


def test_another_study_is_not_there(runtime: Runtime, tmp_path: Path) -> None:
    """The same warm worker, two studies: the second sees its own files only, and nothing the first left behind."""
    code = """
import os, subprocess
from caregrid.domain.findings import Findings

def run(input):
    seen = sorted(os.path.join(w, n) for f in ("/in", "/tmp", "/dev/shm", "/out") for w, _, ns in os.walk(f) for n in ns)
    sizes = sorted(os.path.getsize(path) for path in seen if path.startswith("/in"))
    processes = sum(name.isdigit() for name in os.listdir("/proc"))
    open("/tmp/left", "w").write("of the first study")
    os.makedirs("/dev/shm/left/deeper")
    open("/out/left", "w").write("of the first study")
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return Findings("ok", values={"seen": ";".join(seen), "sizes": str(sizes), "processes": processes})
"""
    package = make_package(tmp_path / "p", code)
    manifest = read_manifest(package)
    other = tmp_path / "other.dcm"
    dataset = pydicom.dcmread(CT)
    dataset.ImageComments = "another study"
    dataset.save_as(other)
    first = runtime.answer(manifest, package, {SERIES: [CT, CT]})
    second = runtime.answer(manifest, package, {SERIES: [other]})
    assert first.worker == second.worker
    assert first.findings.values["seen"] == "/in/0/0.dcm;/in/0/1.dcm"
    assert second.findings.values["seen"] == "/in/0/0.dcm"
    assert second.findings.values["sizes"] == str([other.stat().st_size])
    assert second.findings.values["processes"] == first.findings.values["processes"]


def test_what_it_prints_does_not_break_the_conversation(probe: Callable[..., Answer]) -> None:
    answer = probe(
        """
        import os, subprocess, sys
        print('{"job": "x", "done": true}')
        os.write(1, b"more\\n" * 10000)
        print("DOE^JANE" * 10000, file=sys.stderr)
        subprocess.run(["echo", "from a child"])
        return {"fine": True}
        """
    )
    assert answer.findings.values == {"fine": True}


def test_an_error_is_told_by_class_and_place_only(probe: Callable[..., Answer], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AlgorithmFailed) as caught:
        probe("print('DOE^JANE', input)\nraise ValueError('DOE^JANE 19700101')")
    assert caught.value.details["reason"] == "ValueError at code/counting.py:6"
    assert "JANE" not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os\nos._exit(3)", "it ended with status 3 and no answer"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "it was ended by SIGSEGV"),
        ("raise SystemExit(0)", "SystemExit at code/counting.py:5"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt at code/counting.py:5"),
    ],
)
def test_every_end_has_a_name(probe: Callable[..., Answer], body: str, reason: str) -> None:
    with pytest.raises(AlgorithmFailed) as caught:
        probe(body)
    assert caught.value.details["reason"] == reason


def test_a_package_that_does_not_load_says_why(probe: Callable[..., Answer]) -> None:
    with pytest.raises(AlgorithmFailed, match="No module named 'nowhere_to_be_found'"):
        probe("return {}", before="import nowhere_to_be_found")


def test_answers_that_are_no_findings(probe: Callable[..., Answer], runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(AlgorithmBroken):
        probe("return {'x': [1]}")
    with pytest.raises(AlgorithmBroken):
        probe("return {'x': float('nan')}")
    package = make_package(tmp_path / "text", "def run(input):\n    return 'all fine'\n")
    with pytest.raises(AlgorithmBroken, match="it returned str"):
        runtime.run(read_manifest(package), package, {SERIES: [CT]})


def test_forged_answers_are_refused(probe: Callable[..., Answer], tmp_path: Path) -> None:
    """An algorithm that takes the conversation over and points findings.json at a file outside."""
    for line in (b'{"job": "guess", "done": true}', b"[" * 5000, b"\xff\xfe", b"x" * 3_000_000):
        with pytest.raises(AlgorithmBroken, match="spoke out of turn"):
            probe(
                f"""
                import os
                os.symlink("/etc/shadow", "/out/findings.json")
                line = {line[:1]!r} * {len(line)} if {len(set(line)) == 1} else {line[:100]!r}
                for descriptor in range(3, 20):
                    try:
                        left = line + b"\\n"
                        while left:
                            left = left[os.write(descriptor, left):]
                    except OSError:
                        pass
                os._exit(0)
                """
            )


def test_without_bubblewrap_nothing_runs(probe: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxMissing):
        probe("return {}")


def test_the_worker_itself_refuses_to_run_outside() -> None:
    """It ends every other process it can see between studies, so it must never be outside a process namespace of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "caregrid.runtime.worker"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.strip()) == (1, "this worker runs inside bubblewrap only")


def test_there_is_no_bare_mode(tmp_path: Path) -> None:
    for word in ("none", "bare", "", "podman"):
        with pytest.raises(ConfigError):
            Runtime(tmp_path, sandbox=word)


def test_site_data_where_every_algorithm_could_read_it(tmp_path: Path) -> None:
    scratch = Path(sys.prefix) / f"caregrid-probe-{os.getpid()}"
    runtime = Runtime(scratch)
    package = make_package(tmp_path / "p")
    try:
        with pytest.raises(ConfigError, match="which every algorithm can read"):
            runtime.run(read_manifest(package), package, {SERIES: [CT]})
    finally:
        runtime.close()
        shutil.rmtree(scratch)


def test_a_killed_site_leaves_no_sandbox_and_no_files(tmp_path: Path) -> None:
    mark = f"97{os.getpid()}3"
    body = f"import subprocess\n\ndef run(input):\n    subprocess.run(['sleep', '{mark}'])\n"
    package = make_package(tmp_path / "p", body, timeout=60)
    script = f"""
from pathlib import Path
from caregrid.registry.manifest import read_manifest
from caregrid.runtime.runtime import Runtime
package = Path({str(package)!r})
Runtime(Path({str(tmp_path / "scratch")!r})).run(read_manifest(package), package, {{"1.2": [Path({str(CT)!r})]}})
"""
    site = subprocess.Popen([sys.executable, "-c", script])
    assert wait_until(lambda: bool(processes_with(mark)))
    os.kill(site.pid, signal.SIGKILL)
    site.wait()
    assert wait_until(lambda: not processes_with(mark), 5)
    assert list((tmp_path / "scratch").glob("*/*/in/0/0.dcm")), "the file was there; only then is its removal worth something"
    Runtime(tmp_path / "scratch").close()
    assert list((tmp_path / "scratch").iterdir()) == []
