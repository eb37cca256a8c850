"""Who may read and write by DICOMweb: signed-in users who may see images, and named tokens."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Annotated

import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI
from starlette.testclient import TestClient

from caregrid.store import users
from caregrid.store.database import reading
from caregrid.store.tables import audit
from caregrid.web.app import create_app
from caregrid.web.auth import Principal, authorise_dicomweb

Who = Annotated[Principal, Depends(authorise_dicomweb)]


@pytest.fixture
def door(site):
    def extra(app: FastAPI) -> None:
        @app.get("/dicom-web/studies/{study}")
        def read(study: str, who: Who) -> dict[str, str]:
            return {"who": who.name}

        @app.post("/dicom-web/studies")
        def write(who: Who) -> dict[str, str]:
            return {"who": who.name}

    tokens = {"pacs": hashlib.sha256(b"open sesame").hexdigest()}
    settings = replace(site.settings, web=replace(site.settings.web, api_tokens=tokens))
    return create_app(site.engine, site.folder, settings, site.actions, extra)


def client_of(door, site, name):
    token, _session = users.open_session(site.engine, name, 1)
    return TestClient(door, follow_redirects=False, cookies={"caregrid": token})


def test_a_token_reads_and_writes(door):
    client = TestClient(door, headers={"Authorization": "Bearer open sesame"})
    assert client.get("/dicom-web/studies/1").json() == {"who": "token:pacs"}
    assert client.post("/dicom-web/studies").json() == {"who": "token:pacs"}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer open", "Basic open sesame", "Bearer open sesame2"])
def test_anybody_else_is_asked_to_sign_in(door, header):
    client = TestClient(door, headers={"Authorization": header} if header else {}, follow_redirects=False)
    for answer in (client.get("/dicom-web/studies/1"), client.post("/dicom-web/studies")):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_signed_in_user_only_reads_and_the_reading_is_audited_once(door, site):
    client = client_of(door, site, "clare")
    for _ in range(3):
        assert client.get("/dicom-web/studies/1.2.3").json() == {"who": "clare"}
    assert client.post("/dicom-web/studies").status_code == 401
    with reading(site.engine) as connection:
        query = sa.select(audit.c.who).where(audit.c.subject == "study:1.2.3", audit.c.what == "viewed study")
        assert connection.execute(query).scalars().all() == ["clare"]


def test_a_user_who_may_not_see_images_is_refused(door, site):
    assert client_of(door, site, "grace").get("/dicom-web/studies/1.2.3").status_code == 403


def test_without_dicomweb_there_is_no_link_to_the_viewer(site):
    settings = replace(site.settings, web=replace(site.settings.web, dicomweb=False))
    for given, shown in ((settings, False), (site.settings, True)):
        client = client_of(create_app(site.engine, site.folder, given, site.actions), site, "clare")
        assert ("Open images in viewer" in client.get(f"/studies/{site.uids['waiting']}").text) == shown
