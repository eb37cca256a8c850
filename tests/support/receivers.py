"""A real receiver for each kind of destination, for the slot test: what was said accepted must be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from caregrid.domain.settings import Destination
from tests.support.orthanc import Orthanc


@dataclass(frozen=True)
class Receiver:
    """Where to send, and the file that arrived under a SOP Instance UID (KeyError: it did not)."""

    destination: Destination
    arrived: Callable[[str], bytes]


@contextmanager
def _cstore(folder: Path) -> Iterator[Receiver]:
    with Orthanc(folder) as pacs:
        yield Receiver(Destination("pacs", "cstore", "127.0.0.1", pacs.dicom_port, pacs.aet, timeout_seconds=15), pacs.dicom)


@contextmanager
def _stow(folder: Path) -> Iterator[Receiver]:
    with Orthanc(folder) as pacs:
        yield Receiver(Destination("pacs", "stow", url=pacs.dicomweb_url, timeout_seconds=15), pacs.dicom)


@contextmanager
def _folder(folder: Path) -> Iterator[Receiver]:
    target = folder / "delivered"
    target.mkdir()

    def arrived(uid: str) -> bytes:
        found = list(target.rglob(f"{uid}.dcm"))
        if not found:
            raise KeyError(uid)
        return found[0].read_bytes()

    yield Receiver(Destination("share", "folder", path=target), arrived)


#: kind of destination → a receiver of that kind. A new destination adds its own here.
RECEIVERS: dict[str, Callable[[Path], AbstractContextManager[Receiver]]] = {
    "cstore": _cstore,
    "stow": _stow,
    "folder": _folder,
}
