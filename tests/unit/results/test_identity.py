"""Identity, character sets, times and UIDs: what every result takes from its source and its run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from caregrid.results import dicom_kos, make_uid, validate, write_results
from caregrid.results._common import IDENTITY_TYPE_2, put_identity, series_description, series_number
from tests.support.results import WRITTEN, context, ct_series, findings, headers, manifest

FORMATS = ("dicom_seg", "dicom_sr", "dicom_sc")

NAMES = [
    pytest.param("ISO_IR 100", "Buc^Jérôme", id="Latin 1"),
    pytest.param(["", "ISO 2022 IR 100"], "Müller^Jörg", id="ISO 2022 IR 100"),
    pytest.param(["", "ISO 2022 IR 144"], "Люкceмбypг^Иван", id="ISO 2022 IR 144"),
    pytest.param(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", id="ISO 2022 IR 87"),
    pytest.param(["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", id="ISO 2022 IR 13 and 87"),
    pytest.param(["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", id="ISO 2022 IR 149"),
    pytest.param("ISO_IR 192", "Wang^XiaoDong=王^小東", id="UTF-8"),
    pytest.param("GB18030", "Wang^XiaoDong=王^小东", id="GB18030"),
    pytest.param(None, "Plain^Name", id="ASCII"),
]


def reread(dataset: Dataset) -> Dataset:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return dcmread(BytesIO(buffer.getvalue()))


def all_results(paths: list[Path], **changes: object) -> list[Dataset]:
    made = [dataset for _, dataset in write_results(context(paths, **changes), findings(paths), FORMATS)]
    return [*made, dicom_kos.withdraw(context(paths, **changes), made)]


@pytest.mark.parametrize(("charset", "name"), NAMES)
def test_names_survive_every_character_set(tmp_path: Path, charset: str | list[str] | None, name: str) -> None:
    paths = ct_series(tmp_path, slices=3, changes={"SpecificCharacterSet": charset, "PatientName": name})
    (source,) = headers(paths[:1])
    assert str(source.PatientName) == name
    for dataset in all_results(paths):
        read = reread(dataset)
        assert str(read.PatientName) == name
        assert read.get("SpecificCharacterSet") == (None if name.isascii() else "ISO_IR 192")
        assert not [error for error in validate(dataset, paths).errors if "text" in error or "PatientName" in error]


@pytest.mark.parametrize("name", ["chrGerm.dcm", "chrRuss.dcm", "chrJapMulti.dcm", "chrH32.dcm", "chrI2.dcm", "chrX1.dcm"])
def test_names_of_real_files_are_decoded(tmp_path: Path, name: str) -> None:
    original = dcmread(str(get_testdata_file(name, read=False) or _charset_file(name)))
    paths = ct_series(tmp_path, slices=2)
    for path in paths:
        header = dcmread(path)
        header.SpecificCharacterSet = original.get("SpecificCharacterSet")
        header.PatientName = original.PatientName
        header.save_as(path)
    for dataset in all_results(paths):
        assert str(reread(dataset).PatientName) == str(original.PatientName)


def _charset_file(name: str) -> str:
    from pydicom.data import get_charset_files

    (path,) = get_charset_files(name)
    return path


def test_identity_is_the_sources_down_to_odd_values(tmp_path: Path) -> None:
    issuer = Dataset()
    issuer.UniversalEntityID, issuer.UniversalEntityIDType = "1.2.3", "ISO"
    odd = {
        "PatientID": "A/12 34",
        "PatientSex": "",
        "PatientBirthDate": "",
        "IssuerOfPatientID": "HOSPITAL",
        "IssuerOfPatientIDQualifiersSequence": [issuer],
        "AccessionNumber": "ACC-1",
        "StudyID": "S 1",
        "StudyTime": "101010.5",
        "ReferringPhysicianName": "Doe^J",
        "StudyDescription": "CT Thorax",
    }
    paths = ct_series(tmp_path, slices=3, changes=odd)
    (source,) = headers(paths[:1])
    for dataset in all_results(paths):
        read = reread(dataset)
        for keyword in (*IDENTITY_TYPE_2, "StudyInstanceUID", "IssuerOfPatientID", "StudyDescription"):
            assert str(read[keyword].value) == str(source[keyword].value), keyword
        assert read.IssuerOfPatientIDQualifiersSequence[0].UniversalEntityID == "1.2.3"
        assert validate(dataset, paths).errors == ()


def test_a_source_without_identity_makes_results_with_empty_identity(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=2)
    for path in paths:
        header = dcmread(path)
        for keyword in (*IDENTITY_TYPE_2, "SeriesNumber"):
            if keyword in header:
                del header[keyword]
        header.save_as(path)
    for dataset in all_results(paths):
        assert all(dataset[keyword].is_empty for keyword in IDENTITY_TYPE_2)
        assert [error for error in validate(dataset, paths).errors if not error.startswith("dciodvfy")] == []


def test_the_same_run_makes_the_same_bytes_and_another_run_other_uids(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=3)
    one, again, other = all_results(paths), all_results(paths), all_results(paths, uid_seed="run-2")
    for first, second in zip(one, again, strict=True):
        buffers = BytesIO(), BytesIO()
        first.save_as(buffers[0], enforce_file_format=True)
        second.save_as(buffers[1], enforce_file_format=True)
        assert buffers[0].getvalue() == buffers[1].getvalue()
    assert {item.SOPInstanceUID for item in one}.isdisjoint({item.SOPInstanceUID for item in other})
    assert {item.SeriesInstanceUID for item in one}.isdisjoint({item.SeriesInstanceUID for item in other})
    assert len({item.SOPInstanceUID for item in one}) == len({item.SeriesInstanceUID for item in one}) == 4


def test_uids_are_short_and_depend_on_every_part() -> None:
    made = [make_uid("seed", "a", 1), make_uid("seed", "a", 2), make_uid("seed", "a1"), make_uid("seeda", 1), make_uid("seed")]
    assert len(set(made)) == len(made)
    assert all(len(uid) <= 44 and uid.startswith("2.25.") for uid in made)
    assert make_uid("seed", "a", 1) == made[0]


def test_series_numbers_are_stable_apart_and_clash_with_no_source(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=2)
    numbers = [item.SeriesNumber for item in all_results(paths)]
    assert len(set(numbers)) == 4
    assert numbers == [item.SeriesNumber for item in all_results(paths, uid_seed="run-2")]
    taken = series_number(context(paths), "dicom_sr")
    clashing = ct_series(tmp_path / "clash", slices=2, changes={"SeriesNumber": taken})
    assert series_number(context(clashing), "dicom_sr") != taken


def test_series_description_says_ai_algorithm_and_version_in_64_characters() -> None:
    assert series_description(manifest()) == "AI Lung volume 1.2.0"
    long = series_description(manifest(title="Lunge " * 30, version="10.20.30-rc1"))
    assert len(long) <= 64
    assert long.startswith("AI ")
    assert long.endswith(" 10.20.30-rc1")


@pytest.fixture
def summer_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/London")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("summer_time")
def test_times_are_in_the_hospitals_local_time(tmp_path: Path) -> None:
    started = datetime(2026, 7, 1, 23, 30, 0, tzinfo=UTC)
    paths = ct_series(tmp_path, slices=2)
    for dataset in all_results(paths, started_at=started):
        said = (str(dataset.ContentDate), str(dataset.ContentTime), dataset.TimezoneOffsetFromUTC)
        assert said == ("20260702", "003000", "+0100")


def test_the_offset_of_the_source_wins(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=2, changes={"TimezoneOffsetFromUTC": "-0330"})
    for dataset in all_results(paths):
        assert (str(dataset.ContentTime), dataset.TimezoneOffsetFromUTC) == ("070015.250000", "-0330")
        assert str(dataset.InstanceCreationTime) == WRITTEN.strftime("0701%S")


def test_the_algorithm_is_contributing_equipment(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=2)
    other = manifest(digest="1" * 64)
    for dataset, rebuilt in zip(all_results(paths), all_results(paths, manifest=other), strict=True):
        mine = [item for item in dataset.ContributingEquipmentSequence if "DeviceUID" in item]
        assert [(item.ManufacturerModelName, item.SoftwareVersions) for item in mine] == [("lung-volume", "1.2.0")]
        assert mine[0].PurposeOfReferenceCodeSequence[0].CodeMeaning == "Processing Equipment"
        assert mine[0].DeviceUID != next(item for item in rebuilt.ContributingEquipmentSequence if "DeviceUID" in item).DeviceUID
        assert (dataset.Manufacturer, dataset.DeviceSerialNumber, dataset.SoftwareVersions) == ("caregrid", "site-1", "0.1.0")


def test_putting_identity_on_does_not_share_it(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=2)
    made = context(paths)
    one, two = Dataset(), Dataset()
    put_identity(one, made.identity)
    put_identity(two, made.identity)
    one.PatientName = "Changed"
    assert two.PatientName == made.identity.PatientName != "Changed"
    assert Tag("PatientName") in one
