"""Signing in and out, changing one's password, and who a DICOMweb request comes from."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from caregrid.domain.roles import check_may
from caregrid.errors import LoginRefused, SignInNeeded, UserInvalid
from caregrid.store import users
from caregrid.web import security
from caregrid.web._page import Parts, Posted, SignedIn, Web, current_session, go, render, safe_next, web_of

router = APIRouter()

#: Seconds to wait for one of the few places at the (deliberately slow) password check.
LOGIN_PATIENCE = 10.0

MAX_VIEWS_NOTED = 10_000

#: role → first page after signing in; the first that fits
HOMES = (("clinician", "/worklist"), ("operator", "/operations"), ("governance", "/governance/audit"), ("admin", "/admin/users"))


@dataclass(frozen=True)
class Principal:
    """Who a DICOMweb request comes from: a signed-in user or a named API token."""

    name: str
    roles: tuple[str, ...]


def authorise_dicomweb(request: Request) -> Principal:
    """The bearer token's name, or the signed-in user who may see images; SignInNeeded or NotAllowed otherwise.

    A browser session may only read: writing needs a token, so that no other site's page can send objects by a user's cookie.
    """
    web = web_of(request)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        for name, expected in web.settings.web.api_tokens.items():
            if hmac.compare_digest(digest, expected.lower()):
                return Principal(name=f"token:{name}", roles=("operator",))
        raise SignInNeeded
    session = current_session(request)
    if session is None or request.method not in ("GET", "HEAD"):
        raise SignInNeeded
    check_may(session.roles, "see images")
    _note_view(web, session, request.path_params.get("study", ""))
    return Principal(name=session.user, roles=session.roles)


def _note_view(web: Web, session: users.Session, study_uid: str) -> None:
    # Images read past the pages are looked at too; the set spares a query for every one of a study's images.
    seen = (session.key, study_uid)
    if not study_uid or seen in web.views_noted:
        return
    users.record_view(web.engine, session, study_uid)
    if len(web.views_noted) >= MAX_VIEWS_NOTED:
        web.views_noted.clear()
    web.views_noted.add(seen)


@router.get("/")
def start(session: SignedIn) -> RedirectResponse:
    """The first page for the user's roles."""
    return go(next((page for role, page in HOMES if role in session.roles), "/worklist"))


@router.get("/login")
def login_page(request: Request, web: Parts, next_page: Annotated[str, Query(alias="next", max_length=2048)] = "/") -> Response:
    """The form to sign in with."""
    if current_session(request):
        return go(safe_next(next_page))
    return _login_form(request, web, next_page)


@router.post("/login")
async def login(request: Request, web: Parts) -> Response:
    """Check name and password, start a session."""
    form = await security.read_form(request, request.cookies.get(_form_cookie(web), ""))
    name, password = security.text(form, "name"), form.get("password", "")
    next_page = security.text(form, "next")
    if not name or not isinstance(password, str) or not password:
        return _login_form(request, web, next_page, name, "Enter your user name and password", status=422)
    try:
        async with asyncio.timeout(LOGIN_PATIENCE):
            await web.login_slots.acquire()
    except TimeoutError:
        return _login_form(request, web, next_page, name, "Too many people are signing in. Try again in a minute", status=503)
    try:
        token, _session = await run_in_threadpool(_check_and_open, web, name, password)
    except LoginRefused as refused:
        return _login_form(request, web, next_page, name, refused.message, status=401)
    finally:
        web.login_slots.release()
    answer = go(safe_next(next_page))
    answer.delete_cookie(_form_cookie(web), path="/", secure=web.tls)
    # Lax, not Strict: a link from the PACS or RIS to a study must arrive signed in. Every change needs the form token.
    answer.set_cookie(
        web.cookie,
        token,
        max_age=int(web.settings.web.session_hours * 3600),
        httponly=True,
        samesite="lax",
        secure=web.tls,
        path="/",
    )
    return answer


@router.post("/logout")
def logout(web: Parts, session: SignedIn, form: Posted) -> RedirectResponse:
    """End the session."""
    users.close_session(web.engine, session)
    answer = go("/login")
    answer.delete_cookie(web.cookie, path="/", secure=web.tls)
    return answer


@router.get("/account/password")
def password_page(request: Request, session: SignedIn) -> HTMLResponse:
    """The form to change one's own password."""
    return render(request, "password.html", session, errors={})


@router.post("/account/password")
async def change_password(request: Request, web: Parts, session: SignedIn, form: Posted) -> Response:
    """Change one's own password; every session of the user ends, this one too."""
    old, new, again = (str(form.get(name, "")) for name in ("old", "new", "again"))
    errors = {} if new == again else {"again": "The two new passwords differ"}
    if not errors:
        async with web.login_slots:
            errors = await run_in_threadpool(_change_password, web, session.user, old, new)
    if errors:
        return render(request, "password.html", session, status=422, errors=errors)
    answer = go("/login", done="password")
    answer.delete_cookie(web.cookie, path="/", secure=web.tls)
    return answer


def _change_password(web: Web, name: str, old: str, new: str) -> dict[str, str]:
    try:
        users.check_password(web.engine, name, old)
        users.set_password(web.engine, name, new, who=name, why="changed by the user")
    except LoginRefused:
        return {"old": "That is not your present password"}
    except UserInvalid as invalid:
        return {"new": _sentence(str(invalid.details["reason"]))}
    return {}


def _check_and_open(web: Web, name: str, password: str) -> tuple[str, users.Session]:
    users.check_password(web.engine, name, password)
    return users.open_session(web.engine, name, web.settings.web.session_hours)


def _login_form(request: Request, web: Web, next_page: str, name: str = "", error: str = "", status: int = 200) -> Response:
    # Before there is a session the form's token is bound to a cookie of its own.
    token = request.cookies.get(_form_cookie(web), "") or secrets.token_urlsafe(32)
    answer = render(request, "login.html", None, status, token=token, next_page=safe_next(next_page), name=name, error=error)
    answer.set_cookie(_form_cookie(web), token, max_age=3600, httponly=True, samesite="strict", secure=web.tls, path="/")
    return answer


def _form_cookie(web: Web) -> str:
    return f"{web.cookie}-login"


def _sentence(reason: str) -> str:
    return reason[:1].upper() + reason[1:]
