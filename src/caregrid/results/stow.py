"""Destination: a PACS by DICOMweb STOW-RS (PS3.18 10.5). Streams from disk; believes only what is said of each instance."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from pydicom.filereader import read_file_meta_info

from caregrid.domain.settings import Destination
from caregrid.errors import DeliveryFailed, DeliveryRefused
from caregrid.results._common import Sent

DESTINATION = "stow"

_CHUNK = 1 << 18
_ANSWER_LIMIT = 64 << 20
_PROCESSING_FAILURE = 0x0110
_ABOUT_OBJECTS = (400, 413, 415, 422)

_REFERENCED = "00081199"
_FAILED = "00081198"
_INSTANCE = "00081155"
_FAILURE_REASON = "00081197"
_WARNING_REASON = "00081196"


def send(destination: Destination, paths: Sequence[Path]) -> list[Sent]:
    """POST the files as multipart/related, as they lie on disk, and say what the receiver answered to each.

    An instance is accepted only when the answer names it in its Referenced SOP Sequence; one the answer does not name
    is not accepted, and worth sending again. A request refused for one bad object is repeated object by object.
    Raises DeliveryFailed (no answer, 429, 5xx) or DeliveryRefused (401, 403 and the other 4xx that are not about objects).
    """
    if not paths:
        return []
    answer = _post(destination, paths)
    if answer.status_code in _ABOUT_OBJECTS:
        if len(paths) > 1:
            return [sent for path in paths for sent in send(destination, [path])]
        return [Sent(_uid(paths[0]), False, f"HTTP {answer.status_code}")]
    return _read_answer(destination, answer, [_uid(path) for path in paths])


def echo(destination: Destination) -> str:
    """Ask for one study (QIDO-RS); what the receiver answered, in words. Raises DeliveryFailed when it does not answer."""
    try:
        with _client(destination) as client:
            headers = {"Accept": "application/dicom+json", **_authorisation(destination)}
            answer = client.get(studies_url(destination.url), params={"limit": "1"}, headers=headers)
    except (httpx.HTTPError, OSError) as error:
        raise DeliveryFailed(destination=destination.name, reason=type(error).__name__) from error
    return f"answered a query with HTTP {answer.status_code}"


def _uid(path: Path) -> str:
    return str(read_file_meta_info(path).MediaStorageSOPInstanceUID)


def _part_head(boundary: str, number: int) -> bytes:
    # No transfer-syntax parameter: the file meta says it, and Orthanc's plugin 1.7 answers 200 and drops such a part.
    lead = "" if number == 0 else "\r\n"
    return f"{lead}--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()


def _body(parts: Sequence[tuple[bytes, Path]], end: bytes) -> Iterator[bytes]:
    for head, path in parts:
        yield head
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    yield end


def _authorisation(destination: Destination) -> dict[str, str]:
    """The bearer token, read anew at every delivery so that it can be renewed without a restart."""
    if destination.token_file is None:
        return {}
    try:
        return {"Authorization": f"Bearer {destination.token_file.read_text().strip()}"}
    except OSError as error:
        raise DeliveryFailed(destination=destination.name, reason="its token file cannot be read") from error


def _post(destination: Destination, paths: Sequence[Path]) -> httpx.Response:
    boundary = uuid.uuid4().hex
    parts = [(_part_head(boundary, number), path) for number, path in enumerate(paths)]
    end = f"\r\n--{boundary}--\r\n".encode()
    headers = {
        "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
        "Content-Length": str(sum(len(head) + path.stat().st_size for head, path in parts) + len(end)),
        "Accept": "application/dicom+json",
        **_authorisation(destination),
    }
    try:
        with _client(destination) as client:
            return client.post(studies_url(destination.url), headers=headers, content=_body(parts, end))
    except (httpx.HTTPError, OSError) as error:
        raise DeliveryFailed(destination=destination.name, reason=type(error).__name__) from error


def _client(destination: Destination) -> httpx.Client:
    return httpx.Client(timeout=destination.timeout_seconds, verify=_verify(destination), trust_env=False)


def studies_url(url: str) -> str:
    """The Studies resource of a DICOMweb root; a URL that already names it stays."""
    root = url.rstrip("/")
    return root if root.endswith("/studies") else f"{root}/studies"


def _verify(destination: Destination) -> ssl.SSLContext | bool:
    if destination.tls is None:
        return True
    context = ssl.create_default_context(cafile=destination.tls.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(destination.tls.certificate, destination.tls.key)
    return context


def _read_answer(destination: Destination, answer: httpx.Response, uids: Sequence[str]) -> list[Sent]:
    """200, 202 and 409 carry the per-instance answer (PS3.18 10.5.3); anything else is about the whole request."""
    status = answer.status_code
    if status == 429 or status >= 500:
        raise DeliveryFailed(destination=destination.name, reason=f"HTTP {status}")
    if status not in (200, 202, 409):
        raise DeliveryRefused(destination=destination.name, reason=f"HTTP {status}")
    said = _instances(destination, answer)
    return [said.get(uid) or Sent(uid, False, f"HTTP {status}, not named in the answer", transient=True) for uid in uids]


def _instances(destination: Destination, answer: httpx.Response) -> dict[str, Sent]:
    if len(answer.content) > _ANSWER_LIMIT:
        raise DeliveryFailed(destination=destination.name, reason="its answer is too long")
    try:
        content = answer.json() if answer.content else {}
    except ValueError as error:
        raise DeliveryFailed(destination=destination.name, reason="its answer is not DICOM JSON") from error
    data = next(iter(content), {}) if isinstance(content, list) else content
    if not isinstance(data, dict):
        raise DeliveryFailed(destination=destination.name, reason="its answer is not DICOM JSON")
    said = {}
    for item in _items(data, _REFERENCED):
        warning = _first(item, _WARNING_REASON)
        uid = str(_first(item, _INSTANCE))
        said[uid] = Sent(uid, True, f"{int(warning):04X}" if warning is not None else "0000")
    for item in _items(data, _FAILED):
        reason = int(_first(item, _FAILURE_REASON) or _PROCESSING_FAILURE)
        uid = str(_first(item, _INSTANCE))
        transient = 0xA700 <= reason <= 0xA7FF or reason == _PROCESSING_FAILURE
        said[uid] = Sent(uid, False, f"{reason:04X}", transient=transient)
    return said


def _items(data: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    value = data.get(tag, {})
    items = value.get("Value", []) if isinstance(value, dict) else []
    return [item for item in items if isinstance(item, dict)]


def _first(item: dict[str, Any], tag: str) -> Any:
    value = item.get(tag, {})
    values = value.get("Value", []) if isinstance(value, dict) else []
    return values[0] if values else None
