"""One sync an object: what was received goes into a journal before it is promised, and to its own place at leisure.

A new file costs two syncs of its own (content, folder) and its index rows a third, one after the other. A journal that was
written full once and is written over from then on costs one, without the file system's own bookkeeping, and all associations
that wait share it. Files and rows are written at once as well, but not waited for; a full segment is settled (everything in it
synced in its own place) before it is used again. After a power cut ``leftovers`` gives back what was promised.

A segment holds records: a block with magic, the segment's turn, the record's number, lengths and checksums, then the file as it
is kept, filled up to whole blocks. The first block that does not follow ends it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from caregrid.domain.study import Source
from caregrid.store.files import Buffer, free_bytes, sync_path

log = structlog.get_logger()

BLOCK = 4096
_MAGIC = b"CGJ1"
_HEAD = struct.Struct("<4sIQQQI")  # magic, checksum of the rest, turn, number, length of the file, length of the label
_SUFFIX, _UNFINISHED = ".journal", ".new"
_PIECES = 512  # of one writev; the kernel takes 1024


@dataclass(frozen=True)
class Label:
    """What a record holds beside the file: who sent it, where it belongs, and how to tell that it is whole."""

    source: Source
    path: str
    sha256: str
    data_offset: int
    prefix_crc: int

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(vars(self) | {"source": vars(self.source)}).encode()

    @classmethod
    def decode(cls, text: bytes) -> Label:
        """From ``encode``'s JSON."""
        values = json.loads(text)
        return cls(**(values | {"source": Source(**values["source"])}))


class Segment:
    """One preallocated file of the journal."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        # Under another name until it is locked and whole: nobody may take it for one that was left behind.
        unfinished = path.with_suffix(_UNFINISHED)
        self.handle = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        self.place = self.number = self.turn = 0
        self.keeping = 0
        zeros = bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            os.pwrite(self.handle, zeros[: size - start], start)
        os.fsync(self.handle)
        os.rename(unfinished, path)
        sync_path(path.parent)

    def begin(self) -> None:
        """Start over."""
        self.place, self.number, self.turn = 0, 0, self.turn + 1

    def put(self, label: bytes, pieces: Sequence[Buffer], length: int) -> None:
        """Write a record; not yet synced."""
        rest = struct.pack("<QQQI", self.turn, self.number, length, len(label)) + label
        head = (_MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest).ljust(BLOCK, b"\0")
        parts: list[Buffer] = [head, *pieces, bytes(-length % BLOCK)]
        place = self.place
        for start in range(0, len(parts), _PIECES):
            place += _write_at(self.handle, parts[start : start + _PIECES], place)
        self.place, self.number = place, self.number + 1


def _write_at(handle: int, parts: Sequence[Buffer], place: int) -> int:
    total = sum(len(part) for part in parts)
    written = os.pwritev(handle, parts, place)
    if written < total:
        rest = memoryview(b"".join(parts))[written:]
        while rest:
            count = os.pwrite(handle, rest, place + written)
            written, rest = written + count, rest[count:]
    return total


def room(label: bytes, length: int) -> int:
    """Bytes a record takes up; 0 when the label is too long for its block."""
    return 0 if _HEAD.size + len(label) > BLOCK else BLOCK + length + -length % BLOCK


@dataclass
class Ticket:
    """A record on its way into the journal. ``segment`` is set once it is synced; ``error`` when that failed."""

    label: bytes
    pieces: Sequence[Buffer]
    length: int
    segment: Segment | None = None
    error: OSError | None = None
    done: bool = False


class Journal:
    """The segments of one process. ``settle`` must sync all files and rows written so far, in their own places.

    Made at once, but of use only once a thread of its own has written its segments: until then, and whenever both are being
    settled, ``add`` says no and the caller syncs file, folder and rows itself.
    """

    def __init__(self, folder: Path, settle: Callable[[], None], floor: int, segment_bytes: int = 64 << 20) -> None:
        self.folder, self.settle, self.floor, self.segment_bytes = folder, settle, floor, segment_bytes
        self._waiting: deque[Ticket] = deque()
        self._writing, self._changed = threading.Lock(), threading.Condition()
        self._active: Segment | None = None
        self._free: list[Segment] = []
        self._full: list[Segment] = []
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="journal", daemon=True)
        self._thread.start()

    def add(self, label: Label, pieces: Sequence[Buffer], length: int) -> Segment | None:
        """Have a record on the disk; None when there is no room. Call ``kept`` on the segment once file and rows are written."""
        ticket = Ticket(label.encode(), pieces, length)
        if not 0 < room(ticket.label, length) <= self.segment_bytes // 4 or not (self._active or self._free):
            return None
        self._waiting.append(ticket)
        with self._writing:
            if not ticket.done:
                self._write([self._waiting.popleft() for _ in range(len(self._waiting))])
        if ticket.error:
            log.error("journal cannot be written", error=ticket.error.errno)
        return ticket.segment

    def kept(self, segment: Segment) -> None:
        """One record's file and rows are written."""
        with self._changed:
            segment.keeping -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Settle what is left and remove the segments; what fails stays for ``leftovers``."""
        with self._writing, self._changed:
            self._seal()
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def forget(self) -> None:
        """In a forked process: let go of what belongs to the parent."""
        for segment in [*self._free, *self._full, *([self._active] if self._active else [])]:
            os.close(segment.handle)

    def _write(self, group: list[Ticket]) -> None:
        for ticket in group:
            ticket.done = True
        touched: list[Ticket] = []
        for ticket in group:
            segment = self._with_room(room(ticket.label, ticket.length))
            if segment is None:
                continue
            try:
                if touched and touched[-1].segment is not segment:
                    _sync(touched)
                    touched = []
                segment.put(ticket.label, ticket.pieces, ticket.length)
            except OSError as error:
                ticket.error = error
                self._seal()
                continue
            with self._changed:
                segment.keeping += 1
            ticket.segment = segment
            touched.append(ticket)
        self._sync_or_give_up(touched)

    def _sync_or_give_up(self, touched: list[Ticket]) -> None:
        try:
            _sync(touched)
        except OSError as error:
            for ticket in touched:
                if ticket.segment:
                    self.kept(ticket.segment)
                ticket.segment, ticket.error = None, error
            self._seal()

    def _with_room(self, needed: int) -> Segment | None:
        if self._active and self._active.place + needed > self._active.size:
            self._seal()
        if self._active is None:
            with self._changed:
                if self._closed or not self._free:
                    return None
                self._active = self._free.pop()
            self._active.begin()
        return self._active

    def _seal(self) -> None:
        with self._changed:
            if self._active:
                self._full.append(self._active)
            self._active = None
            self._changed.notify_all()

    # the thread -----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._make()
        except OSError as error:
            log.warning("no journal", error=error.errno)
            return
        while self._settle_next():
            pass
        for segment in self._free:
            segment.path.unlink(missing_ok=True)
            os.close(segment.handle)
        self._free = []

    def _make(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for _ in range(2):
            if free_bytes(self.folder) < self.floor + 4 * self.segment_bytes:
                log.warning("no journal", reason="too little free space")
                return
            segment = Segment(self.folder / f"{secrets.token_hex(16)}{_SUFFIX}", self.segment_bytes)
            with self._changed:
                self._free.append(segment)

    def _settle_next(self) -> bool:
        """Settle one full segment, waiting for it; False when closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(not each.keeping for each in self._full))
            ready = [each for each in self._full if not each.keeping]
            if not ready:
                return not self._closed
        try:
            self.settle()
        except Exception as error:  # the thread's edge: whatever failed, the records stay, and it is tried again
            log.error("journal not settled", error=type(error).__name__)
            with self._changed:
                return not self._changed.wait_for(lambda: self._closed, timeout=2)
        with self._changed:
            for segment in ready:
                self._full.remove(segment)
                self._free.append(segment)
        return True


