"""The whole of it: a scanner sends, an algorithm runs, a clinician accepts in the browser, the result is in the PACS."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from playwright.sync_api import Browser, Page, expect

from caregrid.site import Site
from caregrid.store import users
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.scanner import Scanner, new_study
from tests.support.site import make_site, rows, running, settings_text, wait_for, workflow_text

pytestmark = [pytest.mark.browser, pytest.mark.network, pytest.mark.slow]

PASSWORD = "violet tractor seaside"


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    with Orthanc(tmp_path, aet="PACS") as server:
        yield server


@pytest.fixture
def real(tmp_path: Path, pacs: Orthanc) -> Iterator[Site]:
    settings = settings_text(pacs.dicom_port, dimse_port=free_port(), web_port=free_port())
    site = make_site(tmp_path / "site", settings, workflow_text(review=True))
    users.create_user(site.engine, "clare", PASSWORD, ["clinician"], "test", "for tests")
    users.create_user(site.engine, "oliver", PASSWORD, ["operator"], "test", "for tests")
    with running(site, "receiver", "supervisor", "worker", "web"):
        yield site


def sign_in(browser: Browser, site: Site, name: str) -> Page:
    page = browser.new_context(base_url=f"http://127.0.0.1:{site.settings.web.port}").new_page()
    page.goto("/login")
    page.get_by_label("User name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    return page


def test_a_study_from_scanner_to_decision_to_pacs(browser: Browser, real: Site, pacs: Orthanc) -> None:
    study = new_study(3)
    uid = study[0].StudyInstanceUID
    assert Scanner(real.settings.dimse.port).send(study) == [0, 0, 0]
    wait_for(lambda: rows(real, "select 1 from review where state = 'open'"), 60, "the review to open")
    assert pacs.instances(uid) == []

    page = sign_in(browser, real, "clare")
    page.get_by_role("row").nth(1).get_by_role("link").click()
    expect(page.get_by_text("AI result, not yet verified")).to_be_visible()
    expect(page.locator("img.nhsuk-image__img").first).to_be_visible()
    assert page.locator("img.nhsuk-image__img").first.evaluate("image => image.naturalWidth") > 0
    page.get_by_role("radio", name="Accept").check(force=True)
    page.get_by_role("button", name="Record decision").click()
    expect(page.get_by_text("You accepted the AI result")).to_be_visible()

    done = "select 1 from study where study_instance_uid = :uid and state = 'done'"
    wait_for(lambda: rows(real, done, uid=uid), 60, "the study done")
    sent = rows(real, "select sop_instance_uid from delivery where state = 'delivered'")
    there = [pydicom.dcmread(BytesIO(pacs.dicom(pacs.instances(row["sop_instance_uid"])[0]))) for row in sent]
    assert sorted(one.Modality for one in there) == ["OT", "SR"]
    (report,) = [one for one in there if one.Modality == "SR"]
    assert report.VerificationFlag == "VERIFIED"
    assert "clare" in str(report.VerifyingObserverSequence[0].VerifyingObserverName)

    page = sign_in(browser, real, "oliver")
    page.goto(f"/operations/studies/{uid}")
    for words in ("Evidence that the study was complete", "mean-value", "result accepted", "clare"):
        expect(page.get_by_text(words).first).to_be_visible()
    expect(page.get_by_text("Delivered", exact=True).first).to_be_visible()
