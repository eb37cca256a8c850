"""Packages run as they should: warm, recycled, side by side, with their parameters, models and environments."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom.data
import pytest
import sqlalchemy as sa

from caregrid.errors import AlgorithmFailed, NoSuitableInput, PackageAltered, RegistryError, SandboxMissing
from caregrid.registry.environments import create_environment, environments
from caregrid.registry.manifest import read_manifest
from caregrid.registry.registry import Registry
from caregrid.runtime import _cgroups
from caregrid.runtime.runtime import Runtime
from tests.unit.registry.packages import make_package

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed on this machine")

CT = Path(pydicom.data.get_testdata_file("CT_small.dcm"))  # type: ignore[arg-type]
MR = Path(pydicom.data.get_testdata_file("MR_small.dcm"))  # type: ignore[arg-type]
SERIES = {"1.3.6.1.4.1.5962.1.3.1.1.20040119072730.12322": [CT]}


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    made = Runtime(tmp_path / "scratch", environments=tmp_path / "environments")
    yield made
    made.close()


def test_a_worker_stays_warm(runtime: Runtime, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    manifest = read_manifest(package)
    answers = [runtime.answer(manifest, package, SERIES) for _ in range(4)]
    assert len({answer.worker for answer in answers}) == 1
    assert [answer.findings.values["calls"] for answer in answers] == [1, 2, 3, 4]
    assert [answer.worker_studies for answer in answers] == [1, 2, 3, 4]


def test_warm_is_faster_than_cold(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    manifest = read_manifest(package)
    took: dict[int, list[float]] = {1: [], 100: []}
    for studies, times in took.items():
        runtime = Runtime(tmp_path / "scratch", recycle_studies=studies)
        for _ in range(4):
            began = time.perf_counter()
            runtime.run(manifest, package, SERIES)
            times.append(time.perf_counter() - began)
        runtime.close()
    assert min(took[1]) > 2 * min(took[100])


def test_a_worker_is_recycled(tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    manifest = read_manifest(package)
    runtime = Runtime(tmp_path / "scratch", recycle_studies=2)
    calls = [runtime.run(manifest, package, SERIES).values["calls"] for _ in range(5)]
    runtime.close()
    assert calls == [1, 2, 1, 2, 1]
    runtime = Runtime(tmp_path / "scratch", recycle_minutes=0)
    assert [runtime.run(manifest, package, SERIES).values["calls"] for _ in range(2)] == [1, 1]
    runtime.close()


def test_a_worker_outlives_the_thread_that_asked_for_it(runtime: Runtime, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    manifest = read_manifest(package)
    for calls in (1, 2):
        thread = threading.Thread(target=runtime.run, args=(manifest, package, SERIES))
        thread.start()
        thread.join()
        time.sleep(0.2)
        assert [worker.process.alive for _, worker in runtime._workers._idle] == [True], calls
    assert runtime.run(manifest, package, SERIES).values["calls"] == 3


def test_studies_side_by_side_have_a_worker_each(runtime: Runtime, tmp_path: Path) -> None:
    code = """
import time
from caregrid.domain.findings import Findings

def run(input):
    time.sleep(1)
    return Findings("x")
"""
    package = make_package(tmp_path / "p", code)
    manifest = read_manifest(package)
    with ThreadPoolExecutor(2) as pool:
        workers = {
            future.result().worker for future in [pool.submit(runtime.answer, manifest, package, SERIES) for _ in range(2)]
        }
    assert len(workers) == 2


def test_a_worker_that_failed_is_not_used_again(runtime: Runtime, tmp_path: Path) -> None:
    code = """
from caregrid.domain.findings import Findings
calls = 0

def run(input):
    global calls
    calls += 1
    if input.parameters.get("fail"):
        raise ValueError
    return Findings("x", values={"calls": calls})
