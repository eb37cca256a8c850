"""Signing in: passwords, lock-out, sessions, cookies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from caregrid.domain.settings import Tls
from caregrid.errors import LoginRefused, NotFound, UserInvalid
from caregrid.store import audit, users
from caregrid.store.database import reading, writing
from caregrid.store.tables import login_session, user
from caregrid.web._page import safe_next
from caregrid.web.app import create_app
from tests.support.site_factory import PASSWORD, Site, with_session_hours
from tests.unit.web.conftest import login, post


def test_the_right_password_opens_the_page_that_was_asked_for(client):
    asked = client.get("/worklist?state=waiting")
    assert asked.status_code == 303
    assert asked.headers["location"] == "/login?next=%2Fworklist%3Fstate%3Dwaiting"
    answer = login(client, "clare", next_page="/worklist?state=waiting")
    assert (answer.status_code, answer.headers["location"]) == (303, "/worklist?state=waiting")
    assert client.get("/worklist").status_code == 200


@pytest.mark.parametrize(("name", "password"), [("clare", "wrong password"), ("nobody", PASSWORD), ("", ""), ("clare", "")])
def test_anything_else_is_refused_in_the_same_words(client, name, password):
    answer = login(client, name, password)
    assert answer.status_code in (401, 422)
    assert client.get("/worklist").status_code == 303
    if name and password:
        assert "The user name or password is wrong, or the account is locked" in answer.text


def test_five_wrong_passwords_lock_the_account_even_for_the_right_one(client, site):
    for _ in range(users.FAILURES_BEFORE_LOCK):
        assert login(client, "clare", "wrong password").status_code == 401
    assert login(client, "clare").status_code == 401
    with reading(site.engine) as connection:
        told = connection.execute(sa.select(audit.audit.c.what).where(audit.audit.c.subject == "user:clare")).scalars().all()
    assert "account locked" in told
    with writing(site.engine) as connection:
        connection.execute(user.update().where(user.c.name == "clare").values(locked_until="2020-01-01T00:00:00"))
    assert login(client, "clare").status_code == 303


def test_a_good_login_forgets_earlier_failures(client, site):
    for _ in range(3):
        for _ in range(users.FAILURES_BEFORE_LOCK - 1):
            login(client, "clare", "wrong password")
        assert login(client, "clare").status_code == 303
        client.cookies.clear()


def test_the_token_is_256_random_bits_and_kept_only_as_a_hash(site):
    token, session = users.open_session(site.engine, "clare", 1)
    assert len(token) >= 43
    with reading(site.engine) as connection:
        rows = connection.execute(sa.select(login_session)).mappings().all()
    assert all(token not in str(dict(row)) for row in rows)
    assert users.find_session(site.engine, token) == session
    assert users.find_session(site.engine, token[:-1]) is None


def test_sessions_end(site):
    app = create_app(site.engine, site.folder, with_session_hours(site, -1).settings, site.actions)
    expired = TestClient(app, follow_redirects=False)
    token = users._digest("x")
    with writing(site.engine) as connection:
        values = {"token_sha256": token, "user_name": "clare", "csrf": "c", "created_at": "2020", "expires_at": "2020-01-01"}
        connection.execute(login_session.insert().values(**values))
    expired.cookies.set("caregrid", "x")
    assert expired.get("/worklist").status_code == 303


def test_log_out_ends_the_session_on_the_server(signed_in, app):
    clare = signed_in("clare")
    stolen = clare.cookies["caregrid"]
    assert post(clare, "/logout").headers["location"] == "/login"
    thief = TestClient(app, follow_redirects=False, cookies={"caregrid": stolen})
    assert thief.get("/worklist").status_code == 303


def test_a_deactivated_user_is_out_at_once(signed_in, site):
    clare = signed_in("clare")
    users.set_active(site.engine, "clare", False, "adam", "left the hospital")
    assert clare.get("/worklist").status_code == 303
    assert login(clare, "clare").status_code == 401


def test_roles_hold_from_the_next_request(signed_in, site):
    clare = signed_in("clare")
    users.set_roles(site.engine, "clare", ["governance"], "adam", "moved")
    assert clare.get("/governance/audit").status_code == 200


def test_changing_the_password_ends_every_session(signed_in):
    clare, elsewhere = signed_in("clare"), signed_in("clare")
    form = {"old": PASSWORD, "new": "violet tractor seaside", "again": "violet tractor seaside"}
    assert post(clare, "/account/password", **{**form, "old": "wrong password"}).status_code == 422
    assert post(clare, "/account/password", **{**form, "again": "something else"}).status_code == 422
    assert post(clare, "/account/password", **{**form, "new": "short", "again": "short"}).status_code == 422
    assert post(clare, "/account/password", **form).status_code == 303
    assert elsewhere.get("/worklist").status_code == 303
    assert login(elsewhere, "clare").status_code == 401
    assert login(elsewhere, "clare", "violet tractor seaside").status_code == 303


def test_cookies_are_out_of_reach_of_scripts_and_other_sites(client):
    cookie = login(client, "clare").headers.get_list("set-cookie")
    (session,) = [one for one in cookie if one.startswith("caregrid=")]
    assert "HttpOnly" in session
    assert "SameSite=lax" in session
    assert "Secure" not in session


def test_over_tls_cookies_are_secure_and_bound_to_the_host(site):
    tls = Tls(certificate=Path("c.pem"), key=Path("k.pem"))
    settings = replace(site.settings, web=replace(site.settings.web, tls=tls))
    secure = TestClient(
        create_app(site.engine, site.folder, settings, site.actions), "https://testserver", follow_redirects=False
    )
    answer = login(secure, "clare")
    (session,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith("__Host-caregrid=")]
    assert "Secure" in session
    assert "strict-transport-security" in answer.headers
    assert secure.get("/worklist").status_code == 200


@pytest.mark.parametrize(
    "where",
    ["//evil.example", "https://evil.example", "/\\evil.example", "\\\\evil", "javascript:alert(1)", "", "/a\r\nSet-Cookie: x"],
)
def test_signing_in_never_leads_away(where):
    assert safe_next(where) == "/"


@pytest.mark.parametrize(
    ("name", "password", "roles", "field"),
    [
        ("x", PASSWORD, ["clinician"], "name"),
        ("ann smith", PASSWORD, ["clinician"], "name"),
        ("<b>ann</b>", PASSWORD, ["clinician"], "name"),
        ("ann", "short", ["clinician"], "password"),
        ("ann", "aaaaaaaaaaaaaaaa", ["clinician"], "password"),
        ("annannann", "annannannann", ["clinician"], "password"),
        ("ann", PASSWORD, [], "roles"),
        ("ann", PASSWORD, ["root"], "roles"),
        ("clare", PASSWORD, ["clinician"], "name"),
    ],
)
def test_users_that_do_not_do(site: Site, name, password, roles, field):
    with pytest.raises(UserInvalid) as refused:
        users.create_user(site.engine, name, password, roles, "adam", "test")
    assert refused.value.details["field"] == field


def test_a_new_user_can_sign_in(site: Site):
    users.create_user(site.engine, "ann.smith", PASSWORD, ["operator"], "adam", "joined", "Ann Smith")
    users.check_password(site.engine, "ann.smith", PASSWORD)
    with pytest.raises(LoginRefused):
        users.check_password(site.engine, "ann.smith", PASSWORD.upper())
    with pytest.raises(NotFound):
        users.set_roles(site.engine, "nobody", ["operator"], "adam", "test")
    with reading(site.engine) as connection:
        audit.verify(connection)
