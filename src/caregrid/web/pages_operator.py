"""The operator's pages: what comes in, what runs, what goes out, and what needs a hand."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response

from caregrid.domain.roles import check_may
from caregrid.domain.states import RUN, STUDY
from caregrid.errors import CaregridError, NotFound
from caregrid.store import users, views, views_operations
from caregrid.store.users import Session
from caregrid.store.views import Filter, Row
from caregrid.web import security
from caregrid.web._page import PageNumber, Parts, Posted, Requires, SignedIn, Web, Words, go, render

router = APIRouter(prefix="/operations")

ToOperations = Annotated[Session, Depends(Requires("see operations"))]

RETRYABLE = ("parked", "failed", "cancelled", "done")
MAX_CARD_BYTES = 200_000
NO_REASON = {"reason": "Say why. It is kept in the audit log"}


@router.get("")
def dashboard(request: Request, web: Parts, session: ToOperations) -> HTMLResponse:
    """How the site is doing now."""
    counts = views_operations.dashboard(web.engine, web.settings.engine.dead_after_seconds)
    return render(request, "operations.html", session, counts=counts)


@router.get("/studies")
def studies(
    request: Request,
    web: Parts,
    session: ToOperations,
    state: Words = "",
    modality: Words = "",
    search: Words = "",
    source: Words = "",
    page: PageNumber = 1,
) -> HTMLResponse:
    """Every study received."""
    asked = Filter(state=state, modality=modality, search=search.strip(), source=source.strip())
    found = views_operations.studies(web.engine, asked, page)
    context: Row = {"page": found, "asked": asked, "modalities": views.modalities(web.engine), "states": list(STUDY)}
    return render(request, "studies.html", session, **context)


@router.get("/studies/{uid}")
def study(request: Request, web: Parts, session: ToOperations, uid: str) -> HTMLResponse:
    """The full story of a study on one page."""
    told = views.story(web.engine, uid)
    users.record_view(web.engine, session, uid)
    return render(request, "story.html", session, story=told, study=told.study)


@router.get("/runs")
def runs(
    request: Request, web: Parts, session: ToOperations, state: Words = "", workflow: Words = "", page: PageNumber = 1
) -> HTMLResponse:
    """Runs, those that need a person first."""
    found = views_operations.runs(web.engine, state, workflow, page)
    names = [row["name"] for row in views_operations.workflows(web.engine)]
    asked = {"state": state, "workflow": workflow}
    return render(request, "runs.html", session, page=found, asked=asked, states=list(RUN), workflow_names=names)


@router.get("/runs/{run_id}")
def run(request: Request, web: Parts, session: ToOperations, run_id: str) -> HTMLResponse:
    """One run, to be retried or cancelled."""
    return _run_page(request, web, session, run_id)


@router.post("/runs/{run_id}/{verb}")
def change_run(request: Request, web: Parts, session: SignedIn, form: Posted, run_id: str, verb: str) -> Response:
    """Retry or cancel a run, with a reason."""
    kinds = {"retry": web.actions.retry_run, "cancel": web.actions.cancel_run}
    if verb not in kinds:
        raise NotFound(thing="page", key=verb)
    check_may(session.roles, f"{verb} run")
    reason = security.text(form, "reason")
    if not reason:
        return _run_page(request, web, session, run_id, status=422, refused={"verb": verb, "errors": NO_REASON})
    views_operations.one_run(web.engine, run_id)
    kinds[verb](run_id, session.user, reason)
    return go(f"/operations/runs/{run_id}", done=verb)


def _run_page(
    request: Request, web: Web, session: Session, run_id: str, status: int = 200, refused: Row | None = None
) -> HTMLResponse:
    row = views_operations.one_run(web.engine, run_id)
    told = views.story(web.engine, row["study_instance_uid"])
    shown = next(one for one in told.runs if one["id"] == run_id)
    can = {"retry": row["state"] in RETRYABLE, "cancel": "cancelled" in RUN.get(row["state"], ())}
    context = {"run": shown, "story": told, "study": told.study, "can": can, "refused": refused or {"verb": "", "errors": {}}}
    return render(request, "run.html", session, status, **context)


@router.get("/destinations")
def destinations(request: Request, web: Parts, session: ToOperations) -> HTMLResponse:
    """Where results go, and how that goes."""
    configured = {one.name: one for one in web.settings.destinations}
    rows = views_operations.destinations(web.engine, configured)
    return render(request, "destinations.html", session, rows=rows, configured=configured)


@router.get("/destinations/{name}")
def destination(request: Request, web: Parts, session: ToOperations, name: str, page: PageNumber = 1) -> HTMLResponse:
    """One destination with what is parked for it."""
    return _destination_page(request, web, session, name, page)


@router.post("/destinations/{name}/resend")
def resend(request: Request, web: Parts, session: SignedIn, form: Posted, name: str) -> Response:
    """Send one parked delivery again, or all of a destination's."""
    check_may(session.roles, "resend delivery")
    reason, one = security.text(form, "reason"), security.text(form, "one")
    if not reason:
        return _destination_page(request, web, session, name, status=422, errors=NO_REASON)
    ids = views_operations.parked_ids(web.engine, name)
    chosen = [key for key in ids if not one or str(key) == one]
    if not chosen:
        raise NotFound(thing="parked delivery", key=one or name)
    for key in chosen:
        web.actions.resend(key, session.user, reason)
    return go(f"/operations/destinations/{name}", done="resent")


