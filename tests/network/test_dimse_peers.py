"""The DIMSE door and the store behind it, with real senders: dcmtk, pynetdicom, and every real file there is."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import data_store
import pydicom
import pydicom.data
import pytest
import sqlalchemy as sa
from pydicom.data import get_testdata_file
from pydicom.errors import InvalidDicomError
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.pdu_primitives import UserIdentityNegotiation

from caregrid.domain.settings import AllowedSender, DimseSettings, Tls
from caregrid.domain.study import Source
from caregrid.intake.dimse import DimseDoor
from caregrid.store.database import create_all, open_engine
from caregrid.store.instances import InstanceStore
from caregrid.store.tables import instance, quarantine, study
from tests.support.certificates import Authority
from tests.support.ports import free_port
from tests.support.scanner import new_study
from tests.support.scu import Raw, Scu, agreed, associated, connected, raw

pytestmark = pytest.mark.network

LOCAL = DimseSettings(host="127.0.0.1", port=0, idle_seconds=20, artim_seconds=10)
ROOTS = (Path(pydicom.data.__file__).parent, Path(data_store.__file__).parent)
REAL_FILES = sorted(
    file for root in ROOTS for file in root.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc", ".txt", ".json")
)


@dataclass
class Place:
    """A door with a store and its index behind it."""

    engine: sa.Engine
    store: InstanceStore
    door: DimseDoor
    rejected: list[tuple[Source, str, str]] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.door.port

    def rows(self, table: sa.Table) -> list[dict[str, object]]:
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(table)).mappings()]

    def dataset(self, uid: str) -> pydicom.Dataset:
        (row,) = [row for row in self.rows(instance) if row["sop_instance_uid"] == uid and row["copy"] == 0]
        return pydicom.dcmread(self.store.path(str(row["path"])))


@contextmanager
def place(folder: Path, settings: DimseSettings = LOCAL, floor: int = 0) -> Iterator[Place]:
    engine = open_engine(f"sqlite:///{folder}/site.db")
    create_all(engine)
    store = InstanceStore(engine, folder / "store", floor)
    rejected: list[tuple[Source, str, str]] = []
    door = DimseDoor(settings, store.receive, rejected=lambda *what: rejected.append(what))
    door.start()
    try:
        yield Place(engine, store, door, rejected)
    finally:
        door.stop(1)
        engine.dispose()


def dcmtk(program: str, *arguments: object, nodelay: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of dcmtk's (by full path: pynetdicom installs others of the same name)."""
    path = Path("/usr/bin") / program
    if not path.exists():
        pytest.skip(f"{path} is not installed (apt-get install dcmtk)")
    environment = os.environ | ({"TCP_NODELAY": "1"} if nodelay else {})
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment, check=False)


def files_of(datasets: list[pydicom.Dataset], folder: Path) -> Path:
    folder.mkdir()
    for number, each in enumerate(datasets):
        each.pop("DataSetTrailingPadding", None)  # dcmtk does not send it
        each.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


# dcmtk


def test_echoscu(tmp_path: Path) -> None:
    with place(tmp_path) as here:
        assert dcmtk("echoscu", "-aec", "CAREGRID", "127.0.0.1", here.port).returncode == 0
        refused = dcmtk("echoscu", "-v", "-aec", "SOMEBODY", "127.0.0.1", here.port)
        assert refused.returncode != 0
        assert "Called AE Title Not Recognized" in refused.stdout + refused.stderr
        assert here.rejected[0][1] == "association"
        assert here.rejected[0][0].called_ae == "SOMEBODY"


