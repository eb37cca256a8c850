"""Local users and their sessions: argon2id password hashes, lock-out, and session tokens kept only as SHA-256."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import sqlalchemy as sa
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from caregrid.domain.roles import ROLES
from caregrid.errors import LoginRefused, NotFound, UserInvalid
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.tables import login_session, now, user

MINIMUM_PASSWORD = 12
FAILURES_BEFORE_LOCK = 5
LOCK_MINUTES = 15

_hasher = PasswordHasher()


@dataclass(frozen=True)
class Session:
    """A signed-in user. key: SHA-256 of the token (hex), safe to write down; csrf: the token every form must carry."""

    user: str
    full_name: str
    roles: tuple[str, ...]
    csrf: str
    key: str
    created_at: str
    expires_at: str


def create_user(
    engine: sa.Engine, name: str, password: str, roles: Collection[str], who: str, why: str, full_name: str = ""
) -> None:
    """Add a local user; UserInvalid when name, password or roles do not do, or the name is taken."""
    name = name.strip()
    _check_name(name)
    _check_roles(roles)
    check_password_strength(name, password)
    row = {"name": name, "full_name": full_name.strip(), "roles": sorted(set(roles)), "active": True, "created_at": now()}
    password_hash = _hasher.hash(password)
    with writing(engine) as connection:
        if _row(connection, name):
            raise UserInvalid(field="name", reason="that user name is taken")
        connection.execute(user.insert().values(**row, password_hash=password_hash, failed_logins=0))
        audit.append(connection, who=who, what="created user", subject=f"user:{name}", why=why, detail={"roles": row["roles"]})


def set_roles(engine: sa.Engine, name: str, roles: Collection[str], who: str, why: str) -> None:
    """Change what a user may do; holds from the user's next request."""
    _check_roles(roles)
    with writing(engine) as connection:
        _known(connection, name)
        connection.execute(user.update().where(user.c.name == name).values(roles=sorted(set(roles))))
        detail = {"roles": sorted(set(roles))}
        audit.append(connection, who=who, what="changed roles", subject=f"user:{name}", why=why, detail=detail)


def set_active(engine: sa.Engine, name: str, active: bool, who: str, why: str) -> None:
    """Let a user in or shut them out; shutting out ends their sessions at once, letting in also lifts a lock."""
    with writing(engine) as connection:
        _known(connection, name)
        values = {"active": active, "failed_logins": 0, "locked_until": None}
        connection.execute(user.update().where(user.c.name == name).values(**values))
        if not active:
            connection.execute(login_session.delete().where(login_session.c.user_name == name))
        what = "activated user" if active else "deactivated user"
        audit.append(connection, who=who, what=what, subject=f"user:{name}", why=why)


def set_password(engine: sa.Engine, name: str, password: str, who: str, why: str) -> None:
    """Give a user a new password; every session of theirs ends."""
    check_password_strength(name, password)
    password_hash = _hasher.hash(password)
    with writing(engine) as connection:
        _known(connection, name)
        values = {"password_hash": password_hash, "failed_logins": 0, "locked_until": None}
        connection.execute(user.update().where(user.c.name == name).values(**values))
        connection.execute(login_session.delete().where(login_session.c.user_name == name))
        audit.append(connection, who=who, what="changed password", subject=f"user:{name}", why=why)


def check_password(engine: sa.Engine, name: str, password: str) -> None:
    """LoginRefused unless the password is right, the account is active and not locked. Slow on purpose (argon2id).

    After FAILURES_BEFORE_LOCK wrong passwords in a row the account is locked for LOCK_MINUTES. Which of the reasons
    it was is not told, and an unknown name takes as long as a known one.
    """
    with reading(engine) as connection:
        row = _row(connection, name)
    right = _matches(row["password_hash"] if row else _decoy(), password)
    if row is None:
        raise LoginRefused
    if _is_locked(row) or not row["active"]:
        raise LoginRefused
    if not right:
        _count_failure(engine, name)
        raise LoginRefused
    if row["failed_logins"]:
        with writing(engine) as connection:
            connection.execute(user.update().where(user.c.name == name).values(failed_logins=0, locked_until=None))


def open_session(engine: sa.Engine, name: str, hours: float) -> tuple[str, Session]:
    """Start a session for a user whose password was checked; returns the token (256 random bits, for the cookie) and it."""
    token, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    expires = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="microseconds")
    values = {"token_sha256": _digest(token), "user_name": name, "csrf": csrf, "created_at": now(), "expires_at": expires}
    with writing(engine) as connection:
        connection.execute(login_session.delete().where(login_session.c.expires_at < now()))
        connection.execute(login_session.insert().values(**values))
        audit.append(connection, who=name, what="signed in", subject=f"user:{name}", why="login")
    session = find_session(engine, token)
    if session is None:
        raise LoginRefused
    return token, session