def _sync(touched: list[Ticket]) -> None:
    for handle in {ticket.segment.handle for ticket in touched if ticket.segment}:
        os.fdatasync(handle)


def leftovers(folder: Path) -> Iterator[tuple[Path, Iterator[tuple[Label, bytes]]]]:
    """Each segment of a process that is gone, with its whole records in order. The caller removes it once they are kept."""
    for path in sorted(folder.glob(f"*{_UNFINISHED}")):
        with _left_alone(path) as handle:
            if handle is not None:
                path.unlink(missing_ok=True)
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with _left_alone(path) as handle:
            if handle is not None:
                yield path, _records(handle)


@contextmanager
def _left_alone(path: Path) -> Iterator[int | None]:
    """The file opened and locked; None when a living process has it, or it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = True
    except BlockingIOError:
        mine = False
    try:
        yield handle if mine else None
    finally:
        os.close(handle)


def _records(handle: int) -> Iterator[tuple[Label, bytes]]:
    place, expected, turn = 0, 0, None
    while len(head := os.pread(handle, BLOCK, place)) == BLOCK and head.startswith(_MAGIC):
        _, crc, this_turn, number, length, label_length = _HEAD.unpack_from(head)
        if zlib.crc32(head[8 : _HEAD.size + label_length]) != crc or number != expected or turn not in (None, this_turn):
            return
        content = os.pread(handle, length, place + BLOCK)
        label = Label.decode(head[_HEAD.size : _HEAD.size + label_length])
        if len(content) != length or not whole(label, content):
            return
        yield label, content
        place, expected, turn = place + room(b"", length), expected + 1, this_turn


def whole(label: Label, content: Buffer) -> bool:
    """Whether the bytes are those that were promised."""
    view = memoryview(content)
    prefix, data = view[: label.data_offset], view[label.data_offset :]
    return zlib.crc32(prefix) == label.prefix_crc and hashlib.sha256(data).hexdigest() == label.sha256
