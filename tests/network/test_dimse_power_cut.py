"""The power goes while objects arrive: what was acknowledged is there afterwards, whole and in the index.

A file system of its own (ext4 on a loop device) is shut down without writing out its log, as a power cut would leave it, and
mounted again. Without the journal's sync, or without ``sweep``, this test fails.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
import sqlalchemy as sa

from caregrid.store.database import open_engine
from caregrid.store.instances import InstanceStore
from caregrid.store.tables import instance, series, study
from tests.support.ports import free_port
from tests.support.scanner import Scanner, new_study
from tests.support.site import wait_for

pytestmark = [pytest.mark.network, pytest.mark.timeout(180)]

EXT4_IOC_SHUTDOWN, WITHOUT_LOG = 0x8004587D, 2

RECEIVER = """
import sys
from pathlib import Path
from caregrid.domain.settings import DimseSettings
from caregrid.intake.dimse import serve
from caregrid.store.database import create_all, open_engine
from caregrid.store.instances import InstanceStore
folder, port, after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
engine = open_engine(f"sqlite:///{folder}/site.db")
create_all(engine)
store = InstanceStore(engine, folder / "store", 0, journal_after=after if after >= 0 else None)
serve(DimseSettings(host="127.0.0.1", port=port), store.receive)
"""


def _run(*command: object) -> None:
    done = subprocess.run([str(each) for each in command], capture_output=True)
    if done.returncode:
        pytest.skip(f"{command[0]} is not possible here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4 of its own; skips without the right to mount one."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a file system")
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(1 << 30)
    _run("mkfs.ext4", "-q", "-F", image)
    _run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], capture_output=True)


def cut_power(disk: Path) -> None:
    """Nothing more reaches the disk, not even the file system's log."""
    handle = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, struct.pack("I", WITHOUT_LOG))
    except OSError:
        pytest.skip("the file system cannot be shut down here")
    finally:
        os.close(handle)


def again(disk: Path) -> None:
    """Unmount what the power cut left, and mount it as the next start would."""
    for _ in range(50):
        if subprocess.run(["umount", disk], capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
    subprocess.run(["mount", "-o", "loop", disk.with_suffix(".img"), disk], check=True)


@pytest.mark.parametrize("journal_after", [2, -1], ids=["journal", "each by itself"])
def test_nothing_acknowledged_is_lost(disk: Path, journal_after: int) -> None:
    port = free_port()
    command = [sys.executable, "-c", RECEIVER, str(disk), str(port), str(journal_after)]
    scanners = [Scanner(port, calling=f"CT{number}") for number in range(3)]
    studies = [[new_study(20) for _ in range(40)] for _ in scanners]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: Scanner(port).send(new_study(1)) == [0], 30, "the receiver")
        senders = [threading.Thread(target=_send, args=each) for each in zip(scanners, studies, strict=True)]
        for sender in senders:
            sender.start()
        wait_for(lambda: sum(len(each.acknowledged) for each in scanners) > 250, 60, "250 objects acknowledged")
        if journal_after > 0:
            assert list((disk / "store" / "journal").glob("*.journal")), "the journal is in use"
        cut_power(disk)
    finally:
        process.kill()
        process.wait()
    for sender in senders:
        sender.join(60)
    again(disk)
    _check(disk, scanners, studies)


def _send(scanner: Scanner, studies: list[list[pydicom.Dataset]]) -> None:
    for each in studies:
        with suppress(RuntimeError, OSError):
            if any(status != 0 for status in scanner.send(each)):
                return


def _check(disk: Path, scanners: list[Scanner], studies: list[list[list[pydicom.Dataset]]]) -> None:
    engine = open_engine(f"sqlite:///{disk}/site.db")
    store = InstanceStore(engine, disk / "store", 0)
    store.sweep()
    with engine.connect() as connection:
        rows = {row.sop_instance_uid: row for row in connection.execute(sa.select(instance))}
        counted = connection.execute(sa.select(sa.func.sum(study.c.number_of_instances))).scalar()
        in_series = connection.execute(sa.select(sa.func.sum(series.c.number_of_instances))).scalar()
    engine.dispose()
    sent = {str(each.SOPInstanceUID): each for group in studies for one in group for each in one}
    promised = set().union(*(scanner.acknowledged for scanner in scanners))
    assert len(promised) > 250
    assert promised <= set(rows), f"{len(promised - set(rows))} of {len(promised)} acknowledged objects are gone"
    for uid, row in rows.items():
        kept = pydicom.dcmread(BytesIO(store.path(row.path).read_bytes()))
        assert uid not in sent or kept == sent[uid]
    assert counted == in_series == len(rows), "what is counted is what is there"
    assert not list((disk / "store" / "tmp").iterdir())
    assert not list((disk / "store" / "journal").glob("*.journal")), "what was put back is put back once"
