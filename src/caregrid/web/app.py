"""The web app of a site: server-rendered pages for clinicians, operators and governance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from caregrid.domain.settings import SiteSettings
from caregrid.errors import AccessError, CaregridError, NotAllowed, NotFound, SignInNeeded, StateError
from caregrid.web import auth, pages_clinician, pages_governance, pages_operator, pages_service, security
from caregrid.web._page import HERE, Web, current_session, environment, render, safe_next
from caregrid.web.actions import Actions

#: Password checks at the same time; each takes a core and 64 MB for a while.
LOGIN_SLOTS = 2

TITLES = {
    403: "You cannot do that",
    404: "Page not found",
    405: "That is not possible here",
    409: "That is no longer possible",
    422: "Something is missing or wrong",
    500: "Sorry, there is a problem",
}


def create_app(
    engine: sa.Engine,
    store_folder: Path,
    settings: SiteSettings,
    actions: Actions,
    extra: Callable[[FastAPI], None] | None = None,
) -> FastAPI:
    """The site's web app. store_folder holds the files that rows name; extra mounts more (DICOMweb, the image viewer)."""
    # No generated API pages: they would load scripts from another server.
    app = FastAPI(title="caregrid", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.web = Web(
        engine=engine,
        store_folder=store_folder,
        settings=settings,
        actions=actions,
        templates=environment(),
        login_slots=asyncio.Semaphore(LOGIN_SLOTS),
    )
    app.add_middleware(security.SecurityHeaders, tls=settings.web.tls is not None)
    for module in (auth, pages_clinician, pages_operator, pages_governance, pages_service):
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    app.add_exception_handler(CaregridError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _broken)
    if extra:
        extra(app)
    return app


def status_of(error: CaregridError) -> int:
    """The HTTP status an error of ours is told with."""
    kinds: tuple[tuple[type[CaregridError], int], ...] = (
        (SignInNeeded, 401),
        (NotFound, 404),
        (NotAllowed, 403),
        (StateError, 409),
        (AccessError, 403),
    )
    return next((status for kind, status in kinds if isinstance(error, kind)), 422)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, CaregridError)
    if isinstance(error, SignInNeeded) and _for_people(request):
        return _to_login(request)
    return _error_page(request, status_of(error), error.message)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = "Check the address, or go back to the start page." if error.status_code == 404 else str(error.detail)
    answer = _error_page(request, error.status_code, words)
    answer.headers.update(error.headers or {})
    return answer


def _invalid(request: Request, _error: Exception) -> Response:
    return _error_page(request, 422, "The address or the form holds a value that cannot be right.")


def _broken(request: Request, _error: Exception) -> Response:
    # This answer is made outside the middleware, so it is dressed here. What went wrong stands in the server's log only.
    answer = _error_page(
        request, 500, "Nothing was changed. Try again; if it stays, tell the people who run this site.", known=False
    )
    answer.headers.update(
        {"Content-Security-Policy": security.CONTENT_SECURITY_POLICY, "Cache-Control": "no-store", **security.HEADERS}
    )
    return answer


def _error_page(request: Request, status: int, words: str, known: bool = True) -> Response:
    if not _for_people(request):
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        return JSONResponse({"error": words}, status_code=status, headers=headers)
    session = current_session(request) if known else None
    return render(request, "error.html", session, status, title=TITLES.get(status, "That did not work"), words=words)


def _for_people(request: Request) -> bool:
    return not request.url.path.startswith(("/dicom-web", "/health", "/metrics"))


def _to_login(request: Request) -> Response:
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    target = request.url_for("login_page").include_query_params(next=safe_next(back)) if request.method == "GET" else "/login"
    where = target if isinstance(target, str) else f"{target.path}?{target.query}"
    if "hx-request" in request.headers:
        # A refreshing table must not be filled with the login form.
        return Response(status_code=204, headers={"HX-Redirect": "/login"})
    return RedirectResponse(where, status_code=303)