@router.post("/destinations/{name}/echo")
def echo(request: Request, web: Parts, session: SignedIn, form: Posted, name: str) -> Response:
    """Ask a destination whether it is there."""
    check_may(session.roles, "resend delivery")
    _configured(web, name)
    try:
        answer = {"good": True, "words": web.actions.echo(name)}
    except CaregridError as error:
        answer = {"good": False, "words": error.message}
    return _destination_page(request, web, session, name, answer=answer)


def _configured(web: Web, name: str) -> Any:
    for one in web.settings.destinations:
        if one.name == name:
            return one
    raise NotFound(thing="destination", key=name)


def _destination_page(
    request: Request, web: Web, session: Session, name: str, number: int = 1, status: int = 200, **context: Any
) -> HTMLResponse:
    rows = views_operations.destinations(web.engine, [one.name for one in web.settings.destinations])
    row = next((one for one in rows if one["name"] == name), None)
    if row is None:
        raise NotFound(thing="destination", key=name)
    setting = next((one for one in web.settings.destinations if one.name == name), None)
    context = {"errors": {}, "answer": None, **context}
    found = views_operations.parked(web.engine, name, number)
    return render(request, "destination.html", session, status, row=row, setting=setting, page=found, **context)


@router.get("/rejections")
def rejections(request: Request, web: Parts, session: ToOperations, page: PageNumber = 1) -> HTMLResponse:
    """Who was turned away, what they wanted, and why."""
    allowed = views_operations.allowed_senders(web.engine)
    known = {(row["calling_ae"], row["address"]) for row in allowed}
    found = views_operations.rejections(web.engine, page)
    return render(request, "rejections.html", session, page=found, allowed=allowed, known=known)


@router.get("/rejections/allow")
def allow_page(request: Request, session: ToOperations, calling_ae: Words = "", address: Words = "") -> HTMLResponse:
    """The form to allow a sender."""
    check_may(session.roles, "allow sender")
    values = {"calling_ae": calling_ae, "address": address, "reason": ""}
    return render(request, "allow.html", session, values=values, errors={})


@router.post("/rejections/allow")
def allow(request: Request, web: Parts, session: SignedIn, form: Posted) -> Response:
    """Allow a sender from now on."""
    check_may(session.roles, "allow sender")
    values = {name: security.text(form, name) for name in ("calling_ae", "address", "reason")}
    errors = check_sender(values)
    if errors:
        return render(request, "allow.html", session, 422, values=values, errors=errors)
    web.actions.allow_sender(values["calling_ae"], values["address"], session.user, values["reason"])
    return go("/operations/rejections", done="allowed")


