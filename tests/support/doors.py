"""A DIMSE door and a sender for each plug of the intake slot: the slot's promise is tested the same way on all of them."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.uid import generate_uid
from pynetdicom import AE

from caregrid.domain.settings import DimseSettings, FolderSettings, WebSettings
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.intake.dimse import DimseDoor
from caregrid.plugs import load
from caregrid.store.database import create_all, open_engine
from caregrid.store.instances import InstanceStore
from tests.support.scu import exactly

LOCAL = DimseSettings(host="127.0.0.1", port=0, idle_seconds=5, artim_seconds=5)


def item(kind: int, value: bytes) -> bytes:
    """An item of the upper layer."""
    return struct.pack(">BBH", kind, 0, len(value)) + value


def pdu(kind: int, body: bytes) -> bytes:
    """A protocol data unit."""
    return struct.pack(">BBI", kind, 0, len(body)) + body


@dataclass
class Receiver:
    """What a door hands over: every object's bytes, copied as they come. ``failing``: raise this instead of keeping it."""

    kept: list[Incoming] = field(default_factory=list)
    refused: list[tuple[Source, str, str]] = field(default_factory=list)
    failing: Callable[[Incoming], Exception | None] = lambda incoming: None

    def receive(self, incoming: Incoming) -> Receipt:
        """As ``InstanceStore.receive``."""
        error = self.failing(incoming)
        if error:
            raise error
        content = b"".join(incoming.chunks)
        self.kept.append(replace(incoming, chunks=[content]))
        header = pydicom.dcmread(BytesIO(content), force=True) if incoming.part10 else incoming
        uid = getattr(header, "SOPInstanceUID", "") or incoming.sop_instance_uid
        return Receipt("stored", incoming.sop_class_uid, str(uid), "1.2.3")

    def rejected(self, source: Source, what: str, reason: str) -> None:
        """As the site's."""
        self.refused.append((source, what, reason))


@contextmanager
def dimse(receiver: Receiver, settings: DimseSettings = LOCAL, **more: object) -> Iterator[DimseDoor]:
    """A door that is open inside the block."""
    door = DimseDoor(settings, receiver.receive, rejected=receiver.rejected, **more)  # type: ignore[arg-type]
    door.start()
    try:
        yield door
    finally:
        door.stop(1)


def threads_of_the_door() -> int:
    """Threads that serve associations now."""
    return sum(thread.name == "association" for thread in threading.enumerate())


def association_request(
    called: str = "CAREGRID",
    calling: str = "SCU",
    contexts: Sequence[tuple[int, str]] = ((1, "1.2.840.10008.5.1.4.1.1.2"),),
    version: int = 1,
    application: str = "1.2.840.10008.3.1.1.1",
) -> bytes:
    """An A-ASSOCIATE-RQ with implicit VR little endian contexts, byte by byte."""
    body = struct.pack(">HH16s16s32s", version, 0, called.encode().ljust(16), calling.encode().ljust(16), b"")
    body += item(0x10, application.encode())
    for identifier, abstract in contexts:
        value = bytes([identifier, 0, 0, 0]) + item(0x30, abstract.encode()) + item(0x40, b"1.2.840.10008.1.2")
        body += item(0x20, value)
    body += item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4"))
    return pdu(1, body)


def store_request(sop_class: str, sop_instance: str, context: int = 1) -> bytes:
    """A C-STORE-RQ whose data set is to follow, as a P-DATA-TF."""
    values = ((0x0002, sop_class.encode()), (0x0100, b"\1\0"), (0x0110, b"\7\0"), (0x0700, b"\0\0"), (0x0800, b"\1\0"))
    padded = [(tag, value + b"\0" * (len(value) % 2)) for tag, value in (*values, (0x1000, sop_instance.encode()))]
    body = b"".join(struct.pack("<HHI", 0, tag, len(value)) + value for tag, value in padded)
    return data_value(struct.pack("<HHII", 0, 0, 4, len(body)) + body, 3, context)


