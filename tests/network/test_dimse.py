"""The DIMSE door with real senders: dcmtk, pynetdicom, and bare sockets that do what no sender should."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pynetdicom import AE, build_role
from pynetdicom.pdu_primitives import (
    AsynchronousOperationsWindowNegotiation,
    SOPClassCommonExtendedNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.sop_class import CTImageStorage, PatientRootQueryRetrieveInformationModelFind, Verification

from caregrid.domain.settings import AllowedSender
from caregrid.errors import MalformedObject
from caregrid.intake import _dimse_wire
from caregrid.intake.dimse import DimseDoor
from tests.support.certificates import Authority
from tests.support.doors import (
    LOCAL,
    Receiver,
    association_request,
    connected,
    data_value,
    dimse,
    pdu,
    read_pdu,
    store_request,
    threads_of_the_door,
    uid_of,
)
from tests.support.ports import free_port
from tests.support.scanner import Scanner, new_study
from tests.support.site import wait_for

pytestmark = pytest.mark.network


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def door(receiver: Receiver) -> Iterator[DimseDoor]:
    with dimse(receiver) as opened:
        yield opened


def dcmtk(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([f"/usr/bin/{program}", *map(str, arguments)], capture_output=True, text=True, timeout=60)


def data_set_of(path: Path | str) -> bytes:
    """A file's data set, byte for byte: what comes after the file meta information."""
    content = Path(path).read_bytes()
    meta = pydicom.filereader.read_file_meta_info(path)
    return content[132 + 12 + meta.FileMetaInformationGroupLength :]


# senders ----------------------------------------------------------------------------------------------------------------


def test_echoscu_and_storescu(door: DimseDoor, receiver: Receiver) -> None:
    assert dcmtk("echoscu", "-aec", "CAREGRID", "127.0.0.1", door.port).returncode == 0
    file = get_testdata_file("CT_small.dcm")
    sent = dcmtk("storescu", "-aet", "CT1", "-aec", "CAREGRID", "127.0.0.1", door.port, file)
    assert sent.returncode == 0, sent.stderr
    (kept,) = receiver.kept
    assert (kept.source.protocol, kept.source.calling_ae, kept.source.called_ae) == ("dimse", "CT1", "CAREGRID")
    assert kept.source.address == "127.0.0.1"
    assert uid_of(kept) == pydicom.dcmread(file).SOPInstanceUID


@pytest.mark.parametrize("size", [4096, 131072])
def test_small_and_large_pdus(door: DimseDoor, receiver: Receiver, size: int) -> None:
    file = get_testdata_file("693_UNCR.dcm")
    sent = dcmtk("storescu", "-pdu", size, "--max-send-pdu", size, "-aec", "CAREGRID", "127.0.0.1", door.port, file)
    assert sent.returncode == 0, sent.stderr
    (kept,) = receiver.kept
    assert pydicom.dcmread(file).PixelData in b"".join(kept.chunks)


def test_pynetdicom_echo_store_and_many_objects_on_one_association(door: DimseDoor, receiver: Receiver) -> None:
    study = new_study(20)
    scanner = Scanner(door.port)
    assert scanner.send(study) == [0] * 20
    assert [uid_of(each) for each in receiver.kept] == [each.SOPInstanceUID for each in study]
    ae = AE()
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", door.port, ae_title="CAREGRID")
    assert association.send_c_echo().Status == 0
    association.release()
    wait_for(lambda: threads_of_the_door() == 0, 5, "the associations' threads gone")


def test_an_object_larger_than_memory_allows_goes_by_file(
    door: DimseDoor, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dimse_wire, "IN_MEMORY", 1 << 20)
    (large,) = new_study(1)
    large.Rows = large.Columns = 1500
    large.PixelData = os.urandom(2 * 1500 * 1500)
    (small,) = new_study(1)
    assert Scanner(door.port).send([large, small, large]) == [0, 0, 0]
    assert [large.PixelData in b"".join(each.chunks) for each in receiver.kept] == [True, False, True]


def test_an_object_larger_than_the_limit_is_refused_and_the_association_lives_on(receiver: Receiver) -> None:
    (large,), (small,) = new_study(1), new_study(1)
    large.Rows = large.Columns = 500
    large.PixelData = bytes(500_000)
    with dimse(receiver, replace(LOCAL, max_object_bytes=100_000)) as door:
        assert Scanner(door.port).send([large, small]) == [0xC000, 0]
    assert [uid_of(each) for each in receiver.kept] == [small.SOPInstanceUID]
    assert receiver.refused[0][1] == "object"


