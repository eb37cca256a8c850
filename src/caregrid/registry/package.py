"""A package's files: listed, digested, copied into the registry. The signature file is not part of what is signed."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

from caregrid.errors import PackageRefused
from caregrid.store.files import sync_path

SIGNATURE_FILE = "signature.dsse.json"
MAX_FILES = 20_000
MAX_BYTES = 64 << 30
IGNORED_FOLDERS = frozenset({"__pycache__", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache"})


@dataclass(frozen=True)
class PackageFile:
    """One file of a package: path with / inside the package, sha256 (hex), size in bytes, whether it may be executed."""

    path: str
    sha256: str
    size: int
    executable: bool


#: Changes with any change of any file: (path, size, mode, inode, mtime, ctime) of each.
Fingerprint = tuple[tuple[str, int, int, int, int, int], ...]


def walk(folder: Path, leave_out: frozenset[str] = frozenset()) -> list[tuple[str, os.stat_result]]:
    """Every file of the package but the signature, sorted by path. Raises PackageRefused for links, devices and too much.

    leave_out: names of folders to skip. Only where a package is worked on (IGNORED_FOLDERS), never in the registry: Python would
    run what somebody put into a ``__pycache__`` there.
    """
    found: list[tuple[str, os.stat_result]] = []
    _walk(folder, "", found, leave_out)
    total = sum(status.st_size for _path, status in found)
    if total > MAX_BYTES:
        raise PackageRefused(file=folder.name, reason=f"holds more than {MAX_BYTES} bytes")
    return sorted(found)


def _walk(folder: Path, prefix: str, found: list[tuple[str, os.stat_result]], leave_out: frozenset[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            if not _speakable(entry.name):
                raise PackageRefused(file=repr(path), reason="has a name with control or unprintable characters")
            if stat.S_ISDIR(status.st_mode):
                if entry.name not in leave_out:
                    _walk(Path(entry.path), path + "/", found, leave_out)
            elif not stat.S_ISREG(status.st_mode):
                raise PackageRefused(file=path, reason="is a link or special file; a package holds plain files only")
            elif path != SIGNATURE_FILE:
                found.append((path, status))
            if len(found) > MAX_FILES:
                raise PackageRefused(file=path, reason=f"is one file too many; a package holds at most {MAX_FILES}")


def _speakable(name: str) -> bool:
    return name.isprintable() and not any(0xD800 <= ord(letter) < 0xE000 for letter in name)


def fingerprint(folder: Path) -> Fingerprint:
    """What the file system says about every file, without reading them."""
    return tuple(
        (path, status.st_size, status.st_mode, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        for path, status in walk(folder)
    )


def list_files(folder: Path, leave_out: frozenset[str] = frozenset()) -> tuple[PackageFile, ...]:
    """Every file of the package with its hash, sorted by path."""
    return tuple(
        PackageFile(path, file_sha256(folder / path), status.st_size, bool(status.st_mode & stat.S_IXUSR))
        for path, status in walk(folder, leave_out)
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: tuple[PackageFile, ...]) -> str:
    """The package's digest: SHA-256 over path, hash, size and executable bit of every file."""
    whole = hashlib.sha256(b"caregrid-package/1\n")
    for file in files:
        whole.update(f"{file.sha256} {file.size} {int(file.executable)} {file.path}\n".encode())
    return whole.hexdigest()


def copy_package(source: Path, home: Path) -> Path:
    """Copy a package into a fresh folder under ``home``/tmp, files synced and read-only; the caller renames it into place."""
    target = home / "tmp" / uuid.uuid4().hex
    target.mkdir(parents=True)
    try:
        for path, status in walk(source, IGNORED_FOLDERS):
            _copy_file(source / path, target / path, bool(status.st_mode & stat.S_IXUSR))
        signature = source / SIGNATURE_FILE
        if signature.is_file() and not signature.is_symlink():
            _copy_file(signature, target / SIGNATURE_FILE, False)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _copy_file(source: Path, target: Path, executable: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # A link put in the file's place since it was listed must not be followed.
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(reading, "rb") as inside, target.open("xb") as outside:
        shutil.copyfileobj(inside, outside, 1 << 20)
        outside.flush()
        os.fsync(outside.fileno())
    target.chmod(0o555 if executable else 0o444)


def write_durably(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` so that a power cut leaves the old or the new file, never half of one."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_path(path.parent)