def check_sender(values: dict[str, str]) -> dict[str, str]:
    """What is wrong with an AE title, address and reason, by field."""
    errors = {}
    title = values["calling_ae"]
    if not 1 <= len(title) <= 16 or not title.isascii() or not title.isprintable() or "\\" in title or title == "*":
        errors["calling_ae"] = "The AE title must have 1 to 16 characters, as the sender spells it"
    try:
        ipaddress.ip_network(values["address"], strict=False)
    except ValueError:
        errors["address"] = "The address must be an IP address or network, like 10.2.3.4 or 10.2.0.0/16"
    return errors if values["reason"] else {**errors, **NO_REASON}


@router.get("/quarantine")
def quarantine(request: Request, web: Parts, session: ToOperations, page: PageNumber = 1) -> HTMLResponse:
    """Objects that could not be taken in."""
    return render(request, "quarantine.html", session, page=views_operations.quarantined(web.engine, page))


@router.get("/held")
def held(request: Request, web: Parts, session: ToOperations, page: PageNumber = 1) -> HTMLResponse:
    """Studies that wait for an operator's word."""
    return render(request, "held.html", session, page=views_operations.held(web.engine, page))


@router.get("/held/{uid}")
def held_study(request: Request, web: Parts, session: ToOperations, uid: str) -> HTMLResponse:
    """One held study and the choice to let it go on or cancel it."""
    told = views.story(web.engine, uid)
    return render(
        request, "held_study.html", session, study=told.study, story=told, errors={}, values={"choice": "", "reason": ""}
    )


@router.post("/held/{uid}")
def release(request: Request, web: Parts, session: SignedIn, form: Posted, uid: str) -> Response:
    """Let a held study go on, or cancel it."""
    check_may(session.roles, "release study")
    told = views.story(web.engine, uid)
    values = {"choice": security.text(form, "choice"), "reason": security.text(form, "reason")}
    errors = {} if values["choice"] in ("proceed", "cancel") else {"choice": "Choose whether the study goes on or is cancelled"}
    if not values["reason"]:
        errors = {**errors, **NO_REASON}
    if errors:
        return render(request, "held_study.html", session, 422, study=told.study, story=told, errors=errors, values=values)
    web.actions.release_study(uid, values["choice"] == "proceed", session.user, values["reason"])
    return go("/operations/held", done=values["choice"])


@router.get("/workflows")
def workflows(request: Request, web: Parts, session: ToOperations) -> HTMLResponse:
    """Workflows in force and how often each applied."""
    return render(request, "workflows.html", session, rows=views_operations.workflows(web.engine))


@router.get("/models")
def models(request: Request, web: Parts, session: ToOperations) -> HTMLResponse:
    """Model packages and their signatures."""
    return render(request, "models.html", session, rows=views_operations.models(web.engine))


@router.get("/models/{digest}")
def model(request: Request, web: Parts, session: SignedIn, digest: str) -> HTMLResponse:
    """One model package: manifest, signature, model card. Clinicians come here from a study."""
    check_may(session.roles, "see worklist")
    row = views_operations.one_model(web.engine, digest)
    return render(request, "model.html", session, row=row, manifest=row["manifest"], card=model_card(web, row))


def model_card(web: Web, row: Row) -> str:
    """The package's model card as text; empty when its file is not there."""
    folder = web.settings.data / "models" / row["path"]
    card = (folder / (row["manifest"].get("model_card") or "README.md")).resolve()
    if card.is_relative_to(folder.resolve()) and card.is_file() and card.stat().st_size <= MAX_CARD_BYTES:
        return card.read_text(encoding="utf-8", errors="replace")
    return ""


@router.get("/notifications")
def notifications(request: Request, web: Parts, session: ToOperations, page: PageNumber = 1) -> HTMLResponse:
    """What people and systems were told."""
    return render(request, "notifications.html", session, page=views_operations.notifications(web.engine, page))
