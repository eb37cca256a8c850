"""Received instances: kept as bytes on disk and rows in the index before anybody is told "success".

Order of a receipt: write to ``tmp/`` → fdatasync → rename → fsync of the folder → commit of the index. An object that was
promised is therefore never lost, and one that was not promised leaves at most a file in ``tmp/`` that ``sweep`` removes.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import IntakeError, MalformedObject, SopMismatch, StoreFull
from caregrid.store._header import Bytes, Header, read_header
from caregrid.store._index import Entry, Index
from caregrid.store._journal import Journal, Label, leftovers, whole
from caregrid.store.database import writing
from caregrid.store.files import Buffer, HalfFile, free_bytes, make_folder, sweep, sync_file_system
from caregrid.store.tables import now, quarantine, rejection

IMPLEMENTATION_CLASS_UID = "2.25.300180474285829414929262398764329170981"
IMPLEMENTATION_VERSION_NAME = "CAREGRID"

log = structlog.get_logger()

_FOLDERS = ("tmp", "instances", "quarantine", "results")


@dataclass(frozen=True)
class Hashed(Incoming):
    """An object whose door has worked out the SHA-256 (hex) of its bytes while they came in, when it had time to spare."""

    sha256: str = ""


class InstanceStore:
    """The folder of received files and their index. Safe for several threads and processes at once, also after a fork."""

    def __init__(self, engine: sa.Engine, folder: Path, free_bytes_floor: int = 500 << 20, journal_after: int | None = 8) -> None:
        self.engine, self.folder, self.floor = engine, folder, free_bytes_floor
        self._journal: Journal | None = None
        self._journal_after, self._starting = journal_after, threading.Lock()
        self._recovery: threading.Thread | None = None
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._index = Index(engine)
        self._made: set[str] = set()
        self._synced: set[str] = set()
        _keep_connections_apart(self)

    def receive(self, incoming: Incoming) -> Receipt:
        """Keep an object. Raises MalformedObject or SopMismatch (it is in quarantine then) or StoreFull (nothing is kept)."""
        size = sum(len(memoryview(chunk)) for chunk in incoming.chunks)
        if free_bytes(self.folder) < self.floor + size:
            raise StoreFull()
        meta = b"" if incoming.part10 else file_meta(incoming)
        with HalfFile(self.folder / "tmp") as half:
            half.write([meta, *incoming.chunks])
            try:
                header, sha256 = _understand(incoming, half)
            except IntakeError as error:
                self._quarantine(incoming, half, error)
                raise
            return self._keep(incoming.source, header, sha256, half, [meta, *incoming.chunks])

    def path(self, row_or_relative: str) -> Path:
        """The file of an instance row's ``path``."""
        return self.folder / row_or_relative

    def sweep(self) -> int:
        """At start: keep what a process that died had promised, and remove what interrupted receipts left in ``tmp/``.

        Never touches what another process is writing now. Returns how many files were removed.
        """
        self._recover()
        return sweep(self.folder / "tmp")

    def _keep(self, source: Source, header: Header, sha256: str, half: HalfFile, pieces: Sequence[Buffer]) -> Receipt:
        uid = header.uid("SOPInstanceUID")
        relative = f"instances/{sha256[:2]}/{uid}-{sha256[:16]}.dcm"
        receipt = (header.uid("SOPClassUID"), uid, header.uid("StudyInstanceUID"))
        final = f"{self.folder}/{relative}"
        if os.path.exists(final) and self._index.holds(uid, sha256):
            return Receipt("duplicate", *receipt)
        entry = Entry(source, header, sha256, sum(map(len, pieces)), relative)
        with self._promised(entry, len(pieces[0]) + header.data_offset, half, pieces) as journaled:
            entry.journaled = journaled
            self._prepare(sha256[:2], wait=not journaled)
            half.place(final, wait=not journaled)
            try:
                status = self._index.add(entry)
            except (StoreFull, SQLAlchemyError):
                self._take_back(final, uid, sha256)
                raise
        return Receipt(status, *receipt)

    @contextmanager
    def _promised(self, entry: Entry, offset: int, half: HalfFile, pieces: Sequence[Buffer]) -> Iterator[bool]:
        """Have the bytes on the disk: in the journal (True), or in the file itself, whose folder and rows must be synced too."""
        journal = self._journal or self._start_journal()
        segment = None
        if journal:
            prefix = os.pread(half.handle, offset, 0)
            label = Label(entry.source, entry.path, entry.sha256, len(prefix), zlib.crc32(prefix))
            segment = journal.add(label, pieces, entry.size)
        if journal is None or segment is None:
            half.sync()
            yield False
            return
        try:
            yield True
        finally:
            journal.kept(segment)

    def _start_journal(self) -> Journal | None:
        """A process that receives a lot gets a journal; it is not worth its 128 MiB for the odd object."""
        with self._starting:
            if self._recovery is None:
                self._recovery = threading.Thread(target=self._recover, name="journal-recovery", daemon=True)
                self._recovery.start()
            if self._journal_after is None:
                return None
            self._journal_after -= 1
            if self._journal is None and self._journal_after < 0:
                self._journal = Journal(self.folder / "journal", self._settle, self.floor)
        return self._journal

    def _forget_parent(self) -> None:
        self.engine.dispose(close=False)
        if self._journal:
            self._journal.forget()
        self._journal, self._recovery, self._starting = None, None, threading.Lock()
        self._index = Index(self.engine)

    def _settle(self) -> None:
        sync_file_system(self.folder)
        self._index.settle()

    def close(self) -> None:
        """Settle and remove the journal. Without this the next ``sweep`` does it."""
        if self._recovery:
            self._recovery.join()
        if self._journal:
            self._journal.close()
            self._journal = None
        self._index.close()

    def _recover(self) -> None:
        """Keep, in their places, the objects that were promised by a process that is gone.

        Done by ``sweep``, and once in every process that receives: it may take the place of one that was killed.
        """
        for path, records in leftovers(self.folder / "journal"):
            try:
                for label, content in records:
                    self._restore(label, content)
                self._settle()
                path.unlink(missing_ok=True)
            except (OSError, SQLAlchemyError, IntakeError) as error:
                log.error("journal not recovered", error=type(error).__name__)

    def _restore(self, label: Label, content: bytes) -> None:
        final = self.folder / label.path
        if not (final.is_file() and whole(label, final.read_bytes())):
            self._prepare(final.parent.name)
            with HalfFile(self.folder / "tmp") as half:
                half.write([content])
                half.sync()
                half.place(final)
        header = read_header(content, True)
        if not self._index.holds(header.uid("SOPInstanceUID"), label.sha256):
            self._index.add(Entry(label.source, header, label.sha256, len(content), label.path))

    def _prepare(self, name: str, wait: bool = True) -> None:
        """Have the folder; with ``wait`` it is known to be on the disk."""
        if name not in self._synced and (wait or name not in self._made):
            make_folder(self.folder / "instances" / name, wait)
            self._made.add(name)
            if wait:
                self._synced.add(name)

    def _take_back(self, final: str, uid: str, sha256: str) -> None:
        # A commit whose answer was lost may have happened: the file goes only when the index is sure not to know it.
        with suppress(SQLAlchemyError, OSError):
            if not self._index.holds(uid, sha256):
                os.unlink(final)

    def _quarantine(self, incoming: Incoming, half: HalfFile, error: IntakeError) -> None:
        sha256, source = _sha256(incoming.chunks), incoming.source
        relative = f"quarantine/{sha256}.dcm"
        size = os.fstat(half.handle).st_size
        half.sync()
        half.place(self.folder / relative)
        with writing(self.engine) as connection:
            connection.execute(
                quarantine.insert().values(
                    received_at=now(),
                    protocol=source.protocol,
                    calling_ae=source.calling_ae,
                    called_ae=source.called_ae,
                    address=source.address,
                    sop_instance_uid=incoming.sop_instance_uid.replace("\0", ""),
                    reason=error.message,
                    error=type(error).__name__,
                    sha256=sha256,
                    size=size,
                    path=relative,
                )
            )


