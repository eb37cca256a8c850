"""Destination: a folder. Each object is put there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydicom import dcmread

from caregrid.domain.settings import Destination
from caregrid.errors import DeliveryFailed
from caregrid.results._common import Sent
from caregrid.store.files import sync_path

DESTINATION = "folder"


def send(destination: Destination, paths: Sequence[Path]) -> list[Sent]:
    """Copy every object to ``<folder>/<Study Instance UID>/<SOP Instance UID>.dcm``; sending again overwrites with the same.

    Written under another name, synced, then renamed. Raises DeliveryFailed when the folder cannot be written.
    """
    if destination.path is None:
        raise DeliveryFailed(destination=destination.name, reason="it has no path")
    try:
        return [_put(destination.path, path) for path in paths]
    except OSError as error:
        raise DeliveryFailed(destination=destination.name, reason=error.strerror or type(error).__name__) from error


def echo(destination: Destination) -> str:
    """Whether the folder can be written, in words. Raises DeliveryFailed when it cannot."""
    if destination.path is None or not os.access(destination.path, os.W_OK | os.X_OK):
        raise DeliveryFailed(destination=destination.name, reason="the folder is not there or cannot be written")
    return "the folder can be written"


def _put(folder: Path, path: Path) -> Sent:
    header = dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID", "SOPInstanceUID"])
    target = folder / str(header.StudyInstanceUID) / f"{header.SOPInstanceUID}.dcm"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".part{os.getpid()}")
    try:
        with path.open("rb") as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sync_path(target.parent)
    sync_path(folder)
    return Sent(str(header.SOPInstanceUID), True, "0000")
