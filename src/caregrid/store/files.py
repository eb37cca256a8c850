"""Files that survive a power cut: written beside, synced, renamed into place, and their folder synced.

A name under which a file can be found therefore always means the whole file. What was being written when the machine or the
process died lies in the folder for half-written files, and ``sweep`` takes it away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from caregrid.errors import StoreFull

Buffer = bytes | bytearray | memoryview

_LIBC = ctypes.CDLL(None, use_errno=True)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class HalfFile:
    """A file under way: ``with HalfFile(tmp) as half: half.write(…); half.sync(); half.place(final)``.

    Left without ``place`` it is removed. Its lock, which ends with the process, keeps another process's ``sweep`` away from it.
    Raises StoreFull when the disk is full or a quota is used up; other OSErrors pass.
    """

    def __init__(self, folder: Path) -> None:
        self.path = f"{folder}/{secrets.token_hex(16)}"
        try:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise _named(error) from error
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        self._placed = False

    def write(self, pieces: Iterable[Buffer]) -> int:
        """Append the pieces; returns the bytes written. A write that comes up short (a disk filling up) is gone on with."""
        written = 0
        try:
            for piece in pieces:
                rest = memoryview(piece).cast("B")
                while rest:
                    count = os.write(self.handle, rest)
                    written += count
                    rest = rest[count:]
        except OSError as error:
            raise _named(error) from error
        return written

    def sync(self) -> None:
        """The content is on the disk when this returns. On some file systems a full disk only shows here."""
        try:
            os.fdatasync(self.handle)
        except OSError as error:
            raise _named(error) from error

    def place(self, final: str | Path, wait: bool = True) -> None:
        """Give the file its name. With ``wait`` (the file must be synced before) the name is on the disk when this returns."""
        try:
            os.rename(self.path, final)
            self._placed = True
            if wait:
                sync_path(os.path.dirname(final))
        except OSError as error:
            raise _named(error) from error

    def __enter__(self) -> HalfFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.handle)
        if not self._placed:
            with suppress(FileNotFoundError):
                os.unlink(self.path)


def sync_path(path: str | Path) -> None:
    """A file's bytes, or a folder's entries (what is in it, under which name), are on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(file: Path) -> None:
    """What others wrote to the file is on the disk when this returns; nothing happens when there is no such file."""
    with suppress(FileNotFoundError):
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(handle)
        finally:
            os.close(handle)


def sync_file_system(folder: Path) -> None:
    """Everything written to the folder's file system is on the disk when this returns."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(handle) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed")
    finally:
        os.close(handle)


def make_folder(folder: Path, wait: bool = True) -> None:
    """A folder inside one that is there already; with ``wait`` it is on the disk when this returns. Raises StoreFull."""
    try:
        folder.mkdir(exist_ok=True)
        if wait:
            sync_path(folder.parent)
    except OSError as error:
        raise _named(error) from error


def free_bytes(folder: str | Path) -> int:
    """Space left for us on the file system of ``folder``, in bytes."""
    return shutil.disk_usage(folder).free


def sweep(folder: Path) -> int:
    """Remove half-written files nobody is writing any more; returns how many."""
    return sum(_remove_if_left(file) for file in folder.iterdir() if file.is_file())


def _remove_if_left(file: Path) -> int:
    try:
        with file.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
    except (BlockingIOError, FileNotFoundError):
        return 0
    return 1


def _named(error: OSError) -> Exception:
    return StoreFull() if error.errno in _FULL else error