"""
    package = make_package(tmp_path / "p", code)
    manifest = read_manifest(package)
    assert runtime.run(manifest, package, SERIES).values["calls"] == 1
    with pytest.raises(AlgorithmFailed):
        runtime.run(manifest, package, SERIES, {"fail": True})
    assert runtime.run(manifest, package, SERIES).values["calls"] == 1


def test_an_input_that_does_not_fit_is_the_studys_fault(runtime: Runtime, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    manifest = read_manifest(package)
    first = runtime.answer(manifest, package, SERIES)
    with pytest.raises(NoSuitableInput) as caught:
        runtime.run(manifest, package, {"1.2.3": [MR]})
    assert caught.value.details["input"] == "any"
    assert runtime.answer(manifest, package, SERIES).worker == first.worker, "the worker did nothing wrong"


def test_files_are_linked_not_copied(runtime: Runtime, tmp_path: Path) -> None:
    code = """
import os
from caregrid.domain.findings import Findings

def run(input):
    return Findings("x", values={"inode": os.stat(input.one("any").files[0]).st_ino})
"""
    package = make_package(tmp_path / "p", code)
    kept = tmp_path / "kept.dcm"
    shutil.copy(CT, kept)
    found = runtime.run(read_manifest(package), package, {"1.2.3": [kept]})
    assert found.values["inode"] == kept.stat().st_ino


def test_parameters_of_the_manifest_and_of_the_workflow(runtime: Runtime, tmp_path: Path) -> None:
    code = """
from caregrid.domain.findings import Findings

def run(input):
    return Findings("x", values=dict(input.parameters))
"""
    package = make_package(tmp_path / "p", code)
    with (package / "algorithm.toml").open("a") as file:
        file.write('\n[parameters]\nthreshold = -500\nmode = "fast"\n')
    found = runtime.run(read_manifest(package), package, SERIES, {"threshold": -400})
    assert found.values == {"threshold": -400, "mode": "fast"}


def test_load_is_called_once(runtime: Runtime, tmp_path: Path) -> None:
    code = """
from caregrid.domain.findings import Findings
loaded = []

def load(package):
    loaded.append((package / "README.md").read_text())

def run(input):
    return Findings("x", values={"loads": len(loaded), "read": loaded[0], "package": str(input.package)})
"""
    package = make_package(tmp_path / "p", code)
    manifest = read_manifest(package)
    runtime.run(manifest, package, SERIES)
    values = runtime.run(manifest, package, SERIES).values
    assert values == {"loads": 1, "read": "# Counting\n", "package": "/package"}


def test_an_onnx_model_between_pre_and_post(runtime: Runtime, tmp_path: Path) -> None:
    """onnxruntime's own example model: Y = X * [1 2; 3 4; 5 6], float32 (3, 2)."""
    datasets = pytest.importorskip("onnxruntime.datasets")
    package = make_package(tmp_path / "p")
    shutil.copy(datasets.get_example("mul_1.onnx"), package / "model.onnx")
    text = (package / "algorithm.toml").read_text()
    (package / "algorithm.toml").write_text(text.replace('"python"', '"onnx"').replace('"counting:run"', '"model.onnx"'))
    (package / "code" / "model.py").write_text(
        """
import numpy as np
from caregrid.domain.findings import Findings

def preprocess(input):
    return {"X": np.full((3, 2), input.parameters.get("x", 1), np.float32)}

def postprocess(outputs, input):
    return Findings("x", values={"sum": float(outputs["Y"].sum()), "rows": outputs["Y"].shape[0]})
"""
    )
    manifest = read_manifest(package)
    first = runtime.answer(manifest, package, SERIES)
    second = runtime.answer(manifest, package, SERIES, {"x": 2})
    assert first.findings.values == {"sum": 21.0, "rows": 3}
    assert second.findings.values == {"sum": 42.0, "rows": 3}
    assert first.worker == second.worker


