"""A web server with the DICOMweb door and the viewer alone, as a real server on a free port, and multipart bodies to send it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI, Request

from caregrid.domain.settings import WebSettings
from caregrid.intake import dicomweb
from caregrid.store.instances import InstanceStore
from caregrid.web.viewer import mount

BOUNDARY = "a-boundary-of-ours"
STOW_TYPE = f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'


@dataclass
class DoorSite:
    """A door and the store behind it. url: of the DICOMweb service."""

    app: FastAPI
    engine: sa.Engine
    store: InstanceStore
    url: str = "/dicom-web"

    def rows(self, table: sa.Table) -> list[dict[str, Any]]:
        """All rows of a table."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(table)).mappings()]


def everyone(_request: Request) -> SimpleNamespace:
    """Lets every request in."""
    return SimpleNamespace(name="test", roles=("operator",))


def door_site(engine: sa.Engine, folder: Path, settings: WebSettings | None = None, **changes: Any) -> DoorSite:
    """An app with the door below /dicom-web and the viewer below /viewer. changes: receive, authorise, floor."""
    store = InstanceStore(engine, folder, free_bytes_floor=changes.get("floor", 1 << 20))
    routes = dicomweb.router(
        engine, store, changes.get("receive", store.receive), settings or WebSettings(), changes.get("authorise", everyone)
    )
    app = FastAPI()
    app.include_router(routes, prefix="/dicom-web")
    mount(app, "/viewer", "/dicom-web")
    return DoorSite(app, engine, store)


@contextmanager
def serving(site: DoorSite) -> Iterator[DoorSite]:
    """The site behind uvicorn on a free port of loopback; ``url`` is absolute inside the block."""
    server = uvicorn.Server(uvicorn.Config(site.app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    site.url = f"http://127.0.0.1:{port}/dicom-web"
    try:
        yield site
    finally:
        server.should_exit = True
        thread.join(20)


def body(parts: Sequence[bytes], boundary: str = BOUNDARY, headers: str = "Content-Type: application/dicom\r\n") -> bytes:
    """A STOW body of the parts."""
    pieces = [f"--{boundary}\r\n{headers}\r\n".encode() + part + b"\r\n" for part in parts]
    return b"".join(pieces) + f"--{boundary}--\r\n".encode()