@pytest.mark.parametrize(
    "options", [(), ("-pdu", "4096"), ("--max-send-pdu", "4096")], ids=lambda options: " ".join(options) or "plain"
)
@pytest.mark.parametrize("nodelay", [True, False], ids=["nodelay", "nagle"])
def test_storescu(options: tuple[str, ...], nodelay: bool, tmp_path: Path) -> None:
    sent = new_study(12)
    folder = files_of(sent, tmp_path / "out")
    with place(tmp_path) as here:
        started = time.monotonic()
        told = dcmtk("storescu", "-aec", "CAREGRID", *options, "+sd", "127.0.0.1", here.port, folder, nodelay=nodelay)
        assert told.returncode == 0, told.stderr
        assert time.monotonic() - started < 20
        for each in sent:
            assert here.dataset(each.SOPInstanceUID) == each
        (row,) = here.rows(study)
        assert (row["number_of_series"], row["number_of_instances"], row["state"]) == (1, 12, "receiving")
        assert (row["calling_ae"], row["called_ae"], row["address"]) == ("STORESCU", "CAREGRID", "127.0.0.1")


def test_storescu_sends_compressed_pictures_as_they_are(tmp_path: Path) -> None:
    names = ("JPEG2000.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "US1_J2KR.dcm")
    paths = [get_testdata_file(name) for name in names]
    with place(tmp_path) as here:
        # One association each: dcmtk proposes one compressed syntax at a time.
        for path, option in zip(paths, ("-xw", "-xr", "-xy", "-xv"), strict=True):
            told = dcmtk("storescu", "-aec", "CAREGRID", "-R", option, "127.0.0.1", here.port, path)
            assert told.returncode == 0, told.stderr
        kept = {str(row["sop_instance_uid"]) for row in here.rows(instance)}
        for path in paths:
            sent = pydicom.dcmread(str(path))
            assert str(sent.SOPInstanceUID) in kept
            stored = here.dataset(sent.SOPInstanceUID)
            assert stored.PixelData == sent.PixelData
            assert stored.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID


def test_storescu_is_told_of_a_mismatch_and_sends_on(tmp_path: Path) -> None:
    folder = files_of(new_study(3), tmp_path / "out")
    broken = pydicom.dcmread(folder / "1.dcm")
    del broken.StudyInstanceUID
    broken.save_as(folder / "1.dcm")
    with place(tmp_path) as here:
        told = dcmtk("storescu", "-v", "-nh", "-aec", "CAREGRID", "+sd", "127.0.0.1", here.port, folder)
        assert "CannotUnderstand" in told.stdout + told.stderr
        assert len(here.rows(instance)) == 2
        assert len(here.rows(quarantine)) == 1


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "hospital")


def test_tls_with_client_certificates(tmp_path: Path, authority: Authority) -> None:
    ours, theirs = authority.issue("127.0.0.1"), authority.issue("scanner.example")
    stranger = Authority(tmp_path, "stranger").issue("elsewhere.example")
    folder = files_of(new_study(3), tmp_path / "out")
    with place(tmp_path, replace(LOCAL, tls=ours)) as here:
        to = ("-aec", "CAREGRID", "127.0.0.1", here.port)
        told = dcmtk("storescu", "+tls", theirs.key, theirs.certificate, "+cf", authority.certificate, "+sd", *to, folder)
        assert told.returncode == 0, told.stderr
        assert len(here.rows(instance)) == 3
        assert dcmtk("echoscu", "+tla", "+cf", authority.certificate, *to).returncode != 0
        assert dcmtk("echoscu", "+tls", stranger.key, stranger.certificate, "+cf", authority.certificate, *to).returncode != 0
        assert dcmtk("echoscu", *to).returncode != 0
        assert {what for _, what, _ in here.rejected} == {"TLS handshake"}
        assert len(here.rejected) == 3


def test_tls_without_client_certificates_beside_a_plain_port(tmp_path: Path, authority: Authority) -> None:
    ours = replace(authority.issue("127.0.0.1"), require_client_certificate=False)
    with place(tmp_path, replace(LOCAL, tls=ours, tls_port=0)) as here:
        assert here.door.tls_port not in (0, here.port)
        assert dcmtk("echoscu", "-aec", "CAREGRID", "127.0.0.1", here.port).returncode == 0
        told = dcmtk("echoscu", "+tla", "+cf", authority.certificate, "-aec", "CAREGRID", "127.0.0.1", here.door.tls_port)
        assert told.returncode == 0, told.stderr
        assert dcmtk("echoscu", "-aec", "CAREGRID", "127.0.0.1", here.door.tls_port).returncode != 0


