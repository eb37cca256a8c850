"""The folder door: whole files are taken, unfinished ones are left, refused ones are put aside with the reason."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydicom.data import get_testdata_file

from caregrid.domain.settings import FolderSettings
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import StoreFull
from caregrid.intake.folder import FolderDoor
from caregrid.store.instances import InstanceStore
from caregrid.store.tables import instance, quarantine

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))


class Bench:
    """A door on a folder in tmp, and what it told."""

    def __init__(
        self, db: sa.Engine, tmp_path: Path, receive: Callable[[Incoming], Receipt] | None = None, settle: float = 0
    ) -> None:
        self.db, self.path = db, tmp_path / "in"
        self.path.mkdir(exist_ok=True)
        self.store = InstanceStore(db, tmp_path / "store", free_bytes_floor=1 << 20)
        self.told: list[tuple[Source, str, str]] = []
        settings = FolderSettings(path=self.path, poll_seconds=0.05, settle_seconds=settle)
        self.door = FolderDoor(settings, receive or self.store.receive, lambda *told: self.told.append(told))

    def put(self, name: str, content: bytes) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def rows(self, table: sa.Table) -> list[dict[str, object]]:
        with self.db.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(table)).mappings()]


@pytest.fixture
def bench(db: sa.Engine, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(db, tmp_path)
    yield made
    made.door.stop()


def wait(true: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False


def test_files_are_taken_from_every_folder_and_removed(bench: Bench) -> None:
    files = [bench.put("a.dcm", CT.read_bytes()), bench.put("deep/er/IM0001", MR.read_bytes())]
    bench.door.start()
    assert wait(lambda: not any(file.exists() for file in files))
    rows = bench.rows(instance)
    assert {(row["protocol"], row["calling_ae"], row["called_ae"]) for row in rows} == {("folder", "FOLDER", "CAREGRID")}
    kept = {bench.store.path(str(row["path"])).read_bytes() for row in rows}
    assert kept == {CT.read_bytes(), MR.read_bytes()}


def test_a_refused_file_is_put_aside_with_its_reason(bench: Bench) -> None:
    bench.put("sub/notes.dcm", b"this is no DICOM")
    good = bench.put("z.dcm", CT.read_bytes())
    assert bench.door.look() == 1
    assert not good.exists()
    aside = bench.path / "refused/sub/notes.dcm"
    assert aside.read_bytes() == b"this is no DICOM"
    assert "not readable DICOM" in aside.with_name("notes.dcm.reason.txt").read_text()
    assert [(what, source.protocol) for source, what, _ in bench.told] == [("file", "folder")]
    assert len(bench.rows(quarantine)) == 1
    bench.put("sub/notes.dcm", b"nor is this")
    bench.door.look()
    assert (bench.path / "refused/sub/notes.dcm.1").read_bytes() == b"nor is this"
    assert bench.door.look() == 0, "what is in refused/ is not looked at again"


def test_an_empty_file_is_refused(bench: Bench) -> None:
    bench.put("empty.dcm", b"")
    bench.door.look()
    assert (bench.path / "refused/empty.dcm").exists()


@pytest.mark.parametrize(
    "name", ["x.part", "x.tmp", "X.TMP", ".hidden", ".folder/x.dcm", "DICOMDIR", "dicomdir", "x.dcm.filepart"]
)
def test_unfinished_and_hidden_files_and_directories_of_media_are_left(bench: Bench, name: str) -> None:
    file = bench.put(name, CT.read_bytes())
    assert bench.door.look() == 0
    assert file.exists()
    assert not bench.rows(instance)


def test_a_file_that_grows_is_not_taken_before_it_settles(db: sa.Engine, tmp_path: Path) -> None:
    bench = Bench(db, tmp_path, settle=0.5)
    content = CT.read_bytes()
    bench.door.start()
    try:
        with (bench.path / "slow.dcm").open("wb", buffering=0) as file:
            for first in range(0, len(content), 8192):
                file.write(content[first : first + 8192])
                time.sleep(0.25)
                assert not bench.rows(instance)
        assert wait(lambda: not (bench.path / "slow.dcm").exists())
        assert len(bench.rows(instance)) == 1
        assert not bench.rows(quarantine)
    finally:
        bench.door.stop()


def test_a_full_store_leaves_the_file_and_it_is_tried_again(
    db: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caregrid.intake.folder._RETRY_SECONDS", 0.1)
    full = threading.Event()
    full.set()

    def receive(incoming: Incoming) -> Receipt:
        if full.is_set():
            raise StoreFull
        return bench.store.receive(incoming)

    bench = Bench(db, tmp_path, receive)
    file = bench.put("a.dcm", CT.read_bytes())
    bench.door.start()
    try:
        time.sleep(0.4)
        assert file.exists()
        assert not bench.told
        full.clear()
        assert wait(lambda: not file.exists())
        assert len(bench.rows(instance)) == 1
    finally:
        bench.door.stop()


def test_links_and_pipes_are_not_followed(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.dcm").write_bytes(CT.read_bytes())
    (bench.path / "link.dcm").symlink_to(outside / "secret.dcm")
    (bench.path / "folder").symlink_to(outside)
    os.mkfifo(bench.path / "pipe.dcm")
    assert bench.door.look() == 0
    assert (outside / "secret.dcm").exists()
    assert not bench.rows(instance)


def test_a_file_changed_while_it_is_taken_is_not_removed(db: sa.Engine, tmp_path: Path) -> None:
    def receive(incoming: Incoming) -> Receipt:
        receipt = bench.store.receive(incoming)
        if MR.read_bytes() != file.read_bytes():
            file.write_bytes(MR.read_bytes())
        return receipt

    bench = Bench(db, tmp_path, receive)
    file = bench.put("a.dcm", CT.read_bytes())
    bench.door.look()
    assert file.read_bytes() == MR.read_bytes(), "the new content was never kept, so it stays"
    bench.door.look()
    assert not file.exists()
    assert len(bench.rows(instance)) == 2


def test_an_unreadable_file_does_not_stop_the_others(db: sa.Engine, tmp_path: Path) -> None:
    def receive(incoming: Incoming) -> Receipt:
        if len(b"".join(incoming.chunks)) == len(CT.read_bytes()):
            raise PermissionError(13, "cannot be read")
        return bench.store.receive(incoming)

    bench = Bench(db, tmp_path, receive)
    bad, good = bench.put("a.dcm", CT.read_bytes()), bench.put("b.dcm", MR.read_bytes())
    assert bench.door.look() == 1
    assert bad.exists()
    assert not good.exists()
