"""A site full of rows, and clients signed in to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from caregrid.store import users
from caregrid.web.app import create_app
from tests.support.site_factory import PASSWORD, Site, make_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.engine.dispose()


@pytest.fixture
def app(site: Site) -> FastAPI:
    return create_app(site.engine, site.folder, site.settings, site.actions)


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, follow_redirects=False)


@pytest.fixture
def signed_in(app: FastAPI, site: Site) -> Callable[[str], TestClient]:
    def sign_in(name: str) -> TestClient:
        # The password check is slow on purpose; only the tests of signing in go through it.
        token, _session = users.open_session(site.engine, name, 1)
        return TestClient(app, follow_redirects=False, cookies={"caregrid": token})

    return sign_in


def login(client: TestClient, name: str, password: str = PASSWORD, next_page: str = "/"):
    token = csrf(client.get("/login").text)
    return client.post("/login", data={"name": name, "password": password, "csrf": token, "next": next_page})


def csrf(html: str) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', html)
    assert found, "the page has no form token"
    return found[1]


def post(client: TestClient, path: str, page: str = "", **fields: str):
    """Post a form the way the page that holds it would."""
    return client.post(path, data={"csrf": csrf(client.get(page or "/account/password").text), **fields})
