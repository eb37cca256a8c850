"""The store's promise: bytes on disk, rows in the index, then the receipt; and what it does with what it cannot keep."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
import sqlalchemy as sa
from pydicom.data import get_testdata_file
from sqlalchemy.exc import SQLAlchemyError

from caregrid.domain.states import STUDY
from caregrid.domain.study import Incoming, Source
from caregrid.errors import IntakeError, MalformedObject, SopMismatch, StoreFull
from caregrid.store import audit
from caregrid.store.database import create_all, open_engine, writing
from caregrid.store.files import HalfFile
from caregrid.store.instances import InstanceStore, record_rejection
from caregrid.store.studies import OPEN_STATES
from caregrid.store.tables import instance, quarantine, rejection, series, study
from tests.support.scanner import new_study
from tests.support.scu import Raw, raw

SOURCE = Source("dimse", "CT1", "CAREGRID", "10.0.0.5")


@dataclass
class Kept:
    """A store and its index."""

    engine: sa.Engine
    store: InstanceStore

    def rows(self, table: sa.Table) -> list[dict[str, object]]:
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(table)).mappings()]

    def files(self, folder: str = "instances") -> list[Path]:
        return [file for file in (self.store.folder / folder).rglob("*") if file.is_file()]


@pytest.fixture
def kept(database_url: str, tmp_path: Path) -> Iterator[Kept]:
    """On SQLite and on PostgreSQL."""
    engine = open_engine(database_url)
    create_all(engine)
    store = InstanceStore(engine, tmp_path / "store", 0)
    yield Kept(engine, store)
    engine.dispose()


@pytest.fixture
def light(db: sa.Engine, tmp_path: Path) -> Kept:
    """On SQLite only, where the database makes no difference."""
    return Kept(db, InstanceStore(db, tmp_path / "store", 0))


def part10(dataset: pydicom.Dataset) -> bytes:
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def bare(dataset: pydicom.Dataset) -> Raw:
    return raw(part10(dataset))


def by_dimse(each: Raw, source: Source = SOURCE) -> Incoming:
    return Incoming(source, [each.content], False, each.sop_class, each.sop_instance, each.transfer_syntax)


def by_file(dataset: pydicom.Dataset, pieces: int = 1) -> Incoming:
    content = part10(dataset)
    step = -(-len(content) // pieces)
    chunks = [memoryview(content)[start : start + step] for start in range(0, len(content), step)]
    return Incoming(replace(SOURCE, protocol="dicomweb"), chunks, part10=True)


# kept


def test_kept_as_received_behind_our_file_meta(kept: Kept) -> None:
    (dataset,) = new_study(1, PatientName="Test^Canary", SeriesDescription="thin")
    each = bare(dataset)
    receipt = kept.store.receive(by_dimse(each))
    assert (receipt.status, receipt.sop_instance_uid, receipt.study_instance_uid) == (
        "stored",
        dataset.SOPInstanceUID,
        dataset.StudyInstanceUID,
    )
    (row,) = kept.rows(instance)
    whole = kept.store.path(str(row["path"])).read_bytes()
    assert whole.endswith(each.content)
    assert row["size"] == len(whole)
    assert row["sha256"] == hashlib.sha256(each.content).hexdigest()
    assert (row["rows"], row["columns"], row["instance_number"], row["copy"]) == (128, 128, 1, 0)
    assert row["calling_ae"] == "CT1"
    read = pydicom.dcmread(BytesIO(whole))
    assert read == dataset
    assert read.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
    assert read.file_meta.TransferSyntaxUID == each.transfer_syntax
    assert kept.files("tmp") == []


def test_study_and_series_are_counted(kept: Kept) -> None:
    first, second = new_study(3, PatientName="Müller^Änne", SpecificCharacterSet="ISO_IR 100"), new_study(2, Modality="SR")
    for each in second:
        each.StudyInstanceUID = first[0].StudyInstanceUID
    for each in [*first, *second]:
        kept.store.receive(by_dimse(bare(each)))
    (row,) = kept.rows(study)
    assert (row["number_of_series"], row["number_of_instances"], row["modalities"]) == (2, 5, "CT\\SR")
    assert (row["state"], row["generation"], row["late_instances"], row["conflicts"]) == ("receiving", 0, 0, 0)
    assert row["patient_name"] == "Müller^Änne"
    assert row["patient_id"] == first[0].PatientID
    assert str(row["first_received_at"]) < str(row["last_received_at"])
    assert {row["series_instance_uid"]: row["number_of_instances"] for row in kept.rows(series)} == {
        first[0].SeriesInstanceUID: 3,
        second[0].SeriesInstanceUID: 2,
    }


def test_the_same_object_again_is_a_duplicate_by_whatever_door(kept: Kept) -> None:
    (dataset,) = new_study(1)
    receive = kept.store.receive
    assert receive(by_dimse(bare(dataset))).status == "stored"
    assert receive(by_dimse(bare(dataset))).status == "duplicate"
    assert receive(by_file(dataset)).status == "duplicate"
    assert receive(by_file(dataset, pieces=7)).status == "duplicate"
    assert len(kept.rows(instance)) == len(kept.files()) == 1
    assert kept.rows(study)[0]["number_of_instances"] == 1
    assert kept.files("tmp") == []


@pytest.mark.parametrize("pieces", [1, 5])
def test_a_file_is_kept_whole_as_it_came(light: Kept, pieces: int) -> None:
    (dataset,) = new_study(1)
    light.store.receive(by_file(dataset, pieces))
    (row,) = light.rows(instance)
    assert light.store.path(str(row["path"])).read_bytes() == part10(dataset)
    assert row["sha256"] == hashlib.sha256(bare(dataset).content).hexdigest()
    assert row["transfer_syntax_uid"] == dataset.file_meta.TransferSyntaxUID


def test_other_bytes_under_the_same_uid_are_kept_beside_and_flagged(kept: Kept) -> None:
    (dataset,) = new_study(1)
    kept.store.receive(by_dimse(bare(dataset)))
    for number, words in enumerate(("changed", "changed again"), 1):
        dataset.SeriesDescription = words
        assert kept.store.receive(by_dimse(bare(dataset))).status == "conflict"
        assert kept.store.receive(by_dimse(bare(dataset))).status == "duplicate"
        assert kept.rows(study)[0]["conflicts"] == number
    assert sorted(row["copy"] for row in kept.rows(instance)) == [0, 1, 2]
    assert len(kept.files()) == 3
    assert kept.rows(study)[0]["number_of_instances"] == kept.rows(series)[0]["number_of_instances"] == 1
    with kept.engine.connect() as connection:
        assert audit.verify(connection)[0] == 2


@pytest.mark.parametrize("state", sorted(STUDY))
def test_late_instances_are_counted(light: Kept, state: str) -> None:
    late = 0 if state in OPEN_STATES else 2
    first, *others = new_study(3)
    light.store.receive(by_dimse(bare(first)))
    with writing(light.engine) as connection:
        connection.execute(study.update().values(state=state))
    for each in others:
        light.store.receive(by_dimse(bare(each)))
    light.store.receive(by_dimse(bare(first)))  # a duplicate is not late
    (row,) = light.rows(study)
    assert (row["state"], row["late_instances"], row["number_of_instances"]) == (state, late, 3)


# not kept


def _without(keyword: str) -> pydicom.Dataset:
    (dataset,) = new_study(1, PatientName="Canary^Secret", PatientID="CANARY-1")
    delattr(dataset, keyword)
    return dataset


def _cut(bytes_off: int) -> Raw:
    each = bare(new_study(1, PatientName="Canary^Secret", PatientID="CANARY-1")[0])
    return replace(each, content=each.content[:-bytes_off])


def _broken() -> dict[str, tuple[Incoming, type[IntakeError], str]]:
    (good,) = new_study(1, PatientName="Canary^Secret", PatientID="CANARY-1")
    each, path = bare(good), new_study(1)[0]
    path.SOPInstanceUID = "../../../etc/passwd"
    long = new_study(1)[0]
    long.StudyInstanceUID = "1." * 40 + "1"
    palette = Incoming(SOURCE, [Path(pydicom.data.__file__).parent.joinpath("palettes", "hotiron.dcm").read_bytes()], part10=True)
    return {
        "no study": (by_dimse(bare(_without("StudyInstanceUID"))), MalformedObject, "StudyInstanceUID is missing"),
        "no series": (by_dimse(bare(_without("SeriesInstanceUID"))), MalformedObject, "SeriesInstanceUID is missing"),
        "a path as UID": (by_dimse(replace(bare(path), sop_instance=path.SOPInstanceUID)), MalformedObject, "not a UID"),
        "a UID too long": (by_dimse(bare(long)), MalformedObject, "StudyInstanceUID is not a UID"),
        "a palette": (palette, MalformedObject, "Color Palette Storage"),
        "cut short": (by_dimse(_cut(500)), MalformedObject, "longer than what was received"),
        "cut in the pixels": (by_dimse(_cut(5000)), MalformedObject, "(7FE0,0010)"),
        "nothing": (by_dimse(replace(each, content=b"")), MalformedObject, "missing"),
        "noise": (by_dimse(replace(each, content=os.urandom(3000))), MalformedObject, ""),
        "text": (Incoming(SOURCE, [b"hello " * 50], part10=True), MalformedObject, "no DICM"),
        "short text": (Incoming(SOURCE, [b"x"], part10=True), MalformedObject, "no DICM"),
        "another instance": (by_dimse(replace(each, sop_instance="1.2.3")), SopMismatch, "SOPInstanceUID"),
        "another class": (by_dimse(replace(each, sop_class="1.2.840.10008.5.1.4.1.1.4")), SopMismatch, "SOPClassUID"),
        "nothing announced": (by_dimse(replace(each, sop_class="", sop_instance="")), SopMismatch, ""),
    }


@pytest.mark.parametrize("what", list(_broken()))
def test_quarantined_by_name(light: Kept, what: str, caplog: pytest.LogCaptureFixture) -> None:
    incoming, kind, words = _broken()[what]
    with pytest.raises(IntakeError) as caught:
        light.store.receive(incoming)
    assert type(caught.value) is kind
    assert words in caught.value.message
    assert "anary" not in caught.value.message + caplog.text
    (row,) = light.rows(quarantine)
    assert (row["error"], row["reason"]) == (kind.__name__, caught.value.message)
    content = light.store.path(str(row["path"])).read_bytes()
    assert content.endswith(b"".join(incoming.chunks))
    assert row["size"] == len(content)
    assert light.rows(instance) == light.rows(study) == light.files() == light.files("tmp") == []


def test_too_little_space_is_refused_and_nothing_stays(db: sa.Engine, tmp_path: Path) -> None:
    store = InstanceStore(db, tmp_path / "store", free_bytes_floor=1 << 60)
    with pytest.raises(StoreFull):
        store.receive(by_dimse(bare(new_study(1)[0])))
    assert not [file for file in (tmp_path / "store").rglob("*") if file.is_file()]


def test_what_the_index_cannot_take_is_taken_back(light: Kept) -> None:
    first, second = new_study(2)
    light.store.receive(by_dimse(bare(first)))
    with writing(light.engine) as connection:
        connection.execute(sa.text("create trigger no before insert on instance begin select raise(abort, 'no'); end"))
    with pytest.raises(SQLAlchemyError):
        light.store.receive(by_dimse(bare(second)))
    assert len(light.files()) == 1
    with writing(light.engine) as connection:
        connection.execute(sa.text("drop trigger no"))
    assert light.store.receive(by_dimse(bare(second))).status == "stored"
    assert light.rows(study)[0]["number_of_instances"] == 2


def test_a_rejection_is_noted(light: Kept) -> None:
    record_rejection(light.engine, SOURCE, "association", "not on the allow-list")
    (row,) = light.rows(rejection)
    assert (row["calling_ae"], row["address"], row["what"], row["reason"]) == (
        "CT1",
        "10.0.0.5",
        "association",
        "not on the allow-list",
    )


# at once


def test_many_at_once_lose_no_count(kept: Kept) -> None:
    datasets = [each for _ in range(2) for each in new_study(24)]
    again = datasets[:6]
    statuses: list[str] = []

    def work(mine: list[pydicom.Dataset]) -> None:
        for each in mine:
            statuses.append(kept.store.receive(by_dimse(bare(each))).status)

    parts = [datasets[number::8] for number in range(8)] + [again, again]
    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == ["duplicate"] * 12 + ["stored"] * 48
    assert [row["number_of_instances"] for row in kept.rows(study)] == [24, 24]
    assert [row["number_of_series"] for row in kept.rows(study)] == [1, 1]
    assert [row["number_of_instances"] for row in kept.rows(series)] == [24, 24]
    assert len(kept.files()) == len(kept.rows(instance)) == 48


def _receive_all(url: str, folder: Path, objects: list[Raw], statuses: multiprocessing.Queue[list[str]]) -> None:
    engine = open_engine(url)
    store = InstanceStore(engine, folder, 0)
    statuses.put([store.receive(by_dimse(each)).status for each in objects])
    engine.dispose()


def test_several_processes_lose_no_count(kept: Kept, database_url: str) -> None:
    shared = [bare(each) for each in new_study(20)]
    context = multiprocessing.get_context("spawn")
    statuses: multiprocessing.Queue[list[str]] = context.Queue()
    processes = [
        context.Process(target=_receive_all, args=(database_url, kept.store.folder, order, statuses))
        for order in (shared, shared[::-1], shared[10:] + shared[:10])
    ]
    for process in processes:
        process.start()
    told = [status for _ in processes for status in statuses.get(timeout=60)]
    for process in processes:
        process.join(30)
    assert sorted(told) == ["duplicate"] * 40 + ["stored"] * 20
    (row,) = kept.rows(study)
    assert (row["number_of_instances"], row["number_of_series"], row["conflicts"]) == (20, 1, 0)
    assert kept.rows(series)[0]["number_of_instances"] == 20
    assert len(kept.files()) == 20


def test_a_forked_process_has_connections_of_its_own(kept: Kept) -> None:
    first, second, third = (bare(each) for each in new_study(3))
    kept.store.receive(by_dimse(first))
    child = os.fork()
    if child == 0:
        try:
            kept.store.receive(by_dimse(second))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kept.store.receive(by_dimse(third))
    assert kept.rows(study)[0]["number_of_instances"] == 3


# after a crash


def test_sweep_takes_leftovers_and_leaves_what_is_being_written(light: Kept) -> None:
    folder = light.store.folder / "tmp"
    (folder / "left").write_bytes(b"half")
    with HalfFile(folder) as half:
        half.write([b"under way"])
        assert light.store.sweep() == 1
        assert [file.name for file in folder.iterdir()] == [Path(half.path).name]
    assert list(folder.iterdir()) == []


def test_what_a_dead_process_promised_is_there_after_the_sweep(db: sa.Engine, tmp_path: Path) -> None:
    objects = [bare(each) for each in new_study(60)]
    url = f"sqlite:///{tmp_path}/site.db"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_promise_and_die, args=(url, tmp_path / "store", objects))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    store = InstanceStore(db, tmp_path / "store", 0)
    store.sweep()
    kept = Kept(db, store)
    paths = {row["sop_instance_uid"]: str(row["path"]) for row in kept.rows(instance)}
    for each in objects:
        assert store.path(paths[each.sop_instance]).read_bytes().endswith(each.content)
    assert kept.rows(study)[0]["number_of_instances"] == 60
    assert kept.files("tmp") == []


def _promise_and_die(url: str, folder: Path, objects: list[Raw]) -> None:
    store = InstanceStore(open_engine(url), folder, 0)
    for each in objects:
        store.receive(by_dimse(each))
    os._exit(9)


@pytest.mark.parametrize(
    "name", ["693_UNCI.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "JPEG2000.dcm", "emri_small_RLE.dcm"]
)
def test_every_kind_of_encoding(light: Kept, name: str) -> None:
    path = get_testdata_file(name)
    each = raw(Path(str(path)))
    assert light.store.receive(by_dimse(each)).status == "stored"
    (row,) = light.rows(instance)
    expected = pydicom.dcmread(str(path), stop_before_pixels=True)
    assert (row["rows"], row["columns"]) == (expected.get("Rows"), expected.get("Columns"))
    assert row["number_of_frames"] == (int(expected.NumberOfFrames) if "NumberOfFrames" in expected else None)
    assert pydicom.dcmread(light.store.path(str(row["path"]))) == pydicom.dcmread(str(path))


@pytest.mark.parametrize("part_10", [True, False])
@pytest.mark.parametrize("size", [1000, 7])
def test_object_in_many_pieces_is_the_object_in_one(light: Kept, part_10: bool, size: int) -> None:
    dataset = new_study(1)[0]
    whole = part10(dataset) if part_10 else bare(dataset).content
    pieces = [memoryview(bytearray(whole[start : start + size])) for start in range(0, len(whole), size)]
    announced = {} if part_10 else {
        "sop_class_uid": str(dataset.SOPClassUID),
        "sop_instance_uid": str(dataset.SOPInstanceUID),
        "transfer_syntax_uid": str(dataset.file_meta.TransferSyntaxUID),
    }  # fmt: skip
    assert light.store.receive(Incoming(SOURCE, pieces, part10=part_10, **announced)).status == "stored"
    assert light.store.receive(Incoming(SOURCE, [whole], part10=part_10, **announced)).status == "duplicate"


@pytest.mark.parametrize("pieces", [[], [b""], [b"", b""], [b"x" * 100, b"y" * 200]])
@pytest.mark.parametrize("part_10", [True, False])
def test_nothing_and_nonsense_in_pieces_are_refused_by_name(light: Kept, part_10: bool, pieces: list[bytes]) -> None:
    announced = {
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "sop_instance_uid": "1.2.3",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
    }
    with pytest.raises(MalformedObject):
        light.store.receive(Incoming(SOURCE, pieces, part10=part_10, **announced))
    assert len(light.rows(quarantine)) == 1
