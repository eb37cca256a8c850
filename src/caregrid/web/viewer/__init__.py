"""The image viewer: a prebuilt OHIF (MIT licence, in the archive) served from ``ohif.zip`` on our own origin.

A study is opened by ``/viewer/viewer?StudyInstanceUIDs=…``; the viewer reads it over our DICOMweb. ``tools/fetch_viewer.py``
makes the archive from the pinned release; nothing is downloaded and no Node is needed at a site.
"""

from __future__ import annotations

import gzip
import mimetypes
import re
import zipfile
from pathlib import Path, PurePosixPath

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response

HERE = Path(__file__).parent
ARCHIVE = HERE / "ohif.zip"

#: Looser than our own pages: the viewer decodes images in WebAssembly, compiles array accessors from text to read
#: segmentations (its ndarray library: 'unsafe-eval'), starts workers from blobs and sets styles from script.
#: It may still talk to nobody but us.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

#: Cross-origin isolation: without it browsers give the viewer no shared memory between its workers.
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}

_MEDIA_TYPES = {".js": "text/javascript", ".wasm": "application/wasm", ".css": "text/css", ".webapp": "application/manifest+json"}

#: A name that holds a hash of its content never changes meaning.
_HASHED = re.compile(r"[0-9a-f]{20}")


def mount(app: FastAPI, path: str = "/viewer", dicomweb: str = "/dicom-web") -> None:
    """Serve the viewer below ``path``, reading images from the DICOMweb service at ``dicomweb`` on the same origin."""
    viewer = Viewer(path, dicomweb)

    def answer(request: Request, name: str = "") -> Response:
        return viewer.answer(name, gzip_accepted="gzip" in request.headers.get("accept-encoding", ""))

    app.add_api_route(path, answer, methods=["GET"], include_in_schema=False)
    app.add_api_route(path + "/{name:path}", answer, methods=["GET", "HEAD"], include_in_schema=False)


def address(study_uid: str, series_uid: str = "", path: str = "/viewer") -> str:
    """Where a study is looked at. series_uid: the series to show first; a segmentation is shown over the images it is of."""
    first = f"&initialSeriesInstanceUID={series_uid}" if series_uid else ""
    return f"{path}/viewer?StudyInstanceUIDs={study_uid}{first}"


class Viewer:
    """The viewer's files. path, dicomweb: where it and the DICOMweb service lie on this origin."""

    def __init__(self, path: str, dicomweb: str, archive: Path = ARCHIVE) -> None:
        self._archive = zipfile.ZipFile(archive)
        self._names = frozenset(self._archive.namelist())
        bundle = next(name for name in sorted(self._names) if re.fullmatch(r"app\.bundle\.[0-9a-f]+\.js", name))
        page = (HERE / "index.html").read_text()
        self._page = page.replace("{path}", path).replace("{bundle}", bundle).encode()
        settings = (HERE / "app-config.js").read_text()
        self._settings = settings.replace("__PATH__", path).replace("__DICOMWEB__", dicomweb).encode()

    def answer(self, name: str, gzip_accepted: bool = True) -> Response:
        """The file ``name``; the viewer's page for every address that names no file. Raises HTTPException 404."""
        if name == "app-config.js":
            return Response(self._settings, media_type="text/javascript", headers=HEADERS | {"Cache-Control": "no-cache"})
        if name in self._names:
            return self._file(name, gzip_accepted)
        if PurePosixPath(name).suffix:
            raise HTTPException(404, "The viewer has no such file")
        return Response(self._page, media_type="text/html", headers=HEADERS | {"Cache-Control": "no-cache"})

    def _file(self, name: str, gzip_accepted: bool) -> Response:
        content = self._archive.read(name)
        headers = dict(HEADERS)
        headers["Cache-Control"] = "max-age=31536000, immutable" if _HASHED.search(name) else "max-age=3600"
        headers["Vary"] = "Accept-Encoding"
        if gzip_accepted:
            headers["Content-Encoding"] = "gzip"
        else:
            content = gzip.decompress(content)
        return Response(content, media_type=_media_type(name), headers=headers)


def _media_type(name: str) -> str:
    suffix = PurePosixPath(name).suffix
    return _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "text/plain"
