"""The journal by itself: records come back whole and in order, torn ones do not, no segment is reused before it is settled."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from pathlib import Path

import pydicom
import pytest
import sqlalchemy as sa

from caregrid.domain.study import Incoming, Source
from caregrid.store._journal import BLOCK, Journal, Label, leftovers
from caregrid.store.instances import InstanceStore
from caregrid.store.tables import instance
from tests.support.doors import part10
from tests.support.scanner import new_study
from tests.support.site import wait_for

MEGABYTE = 1 << 20
SOURCE = Source("dimse", "CT1", "CAREGRID", "127.0.0.1")


def made(number: int, size: int = 50_000) -> tuple[Label, list[bytes], int]:
    prefix, data = b"meta%04d" % number, os.urandom(size)
    label = Label(SOURCE, f"instances/{number}", hashlib.sha256(data).hexdigest(), len(prefix), zlib.crc32(prefix))
    return label, [prefix, data[:1000], data[1000:]], len(prefix) + size


class Settling:
    """Stands for syncing everything: counts, and waits while ``held``."""

    def __init__(self) -> None:
        self.times = 0
        self.may = threading.Event()
        self.may.set()
        self.failing = False

    def __call__(self) -> None:
        assert self.may.wait(20)
        if self.failing:
            raise OSError("the disk does not answer")
        self.times += 1


@pytest.fixture
def settling() -> Settling:
    return Settling()


def ready(folder: Path, settling: Settling, size: int = MEGABYTE) -> Journal:
    journal = Journal(folder, settling, 0, segment_bytes=size)
    wait_for(lambda: len(journal._free) == 2, 10, "the segments")
    return journal


def abandoned(journal: Journal) -> None:
    """As the process's death would leave it: the files stay, their locks go."""
    journal.forget()


def test_records_come_back_whole_and_in_order(tmp_path: Path, settling: Settling) -> None:
    journal, records = ready(tmp_path / "j", settling), [made(number) for number in range(15)]
    for each in records:
        assert journal.add(*each) is not None
    abandoned(journal)
    found = [record for _, of_segment in leftovers(tmp_path / "j") for record in of_segment]
    assert [label for label, _ in found] == [label for label, _, _ in records]
    assert [content for _, content in found] == [b"".join(pieces) for _, pieces, _ in records]


def test_a_torn_record_ends_the_segment(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    for number in range(5):
        assert journal.add(*made(number)) is not None
    (path,) = {each.path for each in [journal._active] if each}
    abandoned(journal)
    with path.open("r+b") as file:
        file.seek(3 * (BLOCK + 53248) + BLOCK + 20_000)
        file.write(b"torn")
    found = [label.path for _, records in leftovers(tmp_path / "j") for label, _ in records]
    assert found == ["instances/0", "instances/1", "instances/2"]


def test_a_segment_is_used_again_only_after_its_files_are_settled(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    settling.may.clear()
    taken = []
    for number in range(60):
        segment = journal.add(*made(number))
        if segment is None:
            break
        journal.kept(segment)
        taken.append(number)
    assert 30 < len(taken) < 60, "both segments full: no room, the caller syncs by itself"
    settling.may.set()
    wait_for(lambda: journal.add(*made(100)) is not None, 10, "room again")
    assert settling.times >= 1
    abandoned(journal)


def test_what_is_still_being_kept_is_waited_for(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    first = journal.add(*made(0))
    assert first is not None
    number = 1
    while (segment := journal.add(*made(number))) is not None:
        journal.kept(segment)
        number += 1
        assert number < 200
        if segment is not first and settling.times:
            pytest.fail("a segment with an object under way was settled")
    journal.kept(first)
    wait_for(lambda: settling.times > 0, 10, "settled once the object was kept")
    abandoned(journal)


def test_old_records_beyond_the_new_ones_do_not_come_back(tmp_path: Path, settling: Settling) -> None:
    journal, last = ready(tmp_path / "j", settling), ""
    for number in range(200):
        wait_for(lambda: journal._active or journal._free, 10, "room")
        label, pieces, length = made(number)
        segment = journal.add(label, pieces, length)
        if segment is not None:
            journal.kept(segment)
            last = label.path
    abandoned(journal)
    for _, records in leftovers(tmp_path / "j"):
        numbers = [int(label.path.rpartition("/")[2]) for label, _ in records]
        assert numbers == sorted(numbers)
    assert last in {label.path for _, records in leftovers(tmp_path / "j") for label, _ in records}


def test_settling_that_fails_keeps_the_records(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    settling.failing = True
    number = 0
    while (segment := journal.add(*made(number))) is not None:
        journal.kept(segment)
        number += 1
    assert journal.add(*made(999)) is None
    abandoned(journal)
    assert sum(1 for _, records in leftovers(tmp_path / "j") for _ in records) == number


def test_segments_of_a_living_process_are_left_alone_and_a_closed_one_leaves_none(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    segment = journal.add(*made(1))
    assert segment is not None
    journal.kept(segment)
    assert list(leftovers(tmp_path / "j")) == []
    journal.close()
    assert settling.times == 1
    assert not list((tmp_path / "j").iterdir())


def test_what_is_too_large_for_a_segment_is_not_taken(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    assert journal.add(*made(1, MEGABYTE // 2)) is None
    assert Journal(tmp_path / "k", settling, floor=1 << 60).add(*made(2)) is None
    abandoned(journal)


def test_a_half_made_segment_is_removed(tmp_path: Path, settling: Settling) -> None:
    journal = ready(tmp_path / "j", settling)
    abandoned(journal)
    (tmp_path / "j" / "left.new").write_bytes(bytes(100))
    assert sum(1 for _ in leftovers(tmp_path / "j")) == 2
    assert not list((tmp_path / "j").glob("*.new"))


def test_a_process_that_takes_the_place_of_a_killed_one_keeps_what_that_had_promised(db: sa.Engine, tmp_path: Path) -> None:
    first = InstanceStore(db, tmp_path / "store", 0, journal_after=0)
    study = new_study(30)
    for each in study:
        first.receive(incoming(each))
        journal = first._journal
        assert journal
        wait_for(lambda: len(journal._free) + bool(journal._active) == 2, 10, "both segments")  # noqa: B023
    kept = {each.name: each.read_bytes() for each in (tmp_path / "store" / "instances").rglob("*.dcm")}
    abandoned(journal)
    # The first came before there was a journal: its own file was synced.
    every = sorted((tmp_path / "store" / "instances").rglob("*.dcm"))
    lost = [each for each in every if not each.name.startswith(study[0].SOPInstanceUID)][5:25]
    for each in lost[:10]:
        each.unlink()
    for each in lost[10:]:
        each.write_bytes(b"")
    with db.begin() as connection:
        connection.execute(instance.delete().where(instance.c.sop_instance_uid == study[20].SOPInstanceUID))
    second = InstanceStore(db, tmp_path / "store", 0)
    second.receive(incoming(new_study(1)[0]))
    second.close()
    there = {each.name: each.read_bytes() for each in (tmp_path / "store" / "instances").rglob("*.dcm")}
    assert {name: there.get(name) for name in kept} == kept
    with db.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(instance)).scalar() == 31
    assert not list((tmp_path / "store" / "journal").glob("*.journal"))


def incoming(dataset: pydicom.Dataset) -> Incoming:
    return Incoming(SOURCE, [part10(dataset)], part10=True)
