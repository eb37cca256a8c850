"""Governance: the audit log and who looked at what. Administration: users and their roles."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response

from caregrid.domain.roles import ROLES
from caregrid.errors import NotFound, UserInvalid
from caregrid.store import users, views_operations
from caregrid.store.users import Session
from caregrid.web import security
from caregrid.web._page import PageNumber, Parts, Posted, Requires, Web, Words, go, render

router = APIRouter()

ToAudit = Annotated[Session, Depends(Requires("see audit"))]
ToUsers = Annotated[Session, Depends(Requires("manage users"))]


@router.get("/governance/audit")
def audit(
    request: Request, web: Parts, session: ToAudit, subject: Words = "", who: Words = "", what: Words = "", page: PageNumber = 1
) -> HTMLResponse:
    """The audit log, and whether its chain holds."""
    asked = {"subject": subject.strip(), "who": who.strip(), "what": what.strip()}
    found = views_operations.audit_records(web.engine, asked["subject"], asked["who"], asked["what"], page)
    checked = views_operations.audit_chain(web.engine) if request.query_params.get("verify") else None
    return render(request, "audit.html", session, page=found, asked=asked, chain=checked)


@router.get("/governance/access")
def access(request: Request, web: Parts, session: ToAudit, who: Words = "", page: PageNumber = 1) -> HTMLResponse:
    """Who signed in and who looked at which study."""
    return render(request, "access.html", session, page=views_operations.access(web.engine, who.strip(), page), who=who.strip())


@router.get("/admin/users")
def all_users(request: Request, web: Parts, session: ToUsers) -> HTMLResponse:
    """Every user."""
    return render(request, "users.html", session, rows=views_operations.users(web.engine))


@router.get("/admin/users/new")
def new_user(request: Request, session: ToUsers) -> HTMLResponse:
    """The form to add a user."""
    return render(
        request, "user_new.html", session, values={"name": "", "full_name": "", "roles": []}, errors={}, all_roles=ROLES
    )


@router.post("/admin/users/new")
def create_user(request: Request, web: Parts, session: ToUsers, form: Posted) -> Response:
    """Add a user."""
    values: dict[str, Any] = {name: security.text(form, name) for name in ("name", "full_name", "reason")}
    values["roles"] = [str(role) for role in form.getlist("roles")]
    errors = {} if values["reason"] else {"reason": "Say why this person gets access"}
    if not errors:
        password = str(form.get("password", ""))
        try:
            users.create_user(
                web.engine, values["name"], password, values["roles"], session.user, values["reason"], values["full_name"]
            )
        except UserInvalid as invalid:
            errors = _errors(invalid)
    if errors:
        return render(request, "user_new.html", session, 422, values=values, errors=errors, all_roles=ROLES)
    return go("/admin/users", done="created")


@router.get("/admin/users/{name}")
def one_user(request: Request, web: Parts, session: ToUsers, name: str) -> HTMLResponse:
    """One user: roles, active or not, a new password."""
    return _user_page(request, web, session, name)


@router.post("/admin/users/{name}/{verb}")
def change_user(request: Request, web: Parts, session: ToUsers, form: Posted, name: str, verb: str) -> Response:
    """Change a user's roles, let them in or out, or give them a new password."""
    reason = security.text(form, "reason")
    if verb not in ("roles", "active", "password"):
        raise NotFound(thing="page", key=verb)
    if not reason:
        return _user_page(request, web, session, name, 422, verb=verb, errors={"reason": "Say why. It is kept in the audit log"})
    try:
        if verb == "roles":
            users.set_roles(web.engine, name, _roles(form, name, session), session.user, reason)
        elif verb == "active":
            users.set_active(web.engine, name, _active(form, name, session), session.user, reason)
        else:
            users.set_password(web.engine, name, str(form.get("password", "")), session.user, reason)
    except UserInvalid as invalid:
        return _user_page(request, web, session, name, 422, verb=verb, errors=_errors(invalid))
    return go(f"/admin/users/{name}", done=verb)


def _roles(form: Any, name: str, session: Session) -> list[str]:
    roles = [str(role) for role in form.getlist("roles")]
    if name == session.user and "admin" not in roles:
        raise UserInvalid(field="roles", reason="you cannot take the admin role from yourself")
    return roles


def _active(form: Any, name: str, session: Session) -> bool:
    active = security.text(form, "active") == "yes"
    if name == session.user and not active:
        raise UserInvalid(field="reason", reason="you cannot deactivate yourself")
    return active


def _user_page(
    request: Request,
    web: Web,
    session: Session,
    name: str,
    status: int = 200,
    verb: str = "",
    errors: dict[str, str] | None = None,
) -> HTMLResponse:
    row = next((one for one in views_operations.users(web.engine) if one["name"] == name), None)
    if row is None:
        raise NotFound(thing="user", key=name)
    return render(request, "user.html", session, status, row=row, verb=verb, errors=errors or {}, all_roles=ROLES)


def _errors(invalid: UserInvalid) -> dict[str, str]:
    reason = str(invalid.details["reason"])
    return {str(invalid.details["field"]): reason[:1].upper() + reason[1:]}