def data_value(data: bytes, flags: int, context: int = 1) -> bytes:
    """A P-DATA-TF with one presentation data value. flags: 1 command, 2 last."""
    return pdu(4, struct.pack(">IBB", len(data) + 2, context, flags) + data)


@contextmanager
def connected(port: int, *first: bytes) -> Iterator[socket.socket]:
    """A bare connection, ``first`` sent on it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        for each in first:
            peer.sendall(each)
        yield peer


def read_pdu(peer: socket.socket) -> tuple[int, bytes]:
    """(type, body) of the next PDU; (0, b"") when the peer closed."""
    head = exactly(peer, 6)
    if len(head) < 6:
        return 0, b""
    return head[0], exactly(peer, struct.unpack(">I", head[2:])[0])


# a sender for each plug: (receiver, datasets) → what the sender was told about each, True for "kept" -------------------------


def send_by_dimse(receiver: Receiver, datasets: Sequence[pydicom.Dataset], folder: Path) -> list[bool]:
    """C-STORE; True for status 0000."""
    with dimse(receiver) as door:
        ae = AE("SCU")
        for sop_class in {each.SOPClassUID for each in datasets}:
            ae.add_requested_context(sop_class, datasets[0].file_meta.TransferSyntaxUID)
        association = ae.associate("127.0.0.1", door.port, ae_title="CAREGRID")
        assert association.is_established
        answers = [association.send_c_store(each).Status == 0 for each in datasets]
        association.release()
    return answers


def send_by_dicomweb(receiver: Receiver, datasets: Sequence[pydicom.Dataset], folder: Path) -> list[bool]:
    """One STOW-RS request; True for those named in the Referenced SOP Sequence."""
    import httpx
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    engine = open_engine(f"sqlite:///{folder}/stow.db")
    create_all(engine)
    store = InstanceStore(engine, folder / "stow", 0)
    app = FastAPI()

    class _Principal:
        name = "tester"

    router = load("intake", "dicomweb").router(engine, store, receiver.receive, WebSettings(), lambda request: _Principal())
    app.include_router(router, prefix="/dicom-web")
    boundary = generate_uid()
    parts = [b"--%s\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % (boundary.encode(), part10(each)) for each in datasets]
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
    with TestClient(app, raise_server_exceptions=False) as client:
        answer: httpx.Response = client.post(
            "/dicom-web/studies",
            content=b"".join(parts) + f"--{boundary}--\r\n".encode(),
            headers={"content-type": kind, "accept": "application/dicom+json"},
        )
    engine.dispose()
    told = answer.json().get("00081199", {}).get("Value", []) if "json" in answer.headers.get("content-type", "") else []
    kept = {each["00081155"]["Value"][0] for each in told}
    return [str(each.SOPInstanceUID) in kept for each in datasets]


def send_by_folder(receiver: Receiver, datasets: Sequence[pydicom.Dataset], folder: Path) -> list[bool]:
    """Files put under the folder; True for those that were taken away as kept."""
    inbox = folder / "inbox"
    inbox.mkdir()
    files = []
    for number, each in enumerate(datasets):
        files.append(inbox / f"{number}.dcm")
        files[-1].write_bytes(part10(each))
    settings = FolderSettings(path=inbox, poll_seconds=0.05, settle_seconds=0.0)
    door = load("intake", "folder").FolderDoor(settings, receiver.receive, receiver.rejected)
    door.look()
    left = {path.name for path in inbox.rglob("*.dcm")}
    return [file.name not in left for file in files]


SENDERS: dict[str, Callable[[Receiver, Sequence[pydicom.Dataset], Path], list[bool]]] = {
    "dimse": send_by_dimse,
    "dicomweb": send_by_dicomweb,
    "folder": send_by_folder,
}


def part10(dataset: pydicom.Dataset) -> bytes:
    """The dataset as a file's bytes."""
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def uid_of(incoming: Incoming) -> str:
    """The SOP Instance UID of an object as handed over, whatever the door."""
    if incoming.sop_instance_uid:
        return incoming.sop_instance_uid
    return str(pydicom.dcmread(BytesIO(b"".join(incoming.chunks)), stop_before_pixels=True).SOPInstanceUID)