def test_old_tls_is_refused_and_pynetdicom_gets_in(tmp_path: Path, authority: Authority) -> None:
    ours, theirs = authority.issue("127.0.0.1"), authority.issue("scanner.example")
    (sent,) = new_study(1)
    with place(tmp_path, replace(LOCAL, tls=ours)) as here:
        assert not _over_tls(here, theirs, sent, newest=ssl.TLSVersion.TLSv1_1)
        assert _over_tls(here, theirs, sent)
        assert here.dataset(sent.SOPInstanceUID) == sent


def _over_tls(here: Place, mine: Tls, sent: pydicom.Dataset, newest: ssl.TLSVersion | None = None) -> bool:
    context = ssl.create_default_context(cafile=str(mine.ca))
    context.load_cert_chain(mine.certificate, mine.key)
    if newest:
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, newest
        context.set_ciphers("ALL:@SECLEVEL=0")
    ae = AE("PYNET")
    ae.add_requested_context(sent.SOPClassUID, sent.file_meta.TransferSyntaxUID)
    association = ae.associate("127.0.0.1", here.port, ae_title="CAREGRID", tls_args=(context, "127.0.0.1"))
    if not association.is_established:
        return False
    status = association.send_c_store(sent).Status
    association.release()
    return status == 0


# pynetdicom


def test_pynetdicom_negotiates_sends_and_releases(tmp_path: Path) -> None:
    sent = new_study(4)
    released: list[str] = []
    with place(tmp_path) as here:
        ae = AE("PYNET")
        ae.add_requested_context("1.2.840.10008.1.1")
        ae.add_requested_context(sent[0].SOPClassUID, sent[0].file_meta.TransferSyntaxUID)
        ae.add_requested_context("1.2.840.10008.5.1.4.1.2.2.1")
        identity = UserIdentityNegotiation()
        identity.user_identity_type, identity.primary_field, identity.positive_response_requested = 1, b"someone", True
        roles = [build_role(sent[0].SOPClassUID, scu_role=True, scp_role=True), identity]
        handlers = [(evt.EVT_RELEASED, lambda event: released.append("released"))]
        association = ae.associate("127.0.0.1", here.port, ae_title="CAREGRID", ext_neg=roles, evt_handlers=handlers)
        assert association.is_established
        assert [each.abstract_syntax for each in association.rejected_contexts] == ["1.2.840.10008.5.1.4.1.2.2.1"]
        assert association.acceptor.user_identity is not None
        (context,) = [each for each in association.accepted_contexts if each.abstract_syntax == sent[0].SOPClassUID]
        assert (context.as_scu, context.as_scp) == (True, False)
        assert association.send_c_echo().Status == 0
        assert [association.send_c_store(each).Status for each in sent] == [0] * 4
        assert [association.send_c_store(each).Status for each in sent[:1]] == [0]
        association.release()
        assert association.is_released
        for each in sent:
            assert here.dataset(each.SOPInstanceUID) == each
        assert len(here.rows(instance)) == 4
    assert released == ["released"]


def test_pynetdicom_aborts_and_comes_back(tmp_path: Path) -> None:
    sent = new_study(2)
    with place(tmp_path) as here:
        for each in sent:
            ae = AE("PYNET")
            ae.add_requested_context(each.SOPClassUID, each.file_meta.TransferSyntaxUID)
            association = ae.associate("127.0.0.1", here.port, ae_title="CAREGRID")
            assert association.send_c_store(each).Status == 0
            association.abort()
        assert len(here.rows(instance)) == 2
        assert here.rejected == []


