"""A sender that speaks DIMSE byte by byte: it sends what no library would, and objects exactly as they lie in a file."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.filereader import _read_file_meta_info as read_meta
from pydicom.filereader import read_preamble

VERIFICATION = "1.2.840.10008.1.1"
IMPLICIT = "1.2.840.10008.1.2"
CT = "1.2.840.10008.5.1.4.1.1.2"
APPLICATION = "1.2.840.10008.3.1.1.1"
Context = tuple[int, str, Sequence[str]]


def item(kind: int, value: bytes) -> bytes:
    """An item or sub-item of an association request."""
    return struct.pack(">BBH", kind, 0, len(value)) + value


def pdu(kind: int, body: bytes) -> bytes:
    """A PDU."""
    return struct.pack(">BBI", kind, 0, len(body)) + body


def request(
    contexts: Sequence[Context] = ((1, VERIFICATION, (IMPLICIT,)), (3, CT, (IMPLICIT,))),
    *,
    called: str = "CAREGRID",
    calling: str = "SCU",
    version: int = 1,
    application: str = APPLICATION,
    user: bytes = b"",
) -> bytes:
    """An A-ASSOCIATE-RQ."""
    body = struct.pack(">HH16s16s32s", version, 0, called.encode().ljust(16), calling.encode().ljust(16), b"")
    body += item(0x10, application.encode())
    for identifier, abstract, syntaxes in contexts:
        inner = item(0x30, abstract.encode()) + b"".join(item(0x40, each.encode()) for each in syntaxes)
        body += item(0x20, bytes([identifier, 0, 0, 0]) + inner)
    return pdu(1, body + item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4") + user))


def command(kind: int, message: int = 1, **more: bytes) -> bytes:
    """A command set. more: ``sop_class``, ``sop_instance`` as bytes; ``data=b"1"`` when a data set follows."""
    elements = [(0x0100, struct.pack("<H", kind)), (0x0110, struct.pack("<H", message))]
    elements.append((0x0800, struct.pack("<H", 0x0001 if more.get("data") else 0x0101)))
    for number, name in ((0x0002, "sop_class"), (0x1000, "sop_instance")):
        if name in more:
            elements.append((number, more[name] + b"\0" * (len(more[name]) % 2)))
    body = b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in sorted(elements))
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def value(context: int, flags: int, content: bytes) -> bytes:
    """A presentation data value. flags: 1 command, 2 last fragment."""
    return struct.pack(">IBB", len(content) + 2, context, flags) + content


@dataclass(frozen=True)
class Raw:
    """An object as it lies in a file: the data set's bytes and what the file meta information says of it."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    content: bytes


def raw(source: Path | bytes) -> Raw:
    """A part 10 file, taken apart without touching the data set. Raises what pydicom raises when it is none."""
    whole = source if isinstance(source, bytes) else source.read_bytes()
    file = BytesIO(whole)
    read_preamble(file, False)
    meta = read_meta(file)
    header = pydicom.dcmread(BytesIO(whole), stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
    return Raw(
        str(header.get("SOPClassUID") or meta.MediaStorageSOPClassUID),
        str(header.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID", "1.2.3")),
        str(meta.TransferSyntaxUID),
        whole[file.tell() :],
    )


def agreed(answer: bytes) -> set[int]:
    """The ids of the presentation contexts an A-ASSOCIATE-AC accepts."""
    found, place = set(), 68
    while place < len(answer):
        kind, _, length = struct.unpack_from(">BBH", answer, place)
        if kind == 0x21 and answer[place + 6] == 0:
            found.add(answer[place + 4])
        place += 4 + length
    return found


class Scu:
    """One connection."""

    def __init__(self, port: int, timeout: float = 20.0) -> None:
        self.peer = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, content: bytes) -> None:
        """Send bytes as they are."""
        self.peer.sendall(content)

    def read(self) -> tuple[int, bytes]:
        """(type, body) of the next PDU; (0, b"") when the peer has closed."""
        head = exactly(self.peer, 6)
        return (head[0], exactly(self.peer, struct.unpack(">I", head[2:])[0])) if len(head) == 6 else (0, b"")

    def associate(self, *arguments: object, **more: object) -> tuple[int, bytes]:
        """Send an association request and read the answer."""
        self.send(request(*arguments, **more))  # type: ignore[arg-type]
        return self.read()

    def answer(self) -> dict[int, int | bytes]:
        """The next response: element of group 0000 → number or bytes."""
        kind, body = self.read()
        assert kind == 4, f"PDU {kind} instead of a response"
        found: dict[int, int | bytes] = {}
        place = 6
        while place < len(body):
            _, number, length = struct.unpack_from("<HHI", body, place)
            content = body[place + 8 : place + 8 + length]
            found[number] = struct.unpack("<H", content)[0] if length == 2 else content
            place += 8 + length
        return found

    def echo(self, context: int = 1) -> int:
        """C-ECHO; its status."""
        self.send(pdu(4, value(context, 3, command(0x30, sop_class=VERIFICATION.encode()))))
        status = self.answer()[0x0900]
        assert isinstance(status, int)
        return status

    def store(self, each: Raw, context: int = 3, *, fragment: int = 16000) -> int:
        """C-STORE of an object as it is; its status."""
        asked = command(1, 7, sop_class=each.sop_class.encode(), sop_instance=each.sop_instance.encode(), data=b"1")
        self.send(pdu(4, value(context, 3, asked)))
        pieces = [each.content[start : start + fragment] for start in range(0, len(each.content), fragment)] or [b""]
        for number, piece in enumerate(pieces, 1):
            self.send(pdu(4, value(context, 2 if number == len(pieces) else 0, piece)))
        status = self.answer()[0x0900]
        assert isinstance(status, int)
        return status

    def release(self) -> None:
        """A-RELEASE, and its answer."""
        self.send(pdu(5, bytes(4)))
        assert self.read()[0] == 6


def exactly(peer: socket.socket, count: int) -> bytes:
    """``count`` bytes from ``peer``; nothing when it closed before they had all come."""
    got = b""
    while len(got) < count:
        try:
            piece = peer.recv(count - len(got))
        except ConnectionResetError:
            return b""
        if not piece:
            return b""
        got += piece
    return got


@contextmanager
def connected(port: int, timeout: float = 20.0) -> Iterator[Scu]:
    """A connection, closed after the block."""
    scu = Scu(port, timeout)
    try:
        yield scu
    finally:
        scu.peer.close()


@contextmanager
def associated(port: int, *arguments: object, **more: object) -> Iterator[Scu]:
    """An accepted association."""
    with connected(port) as scu:
        assert scu.associate(*arguments, **more)[0] == 2
        yield scu
