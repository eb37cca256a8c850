"""Folders in which a study's files are handed over and the answer is taken back; swept when their process is gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path


class Home:
    """This process's folder under ``scratch``, held by a file lock; what dead processes left beside it is removed."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.id = uuid.uuid4().hex[:12]
        self.folder = scratch / self.id
        self.folder.mkdir(parents=True, mode=0o700)
        # Locked before it has its name: another process that starts now must not find it unlocked and sweep us away.
        unnamed = scratch / f"{self.id}.new"
        self._lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(scratch / f"{self.id}.lock")
        self.living = self._sweep()

    @property
    def mark(self) -> str:
        """What names of control groups of this scratch folder begin with."""
        return f"caregrid-{hashlib.sha256(str(self.scratch.resolve()).encode()).hexdigest()[:8]}-"

    def _sweep(self) -> set[str]:
        """Remove the folders of processes that no longer hold their lock; return the ids of those that do."""
        living = {self.id}
        for lock in self.scratch.glob("*.lock"):
            if lock.stem == self.id:
                continue
            with contextlib.suppress(FileNotFoundError), open(lock, "r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    living.add(lock.stem)
                    continue
                shutil.rmtree(self.scratch / lock.stem, ignore_errors=True)
                lock.unlink()
        return living

    def close(self) -> None:
        """Remove the folder and let go of the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.scratch / f"{self.id}.lock").unlink(missing_ok=True)
        os.close(self._lock)


class Spool:
    """``incoming`` (read-only inside) and ``outgoing`` (writable inside) of one worker, emptied between studies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.incoming, self.outgoing = folder / "in", folder / "out"
        for made in (self.incoming, self.outgoing):
            made.mkdir(parents=True)
            made.chmod(0o755)

    def put(self, files_by_series: Mapping[str, Sequence[Path]], readable_by_all: bool = False) -> dict[str, list[str]]:
        """Hand the files in; returns series UID → names below ``incoming``. Names inside say nothing of the originals."""
        named: dict[str, list[str]] = {}
        for number, (uid, files) in enumerate(sorted(files_by_series.items())):
            folder = self.incoming / str(number)
            folder.mkdir(mode=0o755)
            folder.chmod(0o755)
            names = [f"{number}/{place}.dcm" for place in range(len(files))]
            for name, file in zip(names, files, strict=True):
                _link(Path(file), self.incoming / name, readable_by_all)
            named[uid] = names
        return named

    def clear(self) -> None:
        """Empty both folders. What lies in ``outgoing`` was made by the algorithm: links are removed, not followed."""
        for folder in (self.incoming, self.outgoing):
            folder.chmod(0o755)
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    _remove_tree(entry.path)
                else:
                    os.unlink(entry.path)

    def outgoing_bytes(self) -> int:
        """How much lies in ``outgoing``."""
        total = 0
        for where, _folders, files in os.walk(self.outgoing):
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(where, file)).st_blocks * 512
        return total

    def remove(self) -> None:
        """Take the folders away."""
        if self.folder.exists():
            _remove_tree(str(self.folder))


def _remove_tree(path: str) -> None:
    try:
        shutil.rmtree(path)
    except (RecursionError, PermissionError):  # an algorithm made folders deeper than Python follows, or closed them
        subprocess.run(["chmod", "-R", "u+rwX", "--", path], check=True)
        subprocess.run(["rm", "-rf", "--", path], check=True)


def _link(source: Path, target: Path, readable_by_all: bool) -> None:
    """A hard link where that is possible (no bytes copied), else a copy. Never a symbolic link: it would point outside."""
    if not readable_by_all or source.stat().st_mode & 0o004:
        try:
            os.link(source.resolve(), target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.EOPNOTSUPP):
                raise
    shutil.copyfile(source, target)
    target.chmod(0o644)
