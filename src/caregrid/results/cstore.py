"""Destination: a PACS by DIMSE. C-STORE with the answer to every object read; C-ECHO; C-FIND count; storage commitment."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, Association, build_context, build_role, evt
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from caregrid.domain.settings import Destination, Tls
from caregrid.errors import DeliveryFailed
from caregrid.results._common import Sent

DESTINATION = "cstore"

_MAX_CONTEXTS = 128
_PROCESSING_FAILURE = 0x0110
_UNCONFIRMED = "no answer"


@dataclass(frozen=True)
class _Object:
    """A file to send, with what its file meta says."""

    path: Path
    sop_class_uid: UID
    sop_instance_uid: str
    transfer_syntax_uid: UID

    @property
    def offers(self) -> tuple[tuple[UID, UID], ...]:
        """Presentation contexts that can carry it, best first: as it is, and else in the default syntax (PS3.5 10.1)."""
        own = (self.sop_class_uid, self.transfer_syntax_uid)
        return (own, (self.sop_class_uid, ImplicitVRLittleEndian)) if own[1] == ExplicitVRLittleEndian else (own,)


def send(destination: Destination, paths: Sequence[Path]) -> list[Sent]:
    """C-STORE every file in its own transfer syntax, and say what the receiver answered to each.

    An Explicit VR Little Endian object is put into Implicit VR for a receiver that takes only that; no other is converted.
    0000 and Bxxx are accepted; A7xx, 0110 and no answer are transient; everything else is refused (PS3.4 B.2.3).
    Raises DeliveryFailed when no association could be opened.
    """
    objects = [_described(path) for path in paths]
    sent: list[Sent] = []
    for batch in _batches(objects):
        try:
            sent += _send_batch(destination, batch)
        except DeliveryFailed:
            if not sent:
                raise
            sent += [Sent(item.sop_instance_uid, False, _UNCONFIRMED, transient=True) for item in batch]
    return sent


def _described(path: Path) -> _Object:
    meta = read_file_meta_info(path)
    return _Object(path, UID(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID), UID(meta.TransferSyntaxUID))


def _batches(objects: list[_Object]) -> Iterator[list[_Object]]:
    """Groups that need at most 128 presentation contexts, the most an association can have (PS3.8 9.3.2.2)."""
    batch: list[_Object] = []
    for item in objects:
        if len({offer for one in (*batch, item) for offer in one.offers}) > _MAX_CONTEXTS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _send_batch(destination: Destination, objects: list[_Object]) -> list[Sent]:
    offers = dict.fromkeys(offer for item in objects for offer in item.offers)
    contexts = [build_context(sop_class, syntax) for sop_class, syntax in offers]
    sent = []
    with _association(destination, contexts) as association:
        accepted = {(UID(context.abstract_syntax or ""), context.transfer_syntax[0]) for context in association.accepted_contexts}
        for item in objects:
            sent.append(_send_one(association, item, accepted))
    return sent


def _send_one(association: Association, item: _Object, accepted: set[tuple[UID, UID]]) -> Sent:
    if accepted.isdisjoint(item.offers):
        return Sent(item.sop_instance_uid, False, "no presentation context accepted")
    if not association.is_established:
        return Sent(item.sop_instance_uid, False, _UNCONFIRMED, transient=True)
    try:
        answer = association.send_c_store(dcmread(item.path))
    except (RuntimeError, OSError):  # the peer aborted between our check and the send
        return Sent(item.sop_instance_uid, False, _UNCONFIRMED, transient=True)
    if "Status" not in answer:
        return Sent(item.sop_instance_uid, False, _UNCONFIRMED, transient=True)
    return judge(item.sop_instance_uid, int(answer.Status))


def judge(sop_instance_uid: str, status: int) -> Sent:
    """What a C-STORE status means for the object."""
    text = f"{status:04X}"
    if status == 0x0000 or 0xB000 <= status <= 0xBFFF or status in (0x0001, 0x0107, 0x0116):
        return Sent(sop_instance_uid, True, text)
    transient = 0xA700 <= status <= 0xA7FF or status == _PROCESSING_FAILURE
    return Sent(sop_instance_uid, False, text, transient=transient)


def echo(destination: Destination) -> str:
    """C-ECHO; what the receiver answered, in words. Raises DeliveryFailed when it does not answer."""
    with _association(destination, [build_context(Verification)]) as association:
        answer = association.send_c_echo()
    if "Status" not in answer:
        raise DeliveryFailed(destination=destination.name, reason="no answer to C-ECHO")
    return f"answered C-ECHO with {int(answer.Status):04X}"


def expected_instances(destination: Destination, study_instance_uid: str) -> int | None:
    """How many instances the receiver says the study has (C-FIND, study root); None when it does not say or does not know it."""
    query = Dataset()
    query.QueryRetrieveLevel = "STUDY"
    query.StudyInstanceUID = study_instance_uid
    query.NumberOfStudyRelatedInstances = None
    found: int | None = None
    with _association(destination, [build_context(StudyRootQueryRetrieveInformationModelFind)]) as association:
        for answer, match in association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
            if "Status" not in answer:
                raise DeliveryFailed(destination=destination.name, reason="no answer to C-FIND")
            if answer.Status in (0xFF00, 0xFF01) and match is not None:
                count = match.get("NumberOfStudyRelatedInstances")
                found = int(count) if count not in (None, "") else found
    return found


@dataclass(frozen=True)
class Commitment(Mapping[str, bool]):
    """What the receiver commits to keep: SOP Instance UID → whether it does; empty when no report came in time.

    failed: SOP Instance UID → failure reason in hexadecimal (PS3.3 C.14).
    """

    transaction_uid: str
    answered: bool
    committed: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, sop_instance_uid: str) -> bool:
        if sop_instance_uid in self.committed:
            return True
        if sop_instance_uid in self.failed:
            return False
        raise KeyError(sop_instance_uid)

    def __iter__(self) -> Iterator[str]:
        return iter((*self.committed, *self.failed))

    def __len__(self) -> int:
        return len(self.committed) + len(self.failed)


class _Report:
    """Waits for the N-EVENT-REPORT of one transaction, on whichever association it comes."""

    def __init__(self, transaction_uid: str) -> None:
        self.transaction_uid = transaction_uid
        self.arrived = threading.Event()
        self.information: Dataset | None = None

    def handle(self, event: evt.Event) -> tuple[int, Dataset | None]:
        information = event.event_information
        if str(information.get("TransactionUID", "")) != self.transaction_uid:
            return 0x0115, None
        self.information = information
        self.arrived.set()
        return 0x0000, None


def request_commitment(
    destination: Destination,
    paths: Sequence[Path],
    *,
    listen: tuple[str, int] | None = None,
    wait_seconds: float | None = None,
) -> Commitment:
    """Ask the receiver to commit to keeping the objects (PS3.4 J), and wait for its report.

    listen: address where the receiver opens its own association to report, as most do; None: the report is awaited on
    the requesting association only. Raises DeliveryFailed when the request itself is not taken.
    """
    report = _Report(generate_uid())
    request = _commitment_request(report.transaction_uid, [_described(path) for path in paths])
    wait = destination.timeout_seconds if wait_seconds is None else wait_seconds
    with (
        _listening(destination, report, listen),
        _association(
            destination,
            [build_context(StorageCommitmentPushModel)],
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, report.handle)],
            ext_neg=[build_role(StorageCommitmentPushModel, scu_role=True, scp_role=False)],
        ) as association,
    ):
        answer, _ = association.send_n_action(request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
        if "Status" not in answer or answer.Status != 0x0000:
            said = f"{int(answer.Status):04X}" if "Status" in answer else "no answer"
            raise DeliveryFailed(destination=destination.name, reason=f"storage commitment not taken: {said}")
        report.arrived.wait(wait)
    return _commitment(report)


def _commitment_request(transaction_uid: str, objects: Sequence[_Object]) -> Dataset:
    request = Dataset()
    request.TransactionUID = transaction_uid
    request.ReferencedSOPSequence = []
    for described in objects:
        item = Dataset()
        item.ReferencedSOPClassUID = described.sop_class_uid
        item.ReferencedSOPInstanceUID = described.sop_instance_uid
        request.ReferencedSOPSequence.append(item)
    return request


def _commitment(report: _Report) -> Commitment:
    if report.information is None:
        return Commitment(report.transaction_uid, answered=False)
    committed = tuple(str(item.ReferencedSOPInstanceUID) for item in report.information.get("ReferencedSOPSequence", []))
    failed = {
        str(item.ReferencedSOPInstanceUID): f"{int(item.get('FailureReason', 0)):04X}"
        for item in report.information.get("FailedSOPSequence", [])
    }
    return Commitment(report.transaction_uid, True, committed, failed)


@contextmanager
def _listening(destination: Destination, report: _Report, listen: tuple[str, int] | None) -> Iterator[None]:
    if listen is None:
        yield
        return
    entity = AE(ae_title=destination.calling_ae)
    entity.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
    entity.add_supported_context(Verification)
    server = entity.start_server(
        listen,
        block=False,
        evt_handlers=[(evt.EVT_N_EVENT_REPORT, report.handle)],
        ssl_context=server_context(destination.tls) if destination.tls else None,
    )
    try:
        yield
    finally:
        if server is not None:
            server.shutdown()


@contextmanager
def _association(destination: Destination, contexts: list[PresentationContext], **more: Any) -> Iterator[Association]:
    """An open association; released at the end, aborted on an error. DeliveryFailed when it cannot be opened."""
    entity = AE(ae_title=destination.calling_ae)
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = destination.timeout_seconds
    entity.network_timeout = destination.timeout_seconds
    tls = (client_context(destination.tls), destination.host) if destination.tls else None
    association = entity.associate(
        destination.host,
        destination.port,
        contexts=contexts,
        ae_title=destination.ae_title,
        max_pdu=0,
        tls_args=tls,
        **more,
    )
    if not association.is_established:
        raise DeliveryFailed(destination=destination.name, reason=_why_not(association))
    try:
        yield association
    except BaseException:
        association.abort()
        raise
    finally:
        if association.is_established:
            association.release()


def _why_not(association: Association) -> str:
    if association.is_rejected:
        answer = association.acceptor.primitive
        reason = getattr(answer, "reason_str", "") if answer is not None else ""
        return f"association rejected {reason}".strip()
    if association.is_aborted:
        return "association aborted, or nobody answers at the address"
    return "no presentation context accepted" if association.rejected_contexts else "nobody answers at the address"


def client_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or later, the peer proven by ``ca`` and its host name, ourselves by our certificate (BCP 195)."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    return context


def server_context(tls: Tls) -> ssl.SSLContext:
    """The same for the association the receiver opens to us."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    context.verify_mode = ssl.CERT_REQUIRED if tls.ca else ssl.CERT_NONE
    return context
