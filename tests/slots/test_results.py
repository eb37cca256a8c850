"""The promise of the results slot, run on every plug: a format reads back and is valid; a destination has what it accepted."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from caregrid.domain.findings import Findings
from caregrid.plugs import load, names
from caregrid.results import validate
from tests.support.receivers import RECEIVERS
from tests.support.results import context, ct_series, findings

PLUGS = {name: load("results", name) for name in names("results")}
FORMATS = [plug for plug in PLUGS.values() if hasattr(plug, "FORMAT")]
DESTINATIONS = [plug for plug in PLUGS.values() if hasattr(plug, "DESTINATION")]


def name(plug: ModuleType) -> str:
    return plug.__name__.rsplit(".", 1)[1]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return ct_series(tmp_path / "source", changes={"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"})


def encoded(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_the_slot_has_its_plugs() -> None:
    assert {"dicom_seg", "dicom_sr", "dicom_sc"} <= {name(plug) for plug in FORMATS}
    assert {"cstore", "stow", "folder"} <= {name(plug) for plug in DESTINATIONS}
    assert all(name(plug) == plug.FORMAT for plug in FORMATS)
    assert all(name(plug) == plug.DESTINATION for plug in DESTINATIONS)


@pytest.mark.parametrize("plug", FORMATS, ids=name)
class TestFormat:
    def test_reads_back_with_the_identity_of_the_source(self, plug: ModuleType, paths: list[Path]) -> None:
        made = plug.write(context(paths), findings(paths))
        assert made
        source = dcmread(paths[0], stop_before_pixels=True)
        for dataset in made:
            read = dcmread(BytesIO(encoded(dataset)))
            assert str(read.PatientName) == "Müller^Jörg"
            for keyword in ("PatientID", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber", "StudyDate"):
                assert read.get(keyword) == source.get(keyword)
            assert read.SeriesInstanceUID != source.SeriesInstanceUID

    def test_no_validator_finds_an_error(self, plug: ModuleType, paths: list[Path]) -> None:
        for dataset in plug.write(context(paths), findings(paths)):
            assert validate(dataset, paths).errors == ()

    def test_a_retry_writes_the_same_and_another_run_other_objects(self, plug: ModuleType, paths: list[Path]) -> None:
        found = findings(paths)
        first, again = (plug.write(context(paths), found) for _ in range(2))
        other = plug.write(context(paths, uid_seed="another run"), found)
        assert [encoded(item) for item in first] == [encoded(item) for item in again]
        assert {item.SOPInstanceUID for item in first}.isdisjoint({item.SOPInstanceUID for item in other})

    def test_nothing_found_is_no_error(self, plug: ModuleType, paths: list[Path]) -> None:
        for dataset in plug.write(context(paths), Findings("Nothing found")):
            assert validate(dataset, paths).errors == ()


@pytest.mark.network
@pytest.mark.parametrize("plug", DESTINATIONS, ids=name)
class TestDestination:
    def test_what_was_said_accepted_is_there(self, plug: ModuleType, paths: list[Path], tmp_path: Path) -> None:
        assert plug.DESTINATION in RECEIVERS, f"add a receiver for {plug.DESTINATION} to tests/support/receivers.py"
        files = []
        for made in (item for format in FORMATS for item in format.write(context(paths), findings(paths))):
            files.append(tmp_path / f"{made.SOPInstanceUID}.dcm")
            files[-1].write_bytes(encoded(made))
        with RECEIVERS[plug.DESTINATION](tmp_path) as receiver:
            assert plug.echo(receiver.destination)
            sent = plug.send(receiver.destination, files)
            assert [item.sop_instance_uid for item in sent] == [path.stem for path in files]
            assert all(item.accepted and not item.transient for item in sent)
            for path in files:
                assert dcmread(BytesIO(receiver.arrived(path.stem))) == dcmread(path)
            again = plug.send(receiver.destination, files[:1])
            assert [item.accepted for item in again] == [True]

    def test_nothing_to_send_is_no_error(self, plug: ModuleType, tmp_path: Path) -> None:
        with RECEIVERS[plug.DESTINATION](tmp_path) as receiver:
            assert plug.send(receiver.destination, []) == []
