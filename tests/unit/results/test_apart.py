"""The process beside: it says what the check here says, and its death is nobody's loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from caregrid.results import Apart, validate, write_results
from tests.support.results import context, ct_series, findings


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    made = Apart()
    yield made
    made.close()


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return ct_series(tmp_path_factory.mktemp("source"))


@pytest.fixture
def seg(series: list[Path], tmp_path: Path) -> Path:
    ((_, dataset),) = write_results(context(series), findings(series), ("dicom_seg",))
    dataset.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    return tmp_path / "seg.dcm"


def test_it_says_the_same(apart: Apart, series: list[Path], seg: Path) -> None:
    apart.expect(series)
    assert apart.validate(seg, series) == validate(seg, series)
    dataset = dcmread(seg)
    dataset.PatientID, dataset.SegmentSequence[0].SegmentAlgorithmType = "ANOTHER", "MANUAL"
    dataset.save_as(seg)
    for ours in (True, False):
        said = apart.validate(seg, series, ours=ours)
        assert said == validate(seg, series, ours=ours)
        assert "6.1.1: PatientID is not the source's" in said.errors
        assert any("AUTOMATIC" in each for each in said.errors) is ours


def test_files_that_cannot_be_read_ahead_do_no_harm(apart: Apart, series: list[Path], seg: Path, tmp_path: Path) -> None:
    apart.expect([tmp_path / "nowhere.dcm", *series])
    assert apart.validate(seg, series).ok


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def test_its_death_is_survived(series: list[Path], seg: Path) -> None:
    before = set(children())
    apart = Apart()
    assert apart.validate(seg, series).ok
    for pid in set(children()) - before:
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    assert apart.validate(seg, series).ok
    apart.expect(series)
    assert apart.validate(seg, series).ok
    apart.close()


def test_it_leaves_when_its_owner_is_killed() -> None:
    code = (
        "import time\n"
        "from caregrid.results import Apart\n"
        "if __name__ == '__main__':\n"
        "    apart = Apart(); apart.expect([])\n"
        "    print(list(apart._pool._processes)[0], flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    beside = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{beside}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{beside}").exists()