# who is turned away, and how --------------------------------------------------------------------------------------------


def verdict(port: int, **request: object) -> tuple[int, bytes]:
    with connected(port, association_request(**request)) as peer:  # type: ignore[arg-type]
        return read_pdu(peer)


def test_reject_codes_and_what_an_operator_sees(receiver: Receiver) -> None:
    settings = replace(LOCAL, allow=(AllowedSender("CT*", "127.0.0.0/8"), AllowedSender("MR1", "10.0.0.1")))
    with dimse(receiver, settings) as door:
        assert verdict(door.port, calling="CT7")[0] == 2
        assert verdict(door.port, called="ELSEWHERE", calling="CT7") == (3, bytes([0, 1, 1, 7]))
        assert verdict(door.port, calling="MR1") == (3, bytes([0, 1, 1, 3]))
        assert verdict(door.port, calling="CT7", version=2) == (3, bytes([0, 1, 2, 2]))
        assert verdict(door.port, calling="CT7", application="1.2.3") == (3, bytes([0, 1, 1, 2]))
    seen = [(source.calling_ae, source.address, what) for source, what, _ in receiver.refused]
    assert seen == [(calling, "127.0.0.1", "association") for calling in ("CT7", "MR1", "CT7", "CT7")]
    assert "allow-list" in receiver.refused[1][2]


def test_pynetdicom_hears_why(receiver: Receiver) -> None:
    with dimse(receiver) as door:
        ae = AE("CT1")
        ae.add_requested_context(Verification)
        association = ae.associate("127.0.0.1", door.port, ae_title="WRONG")
        assert association.is_rejected
        answer = association.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 7)


def test_an_operators_addition_counts_within_a_second_and_is_not_asked_for_every_time(receiver: Receiver) -> None:
    asked: list[tuple[str, str]] = []
    answers = {"now": False}

    def allowed(calling: str, address: str) -> bool:
        asked.append((calling, address))
        return answers["now"]

    settings = replace(LOCAL, allow=(AllowedSender("CT1", "10.0.0.0/8"),))
    with dimse(receiver, settings, allowed=allowed) as door:
        assert [verdict(door.port, calling="NEW")[0] for _ in range(5)] == [3] * 5
        assert asked == [("NEW", "127.0.0.1")]
        answers["now"] = True
        wait_for(lambda: verdict(door.port, calling="NEW")[0] == 2, 2, "the sender allowed")


def test_too_many_associations_is_transient_and_passes(receiver: Receiver) -> None:
    with dimse(receiver, replace(LOCAL, max_associations=1)) as door:
        with connected(door.port, association_request()) as first:
            assert read_pdu(first)[0] == 2
            assert verdict(door.port) == (3, bytes([0, 2, 3, 2]))
        wait_for(lambda: verdict(door.port)[0] == 2, 5, "room again")


def test_without_an_allow_list_this_machine_may_send(receiver: Receiver) -> None:
    with dimse(receiver) as door:
        assert door.may_send("ANY", "127.0.0.1")
        assert not door.may_send("ANY", "192.0.2.7")


# time -------------------------------------------------------------------------------------------------------------------


def test_silence_ends_an_association_with_an_abort(receiver: Receiver) -> None:
    with dimse(receiver, replace(LOCAL, idle_seconds=0.5)) as door, connected(door.port, association_request()) as peer:
        assert read_pdu(peer)[0] == 2
        began = time.monotonic()
        assert read_pdu(peer) == (7, bytes([0, 0, 0, 0]))
        assert 0.3 < time.monotonic() - began < 3


