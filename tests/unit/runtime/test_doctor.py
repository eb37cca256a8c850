"""The doctor tells what is so on this machine, and a remedy for what is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from caregrid.runtime import _cgroups, _podman, doctor


def test_every_check_has_a_name_and_says_something(tmp_path: Path) -> None:
    checks = doctor.probe(tmp_path / "not" / "made" / "yet")
    assert len({check.name for check in checks}) == len(checks) >= 10
    assert all(check.says for check in checks)
    assert all(check.remedy for check in checks if check.ok is not True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed on this machine")
def test_the_sandbox_is_really_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    assert doctor.sandbox().ok is (subprocess.run(bare, capture_output=True).returncode == 0)
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor.sandbox()
    assert (check.ok, "no permissions" in check.says, bool(check.remedy)) == (False, True, True)


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    _podman.program.cache_clear()
    try:
        assert (doctor.sandbox().ok, doctor.containers().ok, doctor.dcmtk().ok) == (False, None, None)
        assert "bubblewrap" in doctor.sandbox().remedy
    finally:
        _podman.program.cache_clear()


def test_no_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cgroups, "bases", lambda: None)
    assert doctor.memory_limits().ok is None


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.free_space(tmp_path).says.endswith("GiB in the data folder")
    monkeypatch.setattr(doctor, "FREE_FLOOR", 1 << 62)
    assert doctor.free_space(tmp_path).ok is False


def test_sync_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_SYNC_MS", 0.0)
    check = doctor.sync_time(tmp_path, 3)
    assert check.ok is None
    assert "faster disk" in check.remedy


def test_kinds_of_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = doctor.disk_kind(tmp_path).says.partition(":")[0]
    said = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "-T", str(tmp_path)], capture_output=True, text=True)
    if said.returncode == 0:
        assert kind == said.stdout.strip()
    monkeypatch.setattr(doctor, "NETWORK_DISKS", (kind,))
    assert doctor.disk_kind(tmp_path).ok is False
