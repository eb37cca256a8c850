"""What every page and form keeps to: roles, form tokens, headers, harmless text, plain errors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from caregrid.domain.roles import ROLES
from caregrid.store import users, views
from caregrid.web import security
from caregrid.web.app import create_app
from tests.support.site_factory import CANARY, PEOPLE, digest
from tests.unit.web.conftest import csrf, login

#: page → who may see it
PAGES = {
    "/worklist": set(PEOPLE),
    "/studies/{waiting}": set(PEOPLE),
    "/studies/{canary}": set(PEOPLE),
    "/operations": {"oliver", "grace", "adam"},
    "/operations/studies": {"oliver", "grace", "adam"},
    "/operations/studies/{accepted}": {"oliver", "grace", "adam"},
    "/operations/studies/{nothing}": {"oliver", "grace", "adam"},
    "/operations/studies/{canary}": {"oliver", "grace", "adam"},
    "/operations/runs": {"oliver", "grace", "adam"},
    "/operations/runs/run-failed": {"oliver", "grace", "adam"},
    "/operations/destinations": {"oliver", "grace", "adam"},
    "/operations/destinations/archive": {"oliver", "grace", "adam"},
    "/operations/rejections": {"oliver", "grace", "adam"},
    "/operations/rejections/allow": {"oliver", "adam"},
    "/operations/quarantine": {"oliver", "grace", "adam"},
    "/operations/held": {"oliver", "grace", "adam"},
    "/operations/held/{held}": {"oliver", "grace", "adam"},
    "/operations/workflows": {"oliver", "grace", "adam"},
    "/operations/models": {"oliver", "grace", "adam"},
    f"/operations/models/{digest('1.2.0')}": set(PEOPLE),
    "/operations/notifications": {"oliver", "grace", "adam"},
    "/governance/audit": {"grace", "adam"},
    "/governance/audit?verify=1": {"grace", "adam"},
    "/governance/access": {"grace", "adam"},
    "/admin/users": {"adam"},
    "/admin/users/new": {"adam"},
    "/admin/users/clare": {"adam"},
    "/account/password": set(PEOPLE),
}

#: form → who may send it
FORMS = {
    "/studies/{waiting}/reviews/run-waiting/check": {"clare"},
    "/studies/{accepted}/withdraw/run-accepted": {"clare", "oliver"},
    "/operations/runs/run-failed/retry": {"oliver", "adam"},
    "/operations/runs/run-failed/cancel": {"oliver", "adam"},
    "/operations/destinations/archive/resend": {"oliver", "adam"},
    "/operations/destinations/pacs/echo": {"oliver", "adam"},
    "/operations/rejections/allow": {"oliver", "adam"},
    "/operations/held/{held}": {"oliver", "adam"},
    "/admin/users/new": {"adam"},
    "/admin/users/clare/roles": {"adam"},
    "/account/password": set(PEOPLE),
}


@pytest.mark.parametrize("name", PEOPLE)
def test_pages_open_for_their_roles_only_and_stay_harmless(signed_in, site, name):
    client = signed_in(name)
    for page, allowed in PAGES.items():
        answer = client.get(page.format(**site.uids))
        assert answer.status_code == (200 if name in allowed else 403), page
        assert CANARY not in answer.text, page
        check_headers(answer)
        assert not re.search(r"<(script|style)(?![^>]*\ssrc=)[^>]*>|\sstyle=|\son[a-z]+=", answer.text), page


@pytest.mark.parametrize("name", PEOPLE)
def test_forms_are_taken_from_their_roles_only(signed_in, site, name):
    client = signed_in(name)
    token = csrf(client.get("/account/password").text)
    for form, allowed in FORMS.items():
        answer = client.post(form.format(**site.uids), data={"csrf": token})
        assert (answer.status_code == 403) == (name not in allowed), (form, answer.status_code)
        if "reviews" in form and name in allowed:
            assert answer.status_code == 409, "a decision without what was seen must not be taken"


def test_every_form_of_the_app_needs_its_token(app, signed_in, site):
    users.set_roles(site.engine, "adam", ROLES, "adam", "so that only the token is missing")
    client = signed_in("adam")
    other = csrf(signed_in("clare").get("/worklist").text)
    posts = [path for path in post_paths(app) if path != "/login"]
    assert len(posts) >= 11
    for path in posts:
        filled = re.sub(r"\{[^}]+\}", "x", path)
        for data in ({}, {"csrf": ""}, {"csrf": "wrong"}, {"csrf": other}):
            assert client.post(filled, data=data).status_code == 403, path
    assert site.log == []


def test_the_login_form_needs_its_token_too(client):
    client.get("/login")
    assert client.post("/login", data={"name": "clare", "password": "x"}).status_code == 403
    assert TestClient(client.app).post("/login", data={"name": "clare", "password": "x", "csrf": ""}).status_code == 403


def test_a_form_from_another_site_is_refused(signed_in):
    client = signed_in("clare")
    token = csrf(client.get("/worklist").text)
    answer = client.post("/logout", data={"csrf": token}, headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 403
    assert client.get("/worklist").status_code == 200


def test_a_huge_form_is_refused(signed_in):
    client = signed_in("clare")
    token = csrf(client.get("/worklist").text)
    assert client.post("/logout", data={"csrf": token, "x": "y" * (security.MAX_FORM_BYTES + 1)}).status_code == 403


def test_without_a_session_every_page_leads_to_the_login(client, site):
    for page in PAGES:
        answer = client.get(page.format(**site.uids))
        assert (answer.status_code, answer.headers["location"].split("?")[0]) == (303, "/login"), page


def test_a_refreshing_table_is_not_filled_with_the_login_form(client):
    answer = client.get("/worklist", headers={"HX-Request": "true"})
    assert answer.status_code == 204
    assert answer.headers["hx-redirect"] == "/login"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing/here", 404),
        ("/studies/1.2.3", 404),
        ("/operations/studies/1.2.3", 404),
        ("/operations/runs/none", 404),
        ("/operations/models/none", 404),
        ("/operations/destinations/none", 404),
        ("/admin/users/none", 404),
        ("/worklist?page=none", 422),
        ("/worklist?page=0", 422),
        ("/worklist?page=99999", 200),
        ("/worklist?search=%25%27%22--", 200),
        ("/worklist?search=" + "x" * 200, 422),
        ("/logout", 405),
    ],
)
def test_errors_are_pages_in_plain_words(signed_in, path, status):
    answer = signed_in("adam").get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "Traceback" not in answer.text
    check_headers(answer)


def test_a_broken_part_shows_no_stack_and_keeps_the_headers(site):
    def broken(name: str) -> str:
        raise ZeroDivisionError("secret detail")

    app = create_app(site.engine, site.folder, site.settings, replace(site.actions, echo=broken))
    client = TestClient(app, follow_redirects=False, raise_server_exceptions=False)
    login(client, "oliver")
    token = csrf(client.get("/operations").text)
    answer = client.post("/operations/destinations/pacs/echo", data={"csrf": token})
    assert answer.status_code == 500
    assert "secret detail" not in answer.text
    assert "Sorry, there is a problem" in answer.text
    check_headers(answer)


def test_machines_get_errors_as_json(client):
    answer = client.get("/dicom-web/studies")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")


def test_health_and_metrics_are_open_and_hold_no_patient_data(client, site):
    assert client.get("/health").json() == {"ok": True}
    answer = client.get("/metrics")
    for line in answer.text.splitlines():
        assert line.startswith("# TYPE caregrid_") or re.fullmatch(
            r"caregrid_[a-z_]+(\{[a-z]+=\"[^\"]*\"(,[a-z]+=\"[^\"]*\")*\})? [0-9.e+]+", line
        )
    assert 'caregrid_runs{state="failed",priority="routine"} 1' in answer.text
    assert 'caregrid_deliveries{state="parked"} 4' in answer.text
    for secret in ("943 476", "Ahmed", "RXH2026", *site.uids.values()):
        assert secret not in answer.text


def test_health_tells_when_the_database_is_gone(site, monkeypatch):
    client = TestClient(create_app(site.engine, site.folder, site.settings, site.actions))
    site.engine.dispose()
    (site.folder.parent.parent / "site.db").rename(site.folder.parent.parent / "gone.db")
    (site.folder.parent.parent / "site.db").mkdir()
    assert client.get("/health").status_code == 503


def test_static_files_name_no_other_server(app):
    client = TestClient(app)
    for name in ("nhsuk/nhsuk-frontend.min.css", "caregrid.css"):
        css = client.get(f"/static/{name}")
        assert css.status_code == 200
        assert "url(http" not in css.text
        assert "@font-face" not in css.text
        for icon in set(re.findall(r"url\((images/[^)]+)\)", css.text)):
            assert client.get(f"/static/nhsuk/{icon}").status_code == 200
    assert client.get("/static/../app.py").status_code == 404


def test_the_page_counts_no_more_queries_for_more_rows(site):
    import sqlalchemy as sa

    statements: list[str] = []
    sa.event.listen(site.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    views.worklist(site.engine, views.Filter())
    few = len(statements)
    views.story(site.engine, site.uids["accepted"])
    assert few <= 8
    assert len(statements) - few <= 16


def post_paths(app) -> list[str]:
    found: list[str] = []

    def walk(routes) -> None:
        for route in routes:
            if isinstance(route, APIRoute) and "POST" in (route.methods or ()):
                found.append(route.path)
            inner = getattr(getattr(route, "original_router", None), "routes", None)
            if inner:
                walk(inner)

    walk(app.routes)
    return sorted(set(found))


def check_headers(answer) -> None:
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
