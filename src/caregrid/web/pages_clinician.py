"""The clinician's pages: the worklist, a study with its AI results, and the decision on them."""

from __future__ import annotations

import hashlib
import io
import json
import math
from typing import Annotated, Any

import numpy as np
import pydicom
from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response
from PIL import Image
from pydicom.pixels import pixel_array
from starlette.datastructures import FormData

from caregrid.domain.roles import check_may, may
from caregrid.errors import NotAllowed, NotFound, ReviewOutdated
from caregrid.store import users, views
from caregrid.store.users import Session
from caregrid.store.views import Filter, Row, Story
from caregrid.web import _words, security
from caregrid.web._page import PageNumber, Parts, Posted, Requires, SignedIn, Web, Words, go, render
from caregrid.web.actions import Corrections

router = APIRouter()

ToWorklist = Annotated[Session, Depends(Requires("see worklist"))]
ToImages = Annotated[Session, Depends(Requires("see images"))]

DECISIONS = ("accepted", "rejected", "corrected")


@router.get("/worklist")
def worklist(
    request: Request,
    web: Parts,
    session: ToWorklist,
    state: Words = "",
    modality: Words = "",
    search: Words = "",
    page: PageNumber = 1,
) -> HTMLResponse:
    """Studies with AI results, those waiting for review first."""
    asked = Filter(state=state, modality=modality, search=search.strip())
    found = views.worklist(web.engine, asked, page)
    return render(request, "worklist.html", session, page=found, asked=asked, modalities=views.modalities(web.engine))


@router.get("/studies/{uid}")
def study(request: Request, web: Parts, session: ToWorklist, uid: str) -> HTMLResponse:
    """One study: patient, pictures, findings, and the form to decide on them."""
    return _study_page(request, web, session, uid)


@router.get("/studies/{uid}/pictures/{sop}.png")
def picture(web: Parts, session: ToImages, uid: str, sop: str) -> Response:
    """A secondary capture of ours as PNG."""
    row = views.result_file(web.engine, uid, sop)
    if row["kind"] != "dicom_sc":
        raise NotFound(thing="picture", key=sop)
    return Response(as_png(web, row), media_type="image/png")


@router.post("/studies/{uid}/reviews/{run_id}/{task_id}")
def decide(request: Request, web: Parts, session: SignedIn, form: Posted, uid: str, run_id: str, task_id: str) -> Response:
    """Accept, reject or correct the results a review asks about."""
    check_may(session.roles, "decide review")
    told = views.story(web.engine, uid)
    review = _review(told, run_id, task_id)
    if not _may_decide(review, session):
        raise NotAllowed(roles=", ".join(session.roles), action="decide this review")
    if security.text(form, "seen") != review["seen"]:
        raise ReviewOutdated
    decision, reason = security.text(form, "decision"), security.text(form, "reason")
    corrections, errors = _read_corrections(form, review) if decision == "corrected" else (None, {})
    errors = {**errors, **_check_decision(decision, reason)}
    if errors:
        refused = {"key": review["key"], "errors": errors, "form": {key: str(value) for key, value in form.items()}}
        return _study_page(request, web, session, uid, status=422, refused=refused)
    web.actions.decide(run_id, task_id, decision, session.user, reason, corrections)
    return go(f"/studies/{uid}", done=decision)


@router.post("/studies/{uid}/withdraw/{run_id}")
def withdraw(request: Request, web: Parts, session: SignedIn, form: Posted, uid: str, run_id: str) -> Response:
    """Take a delivered result back, with a reason."""
    check_may(session.roles, "withdraw result")
    reason = security.text(form, "reason")
    if not reason:
        errors = {"reason": "Say why the result is withdrawn"}
        return _study_page(
            request, web, session, uid, status=422, refused={"key": f"withdraw-{run_id}", "errors": errors, "form": {}}
        )
    if run_id not in {row["id"] for row in views.story(web.engine, uid).runs}:
        raise NotFound(thing="run", key=run_id)
    web.actions.withdraw(run_id, session.user, reason)
    return go(f"/studies/{uid}", done="withdrawn")


def _study_page(
    request: Request, web: Web, session: Session, uid: str, status: int = 200, refused: dict[str, Any] | None = None
) -> HTMLResponse:
    told = views.story(web.engine, uid)
    users.record_view(web.engine, session, uid)
    runs = [_shown_run(row, told) for row in told.runs if row["findings"] or row["reviews"]]
    for run in runs:
        for review in run["reviews"]:
            review["mine"] = review["state"] == "open" and _may_decide(review, session)
    if any(review["mine"] for run in runs for review in run["reviews"]):
        views.mark_first_view(web.engine, uid)
    context = {"story": told, "study": told.study, "runs": runs, "refused": refused or {"key": "", "errors": {}, "form": {}}}
    return render(request, "study.html", session, status, **context)


