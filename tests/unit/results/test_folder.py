"""The folder destination: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from caregrid.domain.settings import Destination
from caregrid.errors import DeliveryFailed
from caregrid.results import folder

SOURCE = Path(str(get_testdata_file("CT_small.dcm")))


def to(path: Path | None) -> Destination:
    return Destination("share", "folder", path=path)


def test_the_file_lies_under_its_study_byte_for_byte(tmp_path: Path) -> None:
    (sent,) = folder.send(to(tmp_path), [SOURCE])
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path.name == f"{sent.sop_instance_uid}.dcm"
    assert path.read_bytes() == SOURCE.read_bytes()


def test_sending_again_leaves_one_file(tmp_path: Path) -> None:
    for _ in range(2):
        assert all(sent.accepted for sent in folder.send(to(tmp_path), [SOURCE]))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_disk_that_fails_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeliveryFailed, match="No space left"):
        folder.send(to(tmp_path), [SOURCE])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    missing = to(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DeliveryFailed):
        folder.send(missing, [SOURCE])
    with pytest.raises(DeliveryFailed):
        folder.echo(missing)
    with pytest.raises(DeliveryFailed, match="no path"):
        folder.send(to(None), [SOURCE])