def drips_through(peer: socket.socket, content: bytes, seconds: float) -> bool:
    """Send a byte every 0.1 s; False when the other side closes before ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    try:
        for place in range(len(content)):
            peer.sendall(content[place : place + 1])
            time.sleep(0.1)
            if time.monotonic() > deadline:
                return True
    except OSError:
        return False
    return True


def test_a_request_that_drips_in_runs_out_of_time(receiver: Receiver) -> None:
    with dimse(receiver, replace(LOCAL, artim_seconds=0.6)) as door, connected(door.port) as peer:
        began = time.monotonic()
        assert not drips_through(peer, association_request(), 8)
        assert time.monotonic() - began < 6
    wait_for(lambda: threads_of_the_door() == 0, 5, "its thread gone")


def test_stopping_lets_an_object_under_way_arrive(receiver: Receiver) -> None:
    held = threading.Event()

    def slow(incoming: object) -> None:
        held.set()
        time.sleep(0.7)

    receiver.failing = slow  # type: ignore[assignment]
    answers: list[int] = []
    with dimse(receiver) as door:
        sending = threading.Thread(target=lambda: answers.extend(Scanner(door.port).send(new_study(1))))
        sending.start()
        assert held.wait(5)
        door.stop(5)
    sending.join(10)
    assert answers == [0]
    assert len(receiver.kept) == 1


# TLS --------------------------------------------------------------------------------------------------------------------


def test_tls_with_and_without_a_client_certificate(receiver: Receiver, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "hospital"), Authority(tmp_path, "stranger")
    file = get_testdata_file("CT_small.dcm")
    with dimse(receiver, replace(LOCAL, tls=authority.issue("127.0.0.1"), tls_port=0)) as door:

        def send(*options: object) -> int:
            return dcmtk("storescu", *options, "-aec", "CAREGRID", "127.0.0.1", door.tls_port, file).returncode

        mine, theirs = authority.issue("ct1.hospital"), stranger.issue("thief")
        assert send("+tls", mine.key, mine.certificate, "+cf", mine.ca) == 0
        assert send("+tla", "+cf", mine.ca) != 0
        assert send("+tls", theirs.key, theirs.certificate, "+cf", mine.ca) != 0
        assert send() != 0
        assert dcmtk("echoscu", "-aec", "CAREGRID", "127.0.0.1", door.port).returncode == 0
    assert len(receiver.kept) == 1
    assert [what for _, what, _ in receiver.refused].count("TLS handshake") >= 2


def test_tls_without_client_certificates_asked_for(receiver: Receiver, tmp_path: Path) -> None:
    issued = Authority(tmp_path, "hospital").issue("127.0.0.1")
    with dimse(receiver, replace(LOCAL, tls=replace(issued, require_client_certificate=False))) as door:
        sent = dcmtk("echoscu", "+tla", "+cf", issued.ca, "-aec", "CAREGRID", "127.0.0.1", door.port)
        assert sent.returncode == 0, sent.stderr


# what is not as it should be ---------------------------------------------------------------------------------------------


def test_a_malformed_object_gets_its_status_and_the_association_lives_on(receiver: Receiver) -> None:
    study = new_study(3)
    bad = study[1].SOPInstanceUID
    receiver.failing = lambda incoming: MalformedObject(reason="StudyInstanceUID is missing") if uid_of(incoming) == bad else None
    with dimse(receiver) as door:
        scanner = Scanner(door.port)
        assert scanner.send(study) == [0, 0xC000, 0]
    assert len(receiver.kept) == 2


def test_a_failure_of_ours_is_never_a_success(receiver: Receiver) -> None:
    receiver.failing = lambda incoming: RuntimeError("the database is gone")
    with dimse(receiver) as door:
        assert Scanner(door.port).send(new_study(2)) == [0x0110, 0x0110]


def test_a_connection_that_breaks_in_the_middle_of_an_object_leaves_nothing(door: DimseDoor, receiver: Receiver) -> None:
    (whole,) = new_study(1)
    with connected(door.port, association_request()) as peer:
        assert read_pdu(peer)[0] == 2
        peer.sendall(store_request("1.2.840.10008.5.1.4.1.1.2", "1.2.3") + data_value(bytes(5000), 0))
        peer.sendall(data_value(bytes(5000), 2)[:-1])
    assert Scanner(door.port).send([whole]) == [0]
    assert len(receiver.kept) == 1
    wait_for(lambda: threads_of_the_door() == 0, 5, "their threads gone")


def test_what_is_no_dicom_is_aborted_with_the_right_reason(door: DimseDoor, receiver: Receiver) -> None:
    with connected(door.port, b"GET / HTTP/1.1\r\n\r\n") as peer:
        assert read_pdu(peer) == (7, bytes([0, 0, 2, 1]))
    with connected(door.port, pdu(5, bytes(4))) as peer:
        assert read_pdu(peer) == (7, bytes([0, 0, 2, 2]))
    with connected(door.port, association_request(), pdu(4, b"\0\0\0\x04\x63\x03ab")) as peer:
        assert read_pdu(peer)[0] == 2
        assert read_pdu(peer) == (7, bytes([0, 0, 2, 5]))
    with connected(door.port, association_request(), b"\x04\0\xff\xff\xff\xff") as peer:
        assert read_pdu(peer)[0] == 2
        assert read_pdu(peer) == (7, bytes([0, 0, 2, 6]))
    assert [what for _, what, _ in receiver.refused] == ["association aborted"] * 4


# negotiation, pynetdicom as judge ---------------------------------------------------------------------------------------


def test_contexts_are_answered_one_by_one(door: DimseDoor) -> None:
    ae = AE()
    ae.add_requested_context(CTImageStorage, ["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.1"])
    ae.add_requested_context(PatientRootQueryRetrieveInformationModelFind)
    ae.add_requested_context("1.3.12.2.1107.5.9.1")  # a private storage class (Siemens CSA)
    association = ae.associate("127.0.0.1", door.port, ae_title="CAREGRID")
    accepted = {context.abstract_syntax: context.transfer_syntax[0] for context in association.accepted_contexts}
    assert accepted[CTImageStorage] == "1.2.840.10008.1.2.4.90", "objects are kept as they come: the first offer is taken"
    assert "1.3.12.2.1107.5.9.1" in accepted
    (refused,) = association.rejected_contexts
    assert (refused.abstract_syntax, refused.result) == (PatientRootQueryRetrieveInformationModelFind, 3)
    association.release()
    assert association.is_released


def test_user_identity_roles_async_window_and_extended_negotiation(door: DimseDoor) -> None:
    identity = UserIdentityNegotiation()
    identity.user_identity_type, identity.primary_field, identity.secondary_field = 2, b"scanner", b"secret"
    identity.positive_response_requested = True
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked = window.maximum_number_operations_performed = 8
    extended = SOPClassExtendedNegotiation()
    extended.sop_class_uid, extended.service_class_application_information = CTImageStorage, b"\x02\x00\x00\x00\x00\x00"
    common = SOPClassCommonExtendedNegotiation()
    common.sop_class_uid, common.service_class_uid = CTImageStorage, "1.2.840.10008.4.2"
    role = build_role(CTImageStorage, scu_role=True, scp_role=True)
    ae = AE()
    ae.add_requested_context(CTImageStorage)
    association = ae.associate("127.0.0.1", door.port, ae_title="CAREGRID", ext_neg=[identity, window, extended, common, role])
    assert association.is_established
    (context,) = association.accepted_contexts
    assert (context.as_scu, context.as_scp) == (True, False)
    assert association.acceptor.asynchronous_operations == (1, 1)
    assert association.acceptor.user_identity is not None
    (ct,) = new_study(1)
    assert association.send_c_store(ct).Status == 0
    association.release()


def test_release_and_abort_free_the_association(door: DimseDoor) -> None:
    ae = AE()
    ae.add_requested_context(Verification)
    released, aborted = (ae.associate("127.0.0.1", door.port, ae_title="CAREGRID") for _ in range(2))
    released.release()
    aborted.abort()
    assert released.is_released
    assert aborted.is_aborted
    wait_for(lambda: threads_of_the_door() == 0, 5, "their threads gone")


# several processes ------------------------------------------------------------------------------------------------------


def test_several_processes_share_the_port_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    receiver = Receiver()

    def keep(incoming: object) -> None:
        (made / f"{os.getpid()}-{uid_of(incoming)}").touch()  # type: ignore[arg-type]

    receiver.failing = keep  # type: ignore[assignment]
    with dimse(receiver, replace(LOCAL, processes=2, port=free_port())) as door:
        for number in range(12):
            assert Scanner(door.port, calling=f"CT{number}").send(new_study(2)) == [0, 0]
        pids = {int(file.name.partition("-")[0]) for file in made.iterdir()}
        assert os.getpid() not in pids
        os.kill(min(pids), signal.SIGKILL)
        study = new_study(3)
        Scanner(door.port).insist(study, 20)
        wait_for(lambda: len(door._crew._pids) == 2 and min(pids) not in door._crew._pids, 5, "another process")
        left = set(door._crew._pids)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
    assert len({file.name.partition("-")[2] for file in made.iterdir()}) == 27