def _shown_run(run: Row, told: Story) -> Row:
    run["algorithms"] = _algorithms(run, told)
    run["pictures"] = [row for row in run["results"] if row["kind"] == "dicom_sc"]
    for review in run["reviews"]:
        of = [row for row in run["findings"] if not review["of_tasks"] or row["task_id"] in review["of_tasks"]]
        review["findings"] = of
        review["key"] = f"{run['id']}-{review['task_id']}"
        review["seen"] = fingerprint(of)
    return run


def _algorithms(run: Row, told: Story) -> list[Row]:
    digests = {row["task_id"]: row["model_digest"] or (run["models"] or {}).get(row["task_id"], "") for row in run["tasks"]}
    found: dict[str, Row] = {}
    for row in run["findings"]:
        entry = found.setdefault(row["task_id"], {"task_id": row["task_id"], "name": row["algorithm"], "version": row["version"]})
        entry["summary"] = row["summary"]
        entry.setdefault("findings", []).append(row)
        entry["model"] = told.models.get(digests.get(row["task_id"], ""))
    return list(found.values())


def fingerprint(findings: list[Row]) -> str:
    """What a person was shown: a decision is only taken on the findings that stood on the page."""
    content = [[row["task_id"], row["tracking_id"], row["version"], row["content"]] for row in findings]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _review(told: Story, run_id: str, task_id: str) -> Row:
    for run in told.runs:
        for review in _shown_run(run, told)["reviews"] if run["id"] == run_id else ():
            if review["task_id"] == task_id:
                return dict(review)
    raise NotFound(thing="review", key=f"{run_id}/{task_id}")


def _may_decide(review: Row, session: Session) -> bool:
    named = review["roles"] or ["clinician"]
    return may(session.roles, "decide review") and not set(named).isdisjoint(session.roles)


def _check_decision(decision: str, reason: str) -> dict[str, str]:
    if decision not in DECISIONS:
        return {"decision": "Choose whether you accept, reject or correct the result"}
    if decision != "accepted" and not reason:
        return {"reason": f"Say why you {'reject' if decision == 'rejected' else 'correct'} the result"}
    if len(reason) > 2000:
        return {"reason": "The reason must have at most 2,000 characters"}
    return {}


def _read_corrections(form: FormData, review: Row) -> tuple[Corrections, dict[str, str]]:
    corrections: Corrections = {}
    errors: dict[str, str] = {}
    for place, row in enumerate(review["findings"]):
        for number, measured in enumerate(row["content"].get("measurements", ())):
            field = f"value-{place}-{number}"
            given = security.text(form, field)
            if field not in form or given == _words.plain(measured["value"]):
                continue
            value, error = parse_value(given, measured)
            if error:
                errors[field] = error
            elif value is not None:
                corrections.setdefault(row["tracking_id"], {})[measured["concept"][2]] = value
    if not corrections and not errors:
        errors["corrections"] = "Change at least one value, or accept or reject the result as it is"
    return corrections, errors


def parse_value(given: str, measured: Row) -> tuple[float | None, str]:
    """A corrected value as a number, or what is wrong with it in words."""
    name, unit = measured["concept"][2], (measured.get("unit") or ["1"])[0]
    try:
        value = float(given.replace(",", ""))
    except ValueError:
        return None, f"{name} must be a number, like {_words.plain(measured['value']) or '12.5'}"
    if not math.isfinite(value) or abs(value) > 1e9:
        return None, f"{name} must be a finite number"
    if value < 0 and unit in _words.NEVER_NEGATIVE:
        return None, f"{name} cannot be less than 0"
    return value, ""


def as_png(web: Web, row: Row) -> bytes:
    """A stored picture object as PNG bytes (8-bit grey or RGB; the first frame of several)."""
    path = (web.store_folder / row["path"]).resolve()
    if not path.is_relative_to(web.store_folder.resolve()) or not path.is_file():
        raise NotFound(thing="picture file", key=row["sop_instance_uid"])
    dataset = pydicom.dcmread(path)
    array = pixel_array(dataset, index=0) if int(dataset.get("NumberOfFrames") or 1) > 1 else pixel_array(dataset)
    if array.dtype != np.uint8:
        span = float(array.max()) - float(array.min()) or 1.0
        array = ((array.astype(np.float32) - float(array.min())) * (255.0 / span)).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        array = 255 - array
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
