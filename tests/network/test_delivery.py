"""Delivery by DIMSE to real receivers: Orthanc, dcmtk's storescp, and pynetdicom answering what a test tells it to."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from caregrid.domain.settings import Destination, Tls
from caregrid.errors import DeliveryFailed
from caregrid.results import cstore, dicom_kos, write_results
from tests.support.certificates import Authority
from tests.support.data import shared
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.results import context, ct_series, findings

pytestmark = pytest.mark.network

SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"
SC, KO = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.59"


def results_on(paths: list[Path], folder: Path) -> list[Path]:
    """SEG, SR, SC and a rejection note on a series, as files."""
    made = [dataset for _, dataset in write_results(context(paths), findings(paths), ("dicom_seg", "dicom_sr", "dicom_sc"))]
    made.append(dicom_kos.withdraw(context(paths), made))
    files = []
    for dataset in made:
        files.append(folder / f"{dataset.SOPInstanceUID}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return results_on(ct_series(tmp_path / "source", slices=4), tmp_path)


def to(port: int, **changes: Any) -> Destination:
    values: dict[str, Any] = {"name": "pacs", "kind": "cstore", "host": "127.0.0.1", "port": port, "ae_title": "PACS"}
    return Destination(**{**values, "timeout_seconds": 10, **changes})


@contextmanager
def receiver(
    answer: Any = 0x0000,
    classes: tuple[str, ...] = (SEG, SR, SC, KO),
    tls: Any = None,
    syntaxes: Any = (ImplicitVRLittleEndian, ExplicitVRLittleEndian),
    **entity: Any,
) -> Iterator[tuple[int, list[Dataset]]]:
    """A pynetdicom SCP. answer: status for every object, or a function of the event. Yields its port and what it got."""
    got: list[Dataset] = []

    def handle(event: evt.Event) -> int:
        got.append(event.dataset)
        return int(answer(event) if callable(answer) else answer)

    server_entity = AE(ae_title="PACS")
    for sop_class in (*classes, Verification):
        server_entity.add_supported_context(sop_class, list(syntaxes))
    for key, value in entity.items():
        setattr(server_entity, key, value)
    port = free_port()
    server = server_entity.start_server(
        ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, handle)], ssl_context=tls
    )
    try:
        yield port, got
    finally:
        server.shutdown()


class TestRoundTrip:
    @pytest.mark.parametrize("folder", ["ct-chest", "mr-ge-16"])
    def test_orthanc_gives_back_the_same_data_set(self, tmp_path: Path, folder: str) -> None:
        source = sorted(path for path in shared(folder).iterdir() if path.is_file() and path.suffix != ".md")
        files = results_on(source, tmp_path)
        with Orthanc(tmp_path) as pacs:
            for path in source:
                pacs.upload(path)
            sent = cstore.send(to(pacs.dicom_port), files)
            assert [(item.accepted, item.status) for item in sent] == [(True, "0000")] * 4
            stored = [dcmread(BytesIO(pacs.dicom(path.stem))) for path in files]
            studies = {item.StudyInstanceUID for item in stored}
        assert stored == [dcmread(path) for path in files]
        assert studies == {dcmread(source[0], stop_before_pixels=True).StudyInstanceUID}

    def test_what_orthanc_gives_back_is_read_by_highdicom_and_dcmtk(self, files: list[Path], tmp_path: Path) -> None:
        with Orthanc(tmp_path) as pacs:
            cstore.send(to(pacs.dicom_port), files)
            seg, sr = (BytesIO(pacs.dicom(path.stem)) for path in files[:2])
        (tmp_path / "back.dcm").write_bytes(sr.getvalue())
        assert hd.seg.segread(seg).number_of_segments == 1
        assert dcmread(sr).ContentTemplateSequence[0].TemplateIdentifier == "1500"
        dsrdump = shutil.which("dsrdump")
        if dsrdump:
            said = subprocess.run([dsrdump, str(tmp_path / "back.dcm")], capture_output=True, text=True, check=True).stdout
            assert "Imaging Measurement Report" in said

    def test_storescp_gets_the_same_bytes(self, files: list[Path], tmp_path: Path) -> None:
        storescp = next((path for path in ("/usr/bin/storescp", "/usr/local/bin/storescp") if Path(path).exists()), None)
        if storescp is None:
            pytest.skip("dcmtk is not on this machine")
        port, target = free_port(), tmp_path / "storescp"
        target.mkdir()
        process = subprocess.Popen(
            [storescp, "+B", "+xa", "-od", str(target), "-aet", "PACS", str(port)],
            env={**os.environ, "TCP_NODELAY": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for_echo(port)
            sent = cstore.send(to(port), files)
            assert all(item.accepted for item in sent)
        finally:
            process.terminate()
            process.wait(10)
        got = {str(item.SOPInstanceUID): item for item in map(dcmread, target.iterdir())}
        assert [got[path.stem] for path in files] == [dcmread(path) for path in files]


def _wait_for_echo(port: int) -> None:
    end = time.monotonic() + 15
    while time.monotonic() < end:
        try:
            cstore.echo(to(port))
            return
        except DeliveryFailed:
            time.sleep(0.1)
    raise AssertionError("the receiver did not start")


class TestAnswers:
    @pytest.mark.parametrize(
        ("status", "accepted", "transient"),
        [
            (0x0000, True, False),
            (0xB000, True, False),
            (0xB007, True, False),
            (0x0107, True, False),
            (0xA700, False, True),
            (0xA701, False, True),
            (0x0110, False, True),
            (0xA900, False, False),
            (0xC000, False, False),
            (0x0122, False, False),
            (0x0124, False, False),
        ],
    )
    def test_every_status_is_read(self, files: list[Path], status: int, accepted: bool, transient: bool) -> None:
        with receiver(status) as (port, _):
            (sent,) = cstore.send(to(port), files[:1])
        assert (sent.sop_instance_uid, sent.accepted, sent.status, sent.transient) == (
            files[0].stem,
            accepted,
            f"{status:04X}",
            transient,
        )

    def test_one_refusal_does_not_touch_the_others(self, files: list[Path]) -> None:
        with receiver(lambda event: 0xC000 if event.dataset.Modality == "SR" else 0x0000) as (port, got):
            sent = cstore.send(to(port), files)
        assert [item.status for item in sent] == ["0000", "C000", "0000", "0000"]
        assert len(got) == 4

    def test_a_class_the_receiver_does_not_take_is_refused_alone(self, files: list[Path]) -> None:
        with receiver(classes=(SR, SC)) as (port, got):
            sent = cstore.send(to(port), files)
        assert [item.accepted for item in sent] == [False, True, True, False]
        assert sent[0].status == "no presentation context accepted"
        assert not sent[0].transient
        assert len(got) == 2

    def test_a_receiver_that_knows_only_the_default_syntax(self, files: list[Path]) -> None:
        with receiver(syntaxes=[ImplicitVRLittleEndian]) as (port, got):
            sent = cstore.send(to(port), files)
        assert all(item.accepted for item in sent)
        for read, path in zip(got, files, strict=True):
            written = dcmread(path)
            # Implicit VR does not say whether pixels are OB or OW.
            pixels = [item.PixelData for item in (read, written) if "PixelData" in item]
            assert pixels[:1] == pixels[1:]
            for item in (read, written):
                item.pop("PixelData", None)
            assert read == written

    def test_the_objects_own_syntax_is_preferred(self, files: list[Path]) -> None:
        used: list[str] = []
        with receiver(lambda event: used.append(event.context.transfer_syntax) or 0) as (port, _):
            cstore.send(to(port), files)
        assert used == [ExplicitVRLittleEndian] * 4

    def test_an_association_lost_half_way_keeps_what_was_answered(self, files: list[Path]) -> None:
        def answer(event: evt.Event) -> int:
            if event.dataset.Modality == "SR":
                event.assoc.abort()
            return 0x0000

        with receiver(answer) as (port, _):
            sent = cstore.send(to(port, timeout_seconds=3), files)
        assert [item.accepted for item in sent] == [True, False, False, False]
        assert all(item.transient for item in sent[1:])

    def test_a_receiver_that_never_answers_is_given_up(self, files: list[Path]) -> None:
        release = threading.Event()

        def answer(event: evt.Event) -> int:
            release.wait(20)
            return 0x0000

        with receiver(answer) as (port, _):
            began = time.monotonic()
            sent = cstore.send(to(port, timeout_seconds=1), files[:1])
            took = time.monotonic() - began
            release.set()
        assert (sent[0].accepted, sent[0].transient) == (False, True)
        assert took < 10

    def test_nobody_there_is_a_failure_of_the_whole(self, files: list[Path]) -> None:
        with pytest.raises(DeliveryFailed, match="nobody answers"):
            cstore.send(to(free_port()), files)
        with pytest.raises(DeliveryFailed):
            cstore.echo(to(free_port()))

    def test_a_rejected_association_is_a_failure_of_the_whole(self, files: list[Path]) -> None:
        with receiver(require_called_aet=True) as (port, _), pytest.raises(DeliveryFailed, match="rejected"):
            cstore.send(to(port, ae_title="WRONG"), files)

    def test_the_receiver_down_and_back(self, files: list[Path], tmp_path: Path) -> None:
        pacs = Orthanc(tmp_path)
        with pacs:
            assert all(item.accepted for item in cstore.send(to(pacs.dicom_port), files[:2]))
        with pytest.raises(DeliveryFailed):
            cstore.send(to(pacs.dicom_port), files)
        with pacs:
            assert all(item.accepted for item in cstore.send(to(pacs.dicom_port), files))
            assert pacs.sop_instance_uids() == {path.stem for path in files}


class TestTls:
    def test_both_sides_prove_themselves(self, files: list[Path], tmp_path: Path) -> None:
        authority = Authority(tmp_path, "hospital")
        server, client = authority.issue("127.0.0.1"), authority.issue("caregrid")
        with receiver(tls=cstore.server_context(server)) as (port, got):
            sent = cstore.send(to(port, tls=client), files)
            assert cstore.echo(to(port, tls=client)) == "answered C-ECHO with 0000"
        assert all(item.accepted for item in sent)
        assert len(got) == 4

    def test_a_server_of_another_authority_is_not_trusted(self, files: list[Path], tmp_path: Path) -> None:
        ours, theirs = Authority(tmp_path, "hospital"), Authority(tmp_path, "stranger")
        with receiver(tls=cstore.server_context(theirs.issue("127.0.0.1"))) as (port, got), pytest.raises(DeliveryFailed):
            cstore.send(to(port, tls=ours.issue("caregrid")), files)
        assert got == []

    def test_a_server_of_another_name_is_not_trusted(self, files: list[Path], tmp_path: Path) -> None:
        authority = Authority(tmp_path, "hospital")
        other, client = cstore.server_context(authority.issue("other.example")), authority.issue("caregrid")
        with receiver(tls=other) as (port, got), pytest.raises(DeliveryFailed):
            cstore.send(to(port, tls=client), files)
        assert got == []

    def test_a_client_without_a_known_certificate_is_turned_away(self, files: list[Path], tmp_path: Path) -> None:
        ours, theirs = Authority(tmp_path, "hospital"), Authority(tmp_path, "stranger")
        stranger = theirs.issue("caregrid")
        mixed = Tls(stranger.certificate, stranger.key, ours.certificate)
        with receiver(tls=cstore.server_context(ours.issue("127.0.0.1"))) as (port, got), pytest.raises(DeliveryFailed):
            cstore.send(to(port, tls=mixed, timeout_seconds=3), files)
        assert got == []


class TestQueries:
    def test_how_many_instances_the_receiver_has(self, tmp_path: Path) -> None:
        source = ct_series(tmp_path / "source", slices=5)
        study = dcmread(source[0]).StudyInstanceUID
        with Orthanc(tmp_path) as pacs:
            assert cstore.expected_instances(to(pacs.dicom_port), study) is None
            for path in source:
                pacs.upload(path)
            assert cstore.expected_instances(to(pacs.dicom_port), study) == 5
            assert cstore.expected_instances(to(pacs.dicom_port), "1.2.3") is None


class TestCommitment:
    def test_orthanc_commits_to_what_it_has_and_not_to_the_rest(self, files: list[Path], tmp_path: Path) -> None:
        port = free_port()
        with Orthanc(tmp_path, modalities={"caregrid": ("CAREGRID", "127.0.0.1", port)}) as pacs:
            cstore.send(to(pacs.dicom_port), files[:3])
            said = cstore.request_commitment(to(pacs.dicom_port), files, listen=("127.0.0.1", port))
        assert said.answered
        assert set(said.committed) == {path.stem for path in files[:3]}
        assert dict(said.failed) == {files[3].stem: "0112"}
        assert dict(said) == {path.stem: path in files[:3] for path in files}

    def test_a_report_on_the_same_association(self, files: list[Path]) -> None:
        with commitment_server(same_association=True) as port:
            said = cstore.request_commitment(to(port), files)
        assert said.answered
        assert set(said) == {path.stem for path in files}

    def test_a_report_that_never_comes_commits_to_nothing(self, files: list[Path]) -> None:
        with commitment_server(same_association=False) as port:
            said = cstore.request_commitment(to(port), files, wait_seconds=0.5)
        assert (said.answered, len(said)) == (False, 0)

    def test_a_receiver_without_storage_commitment(self, files: list[Path]) -> None:
        with receiver() as (port, _), pytest.raises(DeliveryFailed):
            cstore.request_commitment(to(port), files)


@contextmanager
def commitment_server(same_association: bool) -> Iterator[int]:
    """An SCP that takes every request, and reports all committed on the same association or never."""

    def report(event: evt.Event, request: Dataset) -> None:
        event.assoc.send_n_event_report(request, 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1")

    def handle(event: evt.Event) -> tuple[int, None]:
        if same_association:
            threading.Timer(0.2, report, (event, event.action_information)).start()
        return 0x0000, None

    entity = AE(ae_title="PACS")
    entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    port = free_port()
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_ACTION, handle)])
    try:
        yield port
    finally:
        server.shutdown()


def test_more_kinds_than_an_association_can_hold_are_split(tmp_path: Path) -> None:
    from caregrid.results.cstore import _batches, _Object

    objects = [_Object(tmp_path, f"1.2.{number % 150}", str(number), ExplicitVRLittleEndian) for number in range(300)]  # type: ignore[arg-type]
    batches = list(_batches(objects))
    assert [item for batch in batches for item in batch] == objects
    assert all(len({offer for item in batch for offer in item.offers}) <= 128 for batch in batches)
    assert len(batches) > 1