def record_rejection(engine: sa.Engine, source: Source, what: str, reason: str) -> None:
    """Note an association or request that was turned away: who, what, why."""
    with writing(engine) as connection:
        connection.execute(
            rejection.insert().values(
                at=now(),
                protocol=source.protocol,
                calling_ae=source.calling_ae,
                called_ae=source.called_ae,
                address=source.address,
                what=what,
                reason=reason,
            )
        )


def file_meta(incoming: Incoming) -> bytes:
    """Preamble and file meta information (PS3.10 7.1) to stand before a bare data set."""
    body = _element(1, b"OB", b"\x00\x01")
    body += _element(2, b"UI", incoming.sop_class_uid.encode("ascii", "replace"))
    body += _element(3, b"UI", incoming.sop_instance_uid.encode("ascii", "replace"))
    body += _element(0x10, b"UI", incoming.transfer_syntax_uid.encode("ascii", "replace"))
    body += _element(0x12, b"UI", IMPLEMENTATION_CLASS_UID.encode())
    body += _element(0x13, b"SH", IMPLEMENTATION_VERSION_NAME.encode())
    return bytes(128) + b"DICM" + _element(0, b"UL", struct.pack("<I", len(body))) + body


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr == b"SH" else b"\0"
    length = struct.pack("<HI", 0, len(value)) if vr == b"OB" else struct.pack("<H", len(value))
    return struct.pack("<HH2s", 2, number, vr) + length + value


def _understand(incoming: Incoming, half: HalfFile) -> tuple[Header, str]:
    """The object's header and the SHA-256 of its data set, so that the same object by DIMSE and by STOW compares equal."""
    if len(incoming.chunks) == 1:
        return _check(incoming, incoming.chunks[0], incoming.part10)
    length = sum(len(memoryview(chunk)) for chunk in incoming.chunks)
    if length == 0:
        raise MalformedObject(reason="it is empty")
    # Many pieces are looked at in the file just written: no second copy in memory, however large the object is. The map goes
    # with the last view of it; closing it here would fail while an error's traceback still holds one.
    content = memoryview(mmap(half.handle, 0, access=ACCESS_READ))
    start = 0 if incoming.part10 else len(content) - length
    return _check(incoming, content[start:], incoming.part10)


def _check(incoming: Incoming, content: Bytes, part10: bool) -> tuple[Header, str]:
    header = read_header(content, part10, incoming.transfer_syntax_uid)
    for keyword, announced in (("SOPInstanceUID", incoming.sop_instance_uid), ("SOPClassUID", incoming.sop_class_uid)):
        if announced != header.uid(keyword) and (announced or not part10):
            raise SopMismatch(reason=f"{keyword} is not the one announced")
    if isinstance(incoming, Hashed) and not part10:
        return header, incoming.sha256
    return header, _sha256([memoryview(content)[header.data_offset :]])


def _sha256(chunks: Sequence[Bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _keep_connections_apart(store: InstanceStore) -> None:
    """A forked process must not speak on its parent's database connections, nor wait for its parent's threads."""
    reference = weakref.ref(store)

    def in_child() -> None:
        kept = reference()
        if kept is not None:
            kept._forget_parent()

    os.register_at_fork(after_in_child=in_child)
