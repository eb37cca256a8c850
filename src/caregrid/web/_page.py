"""What every page handler is handed: the site's parts, the signed-in user, the posted form; and how a page is rendered."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import sqlalchemy as sa
from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import FormData

from caregrid.domain.roles import check_may, may
from caregrid.domain.settings import SiteSettings
from caregrid.errors import SignInNeeded
from caregrid.store import users
from caregrid.store.users import Session
from caregrid.web import _words, security, viewer
from caregrid.web.actions import Actions

HERE = Path(__file__).parent

#: address, words, action that must be allowed
NAVIGATION = (
    ("/worklist", "Worklist", "see worklist"),
    ("/operations", "Operations", "see operations"),
    ("/governance/audit", "Governance", "see audit"),
    ("/admin/users", "Users", "manage users"),
)


FILTERS = (
    "moment",
    "ago",
    "duration",
    "person",
    "day",
    "clock",
    "size",
    "number",
    "plain",
    "unit",
    "meaning",
    "short",
    "sender",
    "study_title",
    "site",
    "count_of",
    "said",
)


@dataclass(frozen=True)
class Web:
    """The parts a page may use, handed to create_app by caregrid.site."""

    engine: sa.Engine
    store_folder: Path
    settings: SiteSettings
    actions: Actions
    templates: Environment
    login_slots: asyncio.Semaphore
    views_noted: set[tuple[str, str]] = field(default_factory=set)

    @property
    def tls(self) -> bool:
        """Whether the pages are served over TLS."""
        return self.settings.web.tls is not None

    @property
    def cookie(self) -> str:
        """The session cookie's name; over TLS the prefix makes browsers refuse it for other hosts and paths."""
        return "__Host-caregrid" if self.tls else "caregrid"


def web_of(request: Request) -> Web:
    """The site's parts."""
    web: Web = request.app.state.web
    return web


def current_session(request: Request) -> Session | None:
    """The signed-in user's session, or None."""
    web = web_of(request)
    token = request.cookies.get(web.cookie, "")
    return users.find_session(web.engine, token) if token else None


def signed_in(request: Request) -> Session:
    """The signed-in user's session; SignInNeeded when there is none."""
    session = current_session(request)
    if session is None:
        raise SignInNeeded
    return session


class Requires:
    """A dependency: the session of a user who may take an action; NotAllowed otherwise."""

    def __init__(self, action: str) -> None:
        self.action = action

    def __call__(self, session: Annotated[Session, Depends(signed_in)]) -> Session:
        """Check the signed-in user's roles."""
        check_may(session.roles, self.action)
        return session


async def posted_form(request: Request, session: Annotated[Session, Depends(signed_in)]) -> FormData:
    """The posted form, its token checked against the session."""
    return await security.read_form(request, session.csrf)


Parts = Annotated[Web, Depends(web_of)]
SignedIn = Annotated[Session, Depends(signed_in)]
Posted = Annotated[FormData, Depends(posted_form)]
PageNumber = Annotated[int, Query(alias="page", ge=1, le=100000)]
Words = Annotated[str, Query(max_length=128)]


def environment() -> Environment:
    """The templates, with everything escaped and missing names an error."""
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for name in FILTERS:
        found.filters[name] = getattr(_words, name)
    found.globals.update(
        state=_words.state, between=_words.between, age=_words.age, RESULT_KINDS=_words.RESULT_KINDS, PROTOCOLS=_words.PROTOCOLS
    )
    found.filters["pair"] = lambda value: (value, value)
    found.globals.update(SEXES=_words.SEXES, may=may, viewer_link=viewer_link)
    return found


def viewer_link(study_uid: str, runs: Sequence[Mapping[str, Any]] = ()) -> str:
    """Where the image viewer shows a study, with the last valid segmentation of its runs laid over the images."""
    drawn = [
        each["series_instance_uid"]
        for run in runs
        for each in run["results"]
        if each["kind"] == "dicom_seg" and each["state"] == "valid"
    ]
    return viewer.address(study_uid, drawn[-1] if drawn else "")


def render(request: Request, template: str, session: Session | None = None, status: int = 200, **context: Any) -> HTMLResponse:
    """A page. context is what the template shows; navigation, user and form token are added."""
    web = web_of(request)
    roles = session.roles if session else ()
    navigation = [(href, words) for href, words, action in NAVIGATION if session and may(roles, action)]
    live = request.query_params.get("live", "") != "off"
    html = web.templates.get_template(template).render(
        site=web.settings.name,
        session=session,
        roles=roles,
        has_viewer=web.settings.web.dicomweb and may(roles, "see images"),
        csrf=session.csrf if session else "",
        navigation=navigation,
        path=request.url.path,
        here=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        with_query=lambda **changes: with_query(request, **changes),
        live=live,
        done=request.query_params.get("done", ""),
        rendered_at=datetime.now(UTC).isoformat(timespec="seconds"),
        **context,
    )
    return HTMLResponse(html, status_code=status)


def with_query(request: Request, **changes: Any) -> str:
    """The present address with some query values changed (removed when empty); ``done`` never stays."""
    values = {**dict(request.query_params), **{key: str(value) for key, value in changes.items()}}
    kept = {key: value for key, value in values.items() if value and key != "done"}
    return request.url.path + (f"?{urlencode(kept)}" if kept else "")


def go(path: str, done: str = "") -> RedirectResponse:
    """See the page ``path`` next, with a word of success from the page's own list."""
    return RedirectResponse(f"{path}?done={done}" if done else path, status_code=303)


def safe_next(path: str) -> str:
    """A page of ours to go to after signing in; the start page when the address is not plainly ours."""
    plain = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable() and "\\" not in path
    return path if plain else "/"