def test_pynetdicom_hears_why_it_is_refused(tmp_path: Path) -> None:
    with place(tmp_path, replace(LOCAL, allow=(AllowedSender("CT1", "127.0.0.1"),))) as here:
        ae = AE("MR1")
        ae.add_requested_context("1.2.840.10008.1.1")
        association = ae.associate("127.0.0.1", here.port, ae_title="CAREGRID")
        assert association.is_rejected
        answer = association.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 3)


# every real file


def _raw_or_none(file: Path) -> Raw | None:
    try:
        return raw(file)
    except (InvalidDicomError, AttributeError, ValueError, KeyError, EOFError, NotImplementedError):
        return None  # no part 10 file: nothing a sender could send


def test_every_real_file_is_kept_to_the_byte_or_refused_by_name(tmp_path: Path) -> None:
    objects = [each for file in REAL_FILES if (each := _raw_or_none(file)) and each.sop_class]
    assert len(objects) > 200
    with place(tmp_path) as here:
        statuses = [_send_alone(here.port, each) for each in objects]
        kept = {(str(row["sop_instance_uid"]), str(row["path"])) for row in here.rows(instance)}
        contents = {here.store.path(path).read_bytes() for _, path in kept}
        refused = here.rows(quarantine)
        assert set(statuses) <= {0x0000, 0xC000, 0xA900, NOT_AGREED}
        assert statuses.count(0) > 200
        for status, each in zip(statuses, objects, strict=True):
            if status == 0:
                assert any(content.endswith(each.content) for content in contents)
        assert {row["error"] for row in refused} <= {"MalformedObject", "SopMismatch"}
        assert all(row["reason"] for row in refused)
        assert len(refused) == len(statuses) - statuses.count(0) - statuses.count(NOT_AGREED)
        for row in refused:
            assert here.store.path(str(row["path"])).stat().st_size == row["size"]


NOT_AGREED = -1


def _send_alone(port: int, each: Raw) -> int:
    with connected(port) as scu:
        kind, answer = scu.associate([(3, each.sop_class, (each.transfer_syntax,))])
        assert kind == 2
        if not agreed(answer):
            return NOT_AGREED
        status = scu.store(each, fragment=100_000)
        scu.release()
    return status


# trouble


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB; needs the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def _big_slices(count: int) -> list[Raw]:
    """512 KB objects, each with a UID of its own."""
    template = raw(Path(str(get_testdata_file("693_UNCI.dcm"))))
    made = []
    for _ in range(count):
        fresh = generate_uid()[: len(template.sop_instance)].ljust(len(template.sop_instance), "1")
        made.append(
            replace(
                template, sop_instance=fresh, content=template.content.replace(template.sop_instance.encode(), fresh.encode())
            )
        )
    return made


@pytest.mark.parametrize("floor", [0, 4 << 20], ids=["to the last byte", "with a floor"])
def test_full_disk(small_disk: Path, floor: int) -> None:
    slices = _big_slices(60)
    with place(small_disk, floor=floor) as here:
        with associated(here.port, [(3, slices[0].sop_class, (slices[0].transfer_syntax,))]) as scu:
            statuses = [scu.store(each) for each in slices]
        told = {each.sop_instance for each, status in zip(slices, statuses, strict=True) if status == 0}
        assert 5 < len(told) < 60
        assert set(statuses) == {0, 0xA700}, "out of resources, and nothing worse"
        rows = here.rows(instance)
        assert {row["sop_instance_uid"] for row in rows} == told
        by_uid = {each.sop_instance: each.content for each in slices}
        for row in rows:
            assert here.store.path(str(row["path"])).read_bytes().endswith(by_uid[str(row["sop_instance_uid"])])
        files = [file for file in (small_disk / "store" / "instances").rglob("*") if file.is_file()]
        assert len(files) == len(rows), "nothing is left of what was refused"
        assert not any((small_disk / "store" / "tmp").iterdir())
        assert here.rows(quarantine) == []
        # It recovers by itself once there is room.
        subprocess.run(["mount", "-o", "remount,size=90m", small_disk], check=True)
        with associated(here.port, [(3, slices[0].sop_class, (slices[0].transfer_syntax,))]) as scu:
            assert [scu.store(each) for each in slices] == [0] * 60
        assert len(here.rows(instance)) == 60


