"""Runners ``container`` and ``map`` with real podman, on images made here of busybox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pydicom
import pydicom.data
import pytest

from caregrid.domain.algorithm import Manifest
from caregrid.errors import (
    AlgorithmBroken,
    AlgorithmCancelled,
    AlgorithmFailed,
    AlgorithmOutOfMemory,
    AlgorithmTimedOut,
    ManifestInvalid,
)
from caregrid.registry.manifest import read_manifest
from caregrid.runtime import _podman
from caregrid.runtime.map import parse_map_manifest, read_map_manifest
from caregrid.runtime.runtime import Runtime
from tests.unit.registry.packages import make_package

CT = Path(pydicom.data.get_testdata_file("CT_small.dcm"))  # type: ignore[arg-type]
SERIES = "1.3.6.1.4.1.5962.1.3.1.1.20040119072730.12322"

TOOLS = ["busybox", "sh", "cat", "cp", "sleep", "id", "ls", "mkdir", "touch", "wget", "find", "tail", "grep", "wc", "tr"]


@cache
def why_not() -> str:
    """Why containers cannot be run on this machine; empty when they can."""
    busybox = shutil.which("busybox")
    if busybox is None or b"not a dynamic" not in subprocess.run(["ldd", busybox], capture_output=True).stderr:
        return "there is no static busybox to make an image of (Debian: busybox-static)"
    if shutil.which("podman") is None:
        return "podman is not installed"
    done = subprocess.run([*_podman.program(), "info"], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.fixture(autouse=True)
def _needs_podman() -> None:
    if why_not():
        pytest.skip(why_not())


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    made = Runtime(tmp_path / "scratch")
    yield made
    made.close()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Build an image from files (path → text); returns its id. Removed afterwards."""
    built: list[str] = []

    def build(files: dict[str, str], entry: list[str], user: str = "65534") -> str:
        folder = tmp_path / f"image-{len(built)}"
        (folder / "root" / "bin").mkdir(parents=True)
        for name in (
            "busybox",
            "sh",
            "cat",
            "cp",
            "sleep",
            "id",
            "ls",
            "mkdir",
            "touch",
            "wget",
            "find",
            "head",
            "dd",
            "tail",
            "grep",
            "wc",
        ):
            shutil.copy(str(shutil.which("busybox")), folder / "root" / "bin" / "busybox")
            if name != "busybox":
                (folder / "root" / "bin" / name).symlink_to("busybox")
        for path, text in files.items():
            target = folder / "root" / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            target.chmod(0o755)
        recipe = f"FROM scratch\nCOPY root /\nUSER {user}\nENTRYPOINT {json.dumps(entry)}\n"
        (folder / "Containerfile").write_text(recipe)
        tag = f"caregrid-test-{os.getpid()}-{len(built)}"
        call = [*_podman.program(), "build", "--quiet", "--isolation", "chroot", "--tag", tag, str(folder)]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"podman cannot build images on this machine: {done.stderr.strip().splitlines()[-1]}")
        built.append(tag)
        return tag

    yield build
    for tag in built:
        subprocess.run([*_podman.program(), "rmi", "--force", tag], capture_output=True)


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., tuple[Manifest, Path]]:
    """A package with the image as an archive in it."""

    def make(tag: str, runner: str = "container", **limits: Any) -> tuple[Manifest, Path]:
        folder = make_package(tmp_path / f"package-{tag}", **limits)
        text = (folder / "algorithm.toml").read_text()
        text = text.replace('runner = "python"', f'runner = "{runner}"').replace('"counting:run"', '"image.tar"')
        (folder / "algorithm.toml").write_text(text)
        subprocess.run([*_podman.program(), "save", "--quiet", "--output", str(folder / "image.tar"), tag], check=True)
        return read_manifest(folder), folder

    return make


def shell(script: str) -> dict[str, str]:
    return {"/app/run.sh": f"#!/bin/sh\n{script}\n"}


ENTRY = ["/bin/sh", "/app/run.sh"]

