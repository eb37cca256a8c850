"""Delivery by STOW-RS: to Orthanc's DICOMweb plugin, and to a real web server that answers what a test tells it to."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from caregrid.domain.settings import Destination
from caregrid.errors import DeliveryFailed, DeliveryRefused
from caregrid.results import cstore, stow, write_results
from tests.support.certificates import Authority
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.results import context, ct_series, findings

pytestmark = pytest.mark.network


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = ct_series(tmp_path / "source", slices=3)
    made = []
    for _, dataset in write_results(context(paths), findings(paths), ("dicom_seg", "dicom_sr", "dicom_sc")):
        made.append(tmp_path / f"{dataset.SOPInstanceUID}.dcm")
        dataset.save_as(made[-1], enforce_file_format=True)
    return made


@dataclass
class Server:
    """What the server answers, and what it was asked."""

    status: int = 200
    body: bytes = b"{}"
    url: str = ""
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def parts(self, number: int = 0) -> list[bytes]:
        """The files of a request, as Python's own MIME parser takes them apart."""
        headers, body = self.requests[number]
        message = message_from_bytes(f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + body, policy=HTTP)
        return [part.get_payload(decode=True) for part in message.iter_parts()]  # type: ignore[misc, attr-defined]


@contextmanager
def serving(server: Server, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/dicom-web/studies"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append(({key.lower(): value for key, value in self.headers.items()}, body))
            self.send_response(server.status)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *arguments: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        web.socket = tls.wrap_socket(web.socket, server_side=True)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{web.server_port}/dicom-web"
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join(5)


def to(url: str, **changes: Any) -> Destination:
    return Destination(**{"name": "pacs", "kind": "stow", "url": url, "timeout_seconds": 10, **changes})


def answer(accepted: list[Path], failed: dict[Path, int] | None = None, warned: dict[Path, int] | None = None) -> bytes:
    """A Store Instances Response Module (PS3.18 table I.2-1) as DICOM JSON."""

    def item(path: Path, tag: str = "", value: int = 0) -> dict[str, Any]:
        told: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [path.stem]}}
        return told | ({tag: {"vr": "US", "Value": [value]}} if tag else {})

    return json.dumps(
        {
            "00081199": {
                "vr": "SQ",
                "Value": [item(path) for path in accepted]
                + [item(path, "00081196", value) for path, value in (warned or {}).items()],
            },
            "00081198": {"vr": "SQ", "Value": [item(path, "00081197", value) for path, value in (failed or {}).items()]},
        }
    ).encode()


def test_orthanc_gives_back_the_same_data_set(files: list[Path], tmp_path: Path) -> None:
    with Orthanc(tmp_path) as pacs:
        destination = to(pacs.dicomweb_url)
        assert stow.echo(destination) == "answered a query with HTTP 200"
        assert [(item.accepted, item.status) for item in stow.send(destination, files)] == [(True, "0000")] * 3
        assert [dcmread(BytesIO(pacs.dicom(path.stem))) for path in files] == [dcmread(path) for path in files]


def test_one_bad_object_does_not_hold_the_others_back(files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "1.2.3.dcm"
    bad.write_bytes(files[0].read_bytes()[:900])
    with Orthanc(tmp_path) as pacs:
        sent = stow.send(to(pacs.dicomweb_url), [files[1], bad, files[2]])
        assert [item.accepted for item in sent] == [True, False, True]
        assert pacs.sop_instance_uids() == {files[1].stem, files[2].stem}


def test_the_files_arrive_byte_for_byte(files: list[Path]) -> None:
    with serving(Server(body=answer(files))) as server:
        assert all(item.accepted for item in stow.send(to(server.url), files))
    assert server.parts() == [path.read_bytes() for path in files]
    headers, _ = server.requests[0]
    assert headers["content-type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert headers["accept"] == "application/dicom+json"
    assert "authorization" not in headers


def test_each_instance_is_judged_by_what_was_said_of_it(files: list[Path]) -> None:
    one, two, three = files
    with serving(Server(202, answer([], {two: 0xA700, three: 0x0122}, {one: 0xB000}))) as server:
        sent = stow.send(to(server.url), files)
    assert [(item.accepted, item.status, item.transient) for item in sent] == [
        (True, "B000", False),
        (False, "A700", True),
        (False, "0122", False),
    ]


def test_409_with_reasons_is_read(files: list[Path]) -> None:
    with serving(Server(409, answer([], dict.fromkeys(files, 0xC000)))) as server:
        sent = stow.send(to(server.url), files)
    assert {(item.accepted, item.status, item.transient) for item in sent} == {(False, "C000", False)}


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"00081199":{"vr":"SQ"}}'])
def test_200_that_names_nothing_is_not_believed(files: list[Path], body: bytes) -> None:
    with serving(Server(200, body)) as server:
        sent = stow.send(to(server.url), files[:1])
    assert [(item.accepted, item.transient) for item in sent] == [(False, True)]


def test_an_instance_the_answer_forgets_is_not_accepted(files: list[Path]) -> None:
    with serving(Server(200, answer(files[:2]))) as server:
        sent = stow.send(to(server.url), files)
    assert [item.accepted for item in sent] == [True, True, False]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_in_trouble_is_tried_again(files: list[Path], status: int) -> None:
    with serving(Server(status)) as server, pytest.raises(DeliveryFailed, match=f"HTTP {status}") as caught:
        stow.send(to(server.url), files)
    assert not isinstance(caught.value, DeliveryRefused)


@pytest.mark.parametrize("status", [401, 403, 404, 406])
def test_a_server_that_will_not_have_us_refuses(files: list[Path], status: int) -> None:
    with serving(Server(status)) as server, pytest.raises(DeliveryRefused, match=f"HTTP {status}"):
        stow.send(to(server.url), files)


@pytest.mark.parametrize("body", [b"<html>", b'"text"', b"\xff\xfe"])
def test_an_answer_in_another_language_is_tried_again(files: list[Path], body: bytes) -> None:
    with serving(Server(200, body)) as server, pytest.raises(DeliveryFailed, match="not DICOM JSON"):
        stow.send(to(server.url), files)


def test_nobody_there(files: list[Path]) -> None:
    with pytest.raises(DeliveryFailed, match="ConnectError"):
        stow.send(to(f"http://127.0.0.1:{free_port()}/dicom-web"), files)


def test_the_token_is_read_from_its_file_at_every_delivery(files: list[Path], tmp_path: Path) -> None:
    token = tmp_path / "token"
    with serving(Server(body=answer(files))) as server:
        for text in ("first\n", "second\n"):
            token.write_text(text)
            stow.send(to(server.url, token_file=token), files)
        token.unlink()
        with pytest.raises(DeliveryFailed, match="token"):
            stow.send(to(server.url, token_file=token), files)
    assert [headers["authorization"] for headers, _ in server.requests] == ["Bearer first", "Bearer second"]


def test_tls_with_both_certificates(files: list[Path], tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "hospital"), Authority(tmp_path, "stranger")
    tls = cstore.server_context(authority.issue("127.0.0.1"))
    with serving(Server(body=answer(files)), tls) as server:
        assert all(item.accepted for item in stow.send(to(server.url, tls=authority.issue("caregrid")), files))
        with pytest.raises(DeliveryFailed):
            stow.send(to(server.url, tls=stranger.issue("caregrid")), files)
        with pytest.raises(DeliveryFailed):
            stow.send(to(server.url), files)
    assert len(server.requests) == 1
