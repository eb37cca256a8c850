"""STOW-RS (PS3.18 10.5): every part of a POST is handed to the store as it arrives; the answer tells each one's fate."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pydicom
import structlog
from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydicom.datadict import keyword_for_tag
from starlette.requests import ClientDisconnect

from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import BodyBroken, IntakeError
from caregrid.intake._dicomweb_accept import accepted
from caregrid.intake._dicomweb_multipart import Part, boundary_of, read_parts, read_single

log = structlog.get_logger()

Receive = Callable[[Incoming], Receipt]

#: FailureReason (PS3.18 I.2.2, PS3.4 B.2.3, PS3.7 annex C).
PROCESSING_FAILURE = 0x0110
OUT_OF_RESOURCES = 0xA700
DATA_SET_MISMATCH = 0xA900
#: Failures that may pass when the same object is sent again later.
TRANSIENT = frozenset({PROCESSING_FAILURE, OUT_OF_RESOURCES})
#: WarningReason: kept, but an object with other bytes was here under the same UID. PS3.18 names no nearer code.
COERCION = 0xB000

RETRY_AFTER_SECONDS = 60

_JSON, _XML = "application/dicom+json", "application/dicom+xml"


@dataclass(frozen=True)
class Identity:
    """Which object a part is, as far as it can be read; empty where it cannot."""

    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    study_instance_uid: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one part. failure, warning: DICOM reason codes, 0 for none."""

    identity: Identity
    failure: int = 0
    warning: int = 0
    too_large: bool = False


@dataclass
class Stow:
    """One POST. study_uid: from the address, empty when it names none."""

    receive: Receive
    source: Source
    folder: Path
    max_part_bytes: int
    study_uid: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    broken: str = ""

    async def run(self, request: Request) -> Response:
        """Take in the request's body; the response of PS3.18 10.5.3. Raises HTTPException 400, 406, 415."""
        answer_type = _answer_type(request)
        try:
            async for part in self._parts(request):
                try:
                    self.outcomes.append(await run_in_threadpool(self._keep, part))
                finally:
                    part.close()
        except BodyBroken as error:
            self.broken = str(error.details["reason"])
        except ClientDisconnect:
            # Nobody hears the answer; what was received whole is kept and the client sends all of it again.
            self.broken = "the client went away"
        return self._answer(answer_type)

    def _parts(self, request: Request) -> AsyncIterator[Part]:
        media, options = boundary_of(request.headers.get("content-type", ""))
        if media == "application/dicom":
            return read_single(request.stream(), self.folder, self.max_part_bytes)
        if media != "multipart/related" or options.get("type", "application/dicom").lower() != "application/dicom":
            raise HTTPException(415, 'Send multipart/related; type="application/dicom"')
        if not options.get("boundary"):
            raise HTTPException(400, "The Content-Type names no boundary")
        return read_parts(request.stream(), options["boundary"], self.folder, self.max_part_bytes)

    def _keep(self, part: Part) -> Outcome:
        if part.trouble:
            return Outcome(Identity(), failure=OUT_OF_RESOURCES, too_large=part.trouble == "too-large")
        if self.study_uid:
            identity = identify(part)
            if identity.study_instance_uid not in ("", self.study_uid):
                return Outcome(identity, failure=DATA_SET_MISMATCH)
        try:
            receipt = self.receive(Incoming(source=self.source, chunks=part.chunks(), part10=True))
        except IntakeError as error:
            return Outcome(identify(part), failure=error.dimse_status)
        except Exception as error:
            # The edge of the door: one object's trouble must not take the others' answers with it; this one is to be sent again.
            log.error("object not kept", door="dicomweb", error=type(error).__name__)
            return Outcome(identify(part), failure=PROCESSING_FAILURE)
        identity = Identity(receipt.sop_class_uid, receipt.sop_instance_uid, receipt.study_instance_uid)
        return Outcome(identity, warning=COERCION if receipt.status == "conflict" else 0)

    @property
    def status(self) -> int:
        """The HTTP status (PS3.18 table 10.5.3-1): 200 all kept, 202 some, 409 none, 503 none for now, 413 all too large, 400."""
        failed = [outcome for outcome in self.outcomes if outcome.failure]
        if self.broken or not self.outcomes:
            return 400
        if len(failed) < len(self.outcomes):
            return 202 if failed or any(outcome.warning for outcome in self.outcomes) else 200
        if all(outcome.too_large for outcome in failed):
            return 413
        return 503 if all(outcome.failure in TRANSIENT and not outcome.too_large for outcome in failed) else 409

    def _answer(self, media: str) -> Response:
        content = response_json(self.outcomes)
        body = json.dumps(content).encode() if media == _JSON else as_xml(content)
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.status == 503 else {}
        why = self.broken or ("" if self.outcomes else "it has no parts")
        if why:
            headers["Warning"] = f'299 caregrid "The body could not be read to its end: {why}"'
        return Response(body, self.status, headers, media_type=media)


def _answer_type(request: Request) -> str:
    for each in accepted(request):
        for media in (_JSON, _XML):
            # Clients that ask for plain JSON, or for what they would retrieve, mean the first.
            if each.takes(media) or each.media in ("application/json", "application/dicom"):
                return media
    raise HTTPException(406, f"The answer is {_JSON} or {_XML}")


def identify(part: Part) -> Identity:
    """Which object a part is; empty when that cannot be read."""
    tags = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID"]
    try:
        with part.open() as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
        return Identity(*(str(dataset.get(tag, "") or "") for tag in tags))
    except Exception:
        # The parser meets bytes nobody has checked and raises nearly anything; the object has no identity to report then.
        return Identity()


def response_json(outcomes: list[Outcome]) -> dict[str, Any]:
    """The Store Instances Response Module (PS3.18 table I.2-1) as DICOM JSON."""
    content: dict[str, Any] = {"00081190": {"vr": "UR"}}
    failed = [_item(outcome) for outcome in outcomes if outcome.failure]
    kept = [_item(outcome) for outcome in outcomes if not outcome.failure]
    if failed:
        content["00081198"] = {"vr": "SQ", "Value": failed}
    if kept:
        content["00081199"] = {"vr": "SQ", "Value": kept}
    return content


def _item(outcome: Outcome) -> dict[str, Any]:
    item: dict[str, Any] = {
        "00081150": _ui(outcome.identity.sop_class_uid),
        "00081155": _ui(outcome.identity.sop_instance_uid),
    }
    if outcome.failure:
        item["00081197"] = {"vr": "US", "Value": [outcome.failure]}
    else:
        item["00081190"] = {"vr": "UR"}
    if outcome.warning:
        item["00081196"] = {"vr": "US", "Value": [outcome.warning]}
    return item


def _ui(value: str) -> dict[str, Any]:
    return {"vr": "UI", "Value": [value]} if value else {"vr": "UI"}


def as_xml(content: dict[str, Any]) -> bytes:
    """DICOM JSON of sequences and plain values as the Native DICOM Model (PS3.19 A.1)."""
    root = ElementTree.Element("NativeDicomModel")
    _fill(root, content)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _fill(parent: ElementTree.Element, content: dict[str, Any]) -> None:
    for tag, element in content.items():
        node = ElementTree.SubElement(
            parent, "DicomAttribute", {"tag": tag, "vr": element["vr"], "keyword": keyword_for_tag(int(tag, 16))}
        )
        for number, value in enumerate(element.get("Value", ()), 1):
            if isinstance(value, dict):
                _fill(ElementTree.SubElement(node, "Item", {"number": str(number)}), value)
            else:
                ElementTree.SubElement(node, "Value", {"number": str(number)}).text = str(value)