PROBES = """
tell() { echo ",\\"$1\\": \\"$2\\"" >>/tmp/values; }
: >/tmp/values
tell uid "$(id -u)"
tell files "$(find /in -name '*.dcm' | wc -l)"
tell parameter "$(grep -o "threshold.: [0-9]*" /in/job.json | tail -c 2)"
for path in / /in /app /etc; do touch $path/probe 2>/dev/null && tell "write $path" yes || tell "write $path" no; done
wget -T 2 -q -O- http://192.0.2.1/ >/dev/null 2>&1 && tell network yes || tell network no
tell interfaces "$(ls /sys/class/net | tr '\\n' ' ')"
tell caps "$(grep CapEff /proc/self/status | tail -c 17)"
[ -e /etc/shadow ] && tell shadow yes || tell shadow no
tell secret "$CAREGRID_SECRET"
echo '{"format": "caregrid-findings/1", "summary": "seen", "values": {"a": 1'"$(cat /tmp/values)"'}}' >/out/findings.json
"""


def test_a_container_is_confined_and_its_findings_are_read(
    image: Any, package: Any, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAREGRID_SECRET", "canary")
    manifest, folder = package(image(shell(PROBES), ENTRY))
    found = runtime.run(manifest, folder, {SERIES: [CT, CT]}, {"threshold": 7})
    values = dict(found.values)
    assert values.pop("interfaces").strip() in ("", "lo")
    assert values == {
        "a": 1,
        "uid": "65534" if os.getuid() == 0 else str(os.getuid()),
        "files": "2",
        "parameter": "7",
        "write /": "no",
        "write /in": "no",
        "write /app": "no",
        "write /etc": "no",
        "network": "no",
        "caps": "0000000000000000",
        "shadow": "no",
        "secret": "",
    }


def containers_left() -> list[str]:
    return _podman.call("ps", "--all", "--quiet", "--filter", f"label={_podman.LABEL}").split()


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exit 3", AlgorithmFailed),
        ("sleep 60 & sleep 60", AlgorithmTimedOut),
        ("tail -c 2000000000 </dev/zero", AlgorithmOutOfMemory),
        ("exit 0", AlgorithmBroken),
        ("echo nonsense >/out/findings.json", AlgorithmBroken),
        ("busybox ln -s /etc/shadow /out/findings.json", AlgorithmBroken),
        ("busybox mkfifo /out/findings.json", AlgorithmBroken),
        ("sh -c 'kill -9 $$'", AlgorithmFailed),
    ],
)
def test_every_other_end_has_its_error(image: Any, package: Any, runtime: Runtime, script: str, error: type[Exception]) -> None:
    manifest, folder = package(image(shell(script), ENTRY), memory=200, timeout=4)
    with pytest.raises(error) as caught:
        runtime.run(manifest, folder, {SERIES: [CT]})
    assert type(caught.value) is error
    assert containers_left() == []


def test_a_cancelled_container_is_stopped(image: Any, package: Any, runtime: Runtime) -> None:
    manifest, folder = package(image(shell("sleep 50"), ENTRY))
    began = time.monotonic()
    with pytest.raises(AlgorithmCancelled):
        runtime.run(manifest, folder, {SERIES: [CT]}, stop=lambda: time.monotonic() - began > 2)
    assert containers_left() == []


def test_an_image_that_is_not_here_is_not_pulled(package: Any, runtime: Runtime, tmp_path: Path) -> None:
    folder = make_package(tmp_path / "p")
    text = (folder / "algorithm.toml").read_text().replace('runner = "python"', 'runner = "container"')
    text = text.replace('"counting:run"', f'"localhost/nobody/has-this@sha256:{"0" * 64}"')
    (folder / "algorithm.toml").write_text(text)
    with pytest.raises(AlgorithmFailed, match="podman"):
        runtime.run(read_manifest(folder), folder, {SERIES: [CT]})