def test_from_the_registry_to_the_answer(db: sa.Engine, runtime: Runtime, tmp_path: Path) -> None:
    registry = Registry(db, tmp_path / "models")
    private, public = registry.new_keypair()
    registry.trust(public, "hospital", "ann", "ours")
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    registry.sign("counting", "1.0.0", private, "hospital", "ann", "checked")
    registry.activate("counting", "1.0.0", "ann", "go")
    manifest, package = registry.load(registry.resolve("counting").digest)
    assert runtime.run(manifest, package, SERIES).values == {"calls": 1, "files": 1}
    assert registry.verify("counting", "1.0.0"), "running it left nothing in its folder"
    (package / "code" / "counting.py").chmod(0o644)
    (package / "code" / "counting.py").write_text("def run(input): pass\n")
    with pytest.raises(PackageAltered):
        registry.load(manifest.digest)


def test_nothing_is_left_when_it_is_closed(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path / "scratch")
    package = make_package(tmp_path / "p")
    worker = runtime.answer(read_manifest(package), package, SERIES).worker
    mark = runtime._home.mark
    runtime.close()
    assert not Path(f"/proc/{worker}").exists()
    assert list((tmp_path / "scratch").iterdir()) == []
    base = _cgroups.bases()
    if base:
        assert not [*base.memory.glob(f"{mark}*"), *base.pids.glob(f"{mark}*")]


def test_another_process_of_the_site_is_left_alone(tmp_path: Path) -> None:
    """Two runtimes on one scratch folder: the second one's start must not sweep the first one's files away."""
    package = make_package(tmp_path / "p")
    manifest = read_manifest(package)
    first = Runtime(tmp_path / "scratch")
    worker = first.answer(manifest, package, SERIES).worker
    Runtime(tmp_path / "scratch").close()
    assert first.answer(manifest, package, SERIES).worker == worker
    first.close()


def test_many_processes_starting_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from caregrid.runtime._spool import Home
homes = [Home(Path({str(tmp_path / "scratch")!r})) for _ in range(40)]
time.sleep(0.5)
assert all(home.folder.is_dir() for home in homes)
"""
    started = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[1] for process in started] == [b"", b"", b""]


def test_an_environment_that_was_not_made(runtime: Runtime, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    text = (package / "algorithm.toml").read_text()
    (package / "algorithm.toml").write_text(text.replace("timeout_seconds", 'environment = "hazen-2"\ntimeout_seconds'))
    with pytest.raises(SandboxMissing, match="hazen-2"):
        runtime.run(read_manifest(package), package, SERIES)


@pytest.mark.slow
def test_a_private_environment(runtime: Runtime, tmp_path: Path) -> None:
    """Its own pins: a package caregrid itself does not have, in an interpreter of its own."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("numpy\npydicom\npillow\niniconfig==2.0.0\n")
    try:
        create_environment(tmp_path / "environments" / "own", requirements)
    except RegistryError as error:
        if "No matching distribution" in error.message or "pip install" in error.message:
            pytest.skip("no package index can be reached from this machine")
        raise
    assert environments(tmp_path / "environments") == ("own",)
    code = """
import sys
from importlib.metadata import PackageNotFoundError, version
from caregrid.domain.findings import Findings

def run(input):
    try:
        scipy = version("scipy")
    except PackageNotFoundError:
        scipy = "none"
    return Findings("x", values={"iniconfig": version("iniconfig"), "scipy": scipy, "prefix": sys.prefix})
"""
    package = make_package(tmp_path / "p", code)
    text = (package / "algorithm.toml").read_text()
    (package / "algorithm.toml").write_text(text.replace("timeout_seconds", 'environment = "own"\ntimeout_seconds'))
    values = runtime.run(read_manifest(package), package, SERIES).values
    assert values == {"iniconfig": "2.0.0", "scipy": "none", "prefix": str(tmp_path / "environments" / "own")}


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("--no-index\nthere-is-no-such-package==1\n")
    folder = tmp_path / "environments" / "broken"
    with pytest.raises(RegistryError, match="pip install failed"):
        create_environment(folder, requirements)
    requirements.write_text("")
    with pytest.raises(RegistryError, match="numpy, pydicom and pillow"):
        create_environment(folder, requirements)
    with pytest.raises(RegistryError, match="is no name"):
        create_environment(tmp_path / "environments" / ".." / "Up", requirements)
    assert list(folder.parent.iterdir()) == []