def find_session(engine: sa.Engine, token: str) -> Session | None:
    """The live session of a token, with the roles its user has now; None when unknown, expired or the user inactive."""
    query = (
        sa.select(login_session, user.c.full_name, user.c.roles)
        .join(user, user.c.name == login_session.c.user_name)
        .where(login_session.c.token_sha256 == _digest(token), login_session.c.expires_at > now(), user.c.active)
    )
    with reading(engine) as connection:
        row = connection.execute(query).mappings().first()
    if row is None:
        return None
    return Session(
        user=row["user_name"],
        full_name=row["full_name"],
        roles=tuple(row["roles"]),
        csrf=row["csrf"],
        key=row["token_sha256"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )


def close_session(engine: sa.Engine, session: Session) -> None:
    """End a session."""
    with writing(engine) as connection:
        connection.execute(login_session.delete().where(login_session.c.token_sha256 == session.key))
        audit.append(connection, who=session.user, what="signed out", subject=f"user:{session.user}", why="log out")


def record_view(engine: sa.Engine, session: Session, study_uid: str) -> None:
    """Audit that the session's user saw a study: once per session and study."""
    seen = (
        sa.select(audit.audit.c.detail)
        .where(audit.audit.c.subject == f"study:{study_uid}", audit.audit.c.what == "viewed study")
        .where(audit.audit.c.who == session.user, audit.audit.c.at >= session.created_at)
    )
    with reading(engine) as connection:
        if any(row.detail.get("session") == session.key[:12] for row in connection.execute(seen)):
            return
    with writing(engine) as connection:
        detail = {"session": session.key[:12], "roles": list(session.roles)}
        audit.append(
            connection, who=session.user, what="viewed study", subject=f"study:{study_uid}", why="opened the page", detail=detail
        )


def check_password_strength(name: str, password: str) -> None:
    """UserInvalid unless the password is long enough and is not the user name (length over rules, as the NCSC advises)."""
    if len(password) < MINIMUM_PASSWORD:
        raise UserInvalid(field="password", reason=f"the password must have at least {MINIMUM_PASSWORD} characters")
    if len(password) > 256:
        raise UserInvalid(field="password", reason="the password must have at most 256 characters")
    if name and name.lower() in password.lower() and len(password) < len(name) + MINIMUM_PASSWORD:
        raise UserInvalid(field="password", reason="the password must not be made of the user name")
    if len(set(password)) < 5:
        raise UserInvalid(field="password", reason="the password repeats too few characters")


def _check_name(name: str) -> None:
    allowed = name.replace(".", "").replace("-", "").replace("_", "").replace("@", "")
    if not (2 <= len(name) <= 64 and allowed.isascii() and allowed.isalnum()):
        reason = "a user name has 2 to 64 letters, digits, dots, hyphens, underscores or @"
        raise UserInvalid(field="name", reason=reason)


def _check_roles(roles: Collection[str]) -> None:
    if not roles or not set(roles) <= set(ROLES):
        raise UserInvalid(field="roles", reason=f"choose at least one role of: {', '.join(ROLES)}")


def _row(connection: sa.Connection, name: str) -> Any:
    return connection.execute(sa.select(user).where(user.c.name == name)).mappings().first()


def _known(connection: sa.Connection, name: str) -> None:
    if _row(connection, name) is None:
        raise NotFound(thing="user", key=name)


def _matches(password_hash: str, password: str) -> bool:
    try:
        return _hasher.verify(password_hash, password)
    except (VerificationError, InvalidHashError):
        return False


def _is_locked(row: Any) -> bool:
    return bool(row["locked_until"]) and row["locked_until"] > now()


def _count_failure(engine: sa.Engine, name: str) -> None:
    with writing(engine) as connection:
        held = sa.select(user.c.failed_logins).where(user.c.name == name).with_for_update()
        failures = connection.execute(held).scalar_one() + 1
        values: dict[str, Any] = {"failed_logins": failures}
        if failures % FAILURES_BEFORE_LOCK == 0:
            until = datetime.now(UTC) + timedelta(minutes=LOCK_MINUTES)
            values["locked_until"] = until.isoformat(timespec="microseconds")
            detail = {"failures": failures, "minutes": LOCK_MINUTES}
            audit.append(
                connection, who=name, what="account locked", subject=f"user:{name}", why="wrong passwords", detail=detail
            )
        connection.execute(user.update().where(user.c.name == name).values(**values))


@cache
def _decoy() -> str:
    return _hasher.hash(secrets.token_urlsafe(16))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
