"""The pieces of a data set under way: in memory, and from 64 MB on in a file without a name, so that memory stays bounded."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO

from caregrid.errors import IntakeError, MalformedObject, StoreFull

IN_MEMORY = 64 << 20


class Spool:
    """Takes pieces in order. What is too much, or finds no room, is let go; ``error`` then says why it cannot be kept."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder
        self.size = 0
        self.error: IntakeError | None = None
        self._pieces: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._map: mmap | None = None

    def add(self, data: memoryview) -> None:
        """One more piece."""
        self.size += len(data)
        if self.size > self.limit:
            self._give_up(MalformedObject(reason="it is larger than the limit of this site"))
        if self.error:
            return
        if self._file is None and self.size <= IN_MEMORY:
            self._pieces.append(bytes(data))
            return
        try:
            self._to_file(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._give_up(StoreFull())

    def _to_file(self, data: memoryview) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 - closed by ``close``
            for piece in self._pieces:
                self._write(memoryview(piece))
            self._pieces = []
        self._write(data)

    def _write(self, data: memoryview) -> None:
        assert self._file is not None
        while data:
            data = data[self._file.write(data) :]

    def _give_up(self, error: IntakeError) -> None:
        if self.error is None:
            self.close()
            self.error = error

    def chunks(self) -> Sequence[bytes | memoryview]:
        """All pieces; valid until ``close``."""
        if self._file is None:
            return self._pieces
        self._map = mmap(self._file.fileno(), 0, access=ACCESS_READ)
        return [memoryview(self._map)]

    def close(self) -> None:
        """Let go of memory and file."""
        self._pieces = []
        if self._file is not None:
            self._file.close()
            self._file = None
        self._map = None
