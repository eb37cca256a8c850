"""A small PACS for the demo: keeps what it is sent by C-STORE in a folder, by Study UID. Not for care."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import ThreadedAssociationServer


class DemoPacs:
    """A C-STORE SCP on loopback. ``stored``: SOP Instance UID → file, in order of arrival; a repeat is kept once."""

    def __init__(self, folder: Path, port: int, ae_title: str = "PACS") -> None:
        self.folder, self.port, self.ae_title = folder, port, ae_title
        self.stored: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._server: ThreadedAssociationServer | None = None

    def start(self) -> None:
        """Listen."""
        ae = AE(self.ae_title)
        ae.supported_contexts = AllStoragePresentationContexts
        ae.add_supported_context(Verification)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])

    def _store(self, event: evt.Event) -> int:
        dataset: Any = event.dataset
        dataset.file_meta = event.file_meta
        path = self.folder / str(dataset.StudyInstanceUID) / f"{dataset.SOPInstanceUID}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        with self._lock:
            self.stored[str(dataset.SOPInstanceUID)] = path
        return 0x0000

    def stop(self) -> None:
        """Stop listening; the files stay."""
        if self._server:
            self._server.shutdown()