SERVER = """
    import sys
    from pathlib import Path
    from caregrid.domain.settings import DimseSettings
    from caregrid.intake.dimse import serve
    from caregrid.store.database import create_all, open_engine
    from caregrid.store.instances import InstanceStore

    folder, port, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    engine = open_engine(f"sqlite:///{folder}/site.db")
    create_all(engine)
    store = InstanceStore(engine, folder / "store", 0)
    store.sweep()
    serve(DimseSettings(host="127.0.0.1", port=port, processes=processes), store.receive)
"""


@contextmanager
def server(folder: Path, processes: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    started = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SERVER), str(folder), str(port), str(processes)])
    try:
        _wait_until_it_answers(port)
        yield started, port
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            raise


def _wait_until_it_answers(port: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with associated(port) as scu:
                assert scu.echo() == 0
                return
        except (OSError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_several_processes_share_the_port_and_replace_each_other(tmp_path: Path) -> None:
    slices = _big_slices(40)
    context = [(3, slices[0].sop_class, (slices[0].transfer_syntax,))]
    with server(tmp_path, 2) as (started, port):
        first = _children(started.pid)
        assert len(first) == 2
        for each in slices[:20]:
            assert _send_alone(port, each) == 0
        os.kill(first[0], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while len(set(_children(started.pid)) - {first[0]}) < 2:
            assert time.monotonic() < deadline, "the dead process was not replaced"
            time.sleep(0.1)
        _wait_until_it_answers(port)
        with associated(port, context) as scu:
            assert [scu.store(each) for each in slices[20:]] == [0] * 20
        children = _children(started.pid)
    assert started.returncode == 0
    assert not any(map(_alive, children))
    engine = open_engine(f"sqlite:///{tmp_path}/site.db")
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(instance)).scalar() == 40
    engine.dispose()


def test_its_processes_go_when_their_parent_is_killed(tmp_path: Path) -> None:
    with server(tmp_path, 2) as (started, _):
        children = _children(started.pid)
        started.kill()
        started.wait()
        deadline = time.monotonic() + 10
        while any(map(_alive, children)):
            assert time.monotonic() < deadline, "a receiver outlives who watches it"
            time.sleep(0.1)


def _status_or_none(scu: Scu, each: Raw) -> int | None:
    try:
        return scu.store(each)
    except (OSError, AssertionError):
        return None


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_receiving_nothing_acknowledged_is_lost(processes: int, tmp_path: Path) -> None:
    slices = _big_slices(60)
    told: list[Raw] = []
    context = [(3, slices[0].sop_class, (slices[0].transfer_syntax,))]
    with server(tmp_path, processes) as (started, port), associated(port, context) as scu:
        family = [started.pid, *_children(started.pid)]
        for number, each in enumerate(slices):
            if number == 40:
                for pid in family:
                    os.kill(pid, signal.SIGKILL)
            status = _status_or_none(scu, each)
            if status is None:
                break
            assert status == 0
            told.append(each)
    engine = open_engine(f"sqlite:///{tmp_path}/site.db")
    store = InstanceStore(engine, tmp_path / "store", 0)
    store.sweep()
    with engine.connect() as connection:
        rows = {row.sop_instance_uid: row.path for row in connection.execute(sa.select(instance))}
    assert len(told) == 40
    for each in told:
        assert store.path(rows[each.sop_instance]).read_bytes().endswith(each.content)
    assert not any((tmp_path / "store" / "tmp").iterdir())
    engine.dispose()
    shutil.rmtree(tmp_path / "store")