def test_containers_of_a_killed_site_are_removed(image: Any, tmp_path: Path) -> None:
    tag = image(shell("sleep 100"), ENTRY)
    for mark, home in (("caregrid-mine-", "dead"), ("caregrid-mine-", "alive"), ("caregrid-other-", "dead")):
        _podman.call("create", "--pull", "never", "--label", f"{_podman.LABEL}={mark}{home}", *_podman._ulimits(), tag)
    try:
        _podman.sweep("caregrid-mine-", {"alive"})
        labels = _podman.call("ps", "--all", "--filter", f"label={_podman.LABEL}", "--format", "{{.Labels}}")
        assert "mine-alive" in labels
        assert "other-dead" in labels
        assert "mine-dead" not in labels
    finally:
        _podman.call("rm", "--force", "--time", "0", *containers_left())


APP = {
    "command": '["/bin/sh", "/opt/holoscan/app/run.sh"]',
    "input": {"path": "input"},
    "output": {"path": "output"},
    "workingDirectory": "/var/holoscan",
    "environment": {"HOLOSCAN_APPLICATION": "/opt/holoscan/app"},
    "timeout": 20,
}
PACKAGE = {"resources": {"cpu": 1, "gpu": 0, "memory": "256Mi", "sharedMemory": "64Mi"}}

MAP_SCRIPT = """#!/bin/sh
mkdir -p $HOLOSCAN_OUTPUT_PATH/series
for file in $(find $HOLOSCAN_INPUT_PATH -name '*.dcm'); do cp $file $HOLOSCAN_OUTPUT_PATH/series/; done
busybox ln -s /etc/shadow $HOLOSCAN_OUTPUT_PATH/link.dcm
echo "$HOLOSCAN_APPLICATION $(id -u)" >$HOLOSCAN_OUTPUT_PATH/notes.txt
"""


def map_files(app: dict[str, Any], place: str = "/etc/holoscan") -> dict[str, str]:
    files = {f"{place}/app.json": json.dumps(app), f"{place}/pkg.json": json.dumps(PACKAGE)}
    return {**files, "/opt/holoscan/app/run.sh": MAP_SCRIPT, "/var/holoscan/keep": ""}


def test_a_map_is_run_by_its_own_manifests(image: Any, package: Any, runtime: Runtime) -> None:
    tag = image(map_files(APP), ["/bin/sh", "/opt/holoscan/app/run.sh"], user="1000")
    manifest, folder = package(tag, runner="map")
    answer = runtime.answer(manifest, folder, {SERIES: [CT, CT]})
    assert answer.findings.values == {"files": 2}
    assert answer.findings.warnings == ("2 files that are not DICOM were left out",)
    assert [pydicom.dcmread(path).SOPInstanceUID for path in answer.files] == [pydicom.dcmread(CT).SOPInstanceUID] * 2
    runtime.forget(answer)
    assert not any(path.exists() for path in answer.files)


def test_a_map_of_the_older_place(image: Any) -> None:
    tag = image(map_files({**APP, "workingDirectory": "/var/monai"}, "/etc/monai"), ["/bin/sh"])
    said = read_map_manifest(_podman.image_id(tag))
    assert (said.place, said.input, said.memory_mb, said.command) == (
        "/etc/monai",
        "/var/monai/input",
        256,
        "/bin/sh /opt/holoscan/app/run.sh",
    )


def test_an_image_that_is_no_map(image: Any, package: Any, runtime: Runtime) -> None:
    manifest, folder = package(image(shell("exit 0"), ENTRY), runner="map")
    with pytest.raises(ManifestInvalid, match="no MONAI Application Package"):
        runtime.run(manifest, folder, {SERIES: [CT]})


@pytest.mark.parametrize(
    "change",
    [
        {"input": {"path": "../../etc"}},
        {"output": {"path": "/out,source=/"}},
        {"output": {"path": "/a:/b"}},
        {"command": ""},
        {"command": "[" * 100_000},
        {"environment": {"A=B": "x"}},
        {"environment": {"A": 1}},
        {"timeout": "long"},
        {"workingDirectory": 7},
    ],
)
def test_map_manifests_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        parse_map_manifest({**APP, **change}, PACKAGE)
