"""The folder door: files put under a folder are taken in and removed once they are kept.

A file is taken when its size and time have not changed for ``settle_seconds``. One that is refused goes to ``refused/``
with its reason beside it; one there is no space for stays and is tried again.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from caregrid.domain.settings import FolderSettings
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import IntakeError, StoreFull

log = structlog.get_logger()

Receive = Callable[[Incoming], Receipt]
Rejected = Callable[[Source, str, str], None]

REFUSED = "refused"

#: What programs call a file they are still writing, lower case.
_UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart")

#: How long a file that could not be taken is left alone before the next try.
_RETRY_SECONDS = 10.0


@dataclass
class _Seen:
    """A file as last looked at. since: when it was first seen like this; not_before: when it may be tried (monotonic seconds)."""

    look: tuple[int, int, int]
    since: float
    not_before: float = 0.0
    reported: bool = False


class FolderDoor:
    """Takes in the files of ``settings.path``.

    receive: the store's promise; rejected: told who, what and why when a file is refused.
    """

    def __init__(self, settings: FolderSettings, receive: Receive, rejected: Rejected) -> None:
        if settings.path is None:
            raise ValueError("a folder door needs a folder")
        self._settings, self._path = settings, settings.path
        self._receive, self._rejected = receive, rejected
        self._seen: dict[Path, _Seen] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look; the folder is made when it is not there."""
        self._path.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name="folder-door", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Finish the file at hand and end."""
        self._stopping.set()
        if self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except Exception as error:
                # The edge of the door's thread: a folder that cannot be read just now must not close the door for good.
                log.error("folder door failed, and goes on", door="folder", error=type(error).__name__)
            self._stopping.wait(self._settings.poll_seconds)

    def look(self) -> int:
        """Look through the folder once and take what has settled; how many files were taken."""
        found = dict(self._files())
        self._seen = {path: seen for path, seen in self._seen.items() if path in found}
        ripe = [path for path, look in found.items() if self._settled(path, look)]
        return sum(self._take(path) for path in ripe if not self._stopping.is_set())

    def _files(self) -> Iterator[tuple[Path, tuple[int, int, int]]]:
        """Every file that may be taken, with what tells that it changed; links are not followed."""
        for folder, folders, names in os.walk(self._path, followlinks=False):
            here = Path(folder)
            hidden = {REFUSED} if here == self._path else set()
            folders[:] = sorted(name for name in folders if name not in hidden and not name.startswith("."))
            for name in sorted(names):
                look = None if _skipped(name) else _look(here / name)
                if look:
                    yield here / name, look

    def _settled(self, path: Path, look: tuple[int, int, int]) -> bool:
        now = time.monotonic()
        seen = self._seen.get(path)
        if seen is None or seen.look != look:
            self._seen[path] = _Seen(look, now)
            return self._settings.settle_seconds <= 0
        return now - seen.since >= self._settings.settle_seconds and now >= seen.not_before

    def _take(self, path: Path) -> bool:
        try:
            return self._take_or_refuse(path)
        except StoreFull:
            return self._later(path, "the store is full")
        except Exception as error:
            # The edge of the door: whatever kept this file from being kept, it stays where it is and the others go on.
            return self._later(path, type(error).__name__)

    def _take_or_refuse(self, path: Path) -> bool:
        try:
            look = self._keep(path)
        except StoreFull:
            raise
        except IntakeError as error:
            self._refuse(path, error.message)
            return False
        self._remove(path, look)
        return True

    def _keep(self, path: Path) -> tuple[int, int, int]:
        """Hand the file to the store; returns its looks when it was opened."""
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            look = _looks(os.fstat(file.fileno()))
            # Read, not mapped: a writer that cuts a mapped file short would end this process.
            self._receive(Incoming(source=self._source(path), chunks=[file.read()], part10=True))
        return look

    def _source(self, path: Path) -> Source:
        return Source("folder", self._settings.calling_ae, self._settings.called_ae, str(self._path))

    def _remove(self, path: Path, look: tuple[int, int, int]) -> None:
        """Remove a kept file, unless it was written to meanwhile: then it is taken again."""
        if _look(path) != look:
            return
        try:
            path.unlink()
        except OSError as error:
            self._later(path, f"kept, but it cannot be removed: {type(error).__name__}")

    def _later(self, path: Path, why: str) -> bool:
        seen = self._seen.get(path)
        if seen:
            seen.not_before = time.monotonic() + max(_RETRY_SECONDS, self._settings.poll_seconds)
            if not seen.reported:
                log.warning("file left in the folder", door="folder", reason=why)
                seen.reported = True
        return False

    def _refuse(self, path: Path, reason: str) -> None:
        """Move a file to ``refused/`` with its reason; the store has its bytes in quarantine already."""
        self._rejected(self._source(path), "file", reason)
        try:
            target = self._free_name(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(target.name + ".reason.txt").write_text(reason + "\n", encoding="utf-8")
            path.rename(target)
        except OSError as error:
            self._later(path, f"refused, but it cannot be moved: {type(error).__name__}")

    def _free_name(self, path: Path) -> Path:
        wanted = self._path / REFUSED / path.relative_to(self._path)
        target, number = wanted, 1
        while target.exists():
            target, number = wanted.with_name(f"{wanted.name}.{number}"), number + 1
        return target


def _skipped(name: str) -> bool:
    return name.startswith(".") or name.upper() == "DICOMDIR" or name.lower().endswith(_UNFINISHED)


def _look(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return _looks(found) if stat.S_ISREG(found.st_mode) else None


def _looks(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino
