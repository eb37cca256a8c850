"""A clinician signs in, looks, and decides; with JavaScript and without."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from playwright.sync_api import expect

from caregrid.store.database import reading, writing
from caregrid.store.tables import review
from tests.support.site_factory import PASSWORD

pytestmark = pytest.mark.browser


def state_of(site, run_id):
    with reading(site.engine) as connection:
        return connection.execute(sa.select(review).where(review.c.run_id == run_id)).mappings().one()


@pytest.mark.parametrize("javascript", [True, False])
def test_accepts_a_result(open_page, site, javascript):
    page = open_page("", "/worklist", java_script_enabled=javascript)
    page.get_by_label("User name").fill("clare")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Worklist")).to_be_visible()
    first = page.get_by_role("row").nth(1)
    expect(first).to_contain_text("Emergency")
    first.get_by_role("link").click()
    expect(page.get_by_role("heading", name="BYRNE, Niamh (Mrs)")).to_be_visible()
    expect(page.get_by_text("AI result, not yet verified")).to_be_visible()
    picture = page.locator("img.nhsuk-image__img")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") == 512
    page.get_by_role("radio", name="Accept").check(force=True)
    page.get_by_role("button", name="Record decision").click()
    expect(page.get_by_text("You accepted the AI result")).to_be_visible()
    expect(page.get_by_text("AI result, not yet verified")).to_have_count(0)
    row = state_of(site, "run-urgent")
    assert (row["state"], row["decided_by"]) == ("accepted", "clare")


def test_rejecting_without_a_reason_leads_to_the_field(open_page, site):
    page = open_page("clare", "/studies/{waiting}")
    page.get_by_role("radio", name="Reject").check(force=True)
    page.get_by_role("button", name="Record decision").click()
    summary = page.get_by_role("alert").filter(has_text="There is a problem")
    expect(summary).to_be_visible()
    expect(page.locator(".nhsuk-error-summary")).to_be_focused()
    summary.get_by_role("link", name="Say why you reject the result").click()
    expect(page.get_by_label("Reason")).to_be_focused()
    assert state_of(site, "run-waiting")["state"] == "open"
    page.keyboard.type("The left lung is cut off")
    page.get_by_role("button", name="Record decision").click()
    expect(page.get_by_text("You rejected the AI result")).to_be_visible()
    assert state_of(site, "run-waiting")["reason"] == "The left lung is cut off"


def test_corrects_a_value(open_page, site):
    page = open_page("clare", "/studies/{waiting}")
    field = page.get_by_label("Volume, lung-left (ml)")
    expect(field).to_be_hidden()
    page.get_by_role("radio", name="Correct").check(force=True)
    expect(field).to_have_value("2410.5")
    field.fill("2295")
    page.get_by_label("Reason").fill("Leaks into the trachea")
    page.get_by_role("button", name="Record decision").click()
    expect(page.get_by_text("Your corrections were recorded")).to_be_visible()
    expect(page.get_by_text("(corrected; AI said 2,410.5)")).to_be_visible()
    assert state_of(site, "run-waiting")["corrections"] == {"lung-left": {"Volume": 2295.0}}


def test_without_javascript_the_fields_to_correct_are_there(open_page):
    page = open_page("clare", "/studies/{waiting}", java_script_enabled=False)
    expect(page.get_by_label("Volume, lung-left (ml)")).to_be_visible()
    expect(page.get_by_text("Fill these in only if you chose “Correct”.")).to_be_visible()


def test_the_worklist_updates_by_itself_and_can_be_stopped(open_page, site):
    page = open_page("clare", "/worklist")
    page.locator("#search").fill("half typed")
    with writing(site.engine) as connection:
        values = {"state": "accepted", "decided_by": "dr.elsewhere", "decided_at": "2026-11-24T10:00:00.000000+00:00"}
        connection.execute(review.update().where(review.c.run_id == "run-urgent").values(**values))
    expect(page.get_by_text("dr.elsewhere")).to_be_visible(timeout=15_000)
    expect(page.locator("#search")).to_have_value("half typed")
    expect(page.get_by_role("heading", name="Worklist")).to_have_count(1)
    page.get_by_role("link", name="stop updating by itself").click()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(6_000)
    assert [url for url in asked if "/worklist" in url] == []


def test_a_session_that_ends_leads_to_the_login_not_into_the_table(open_page, site):
    page = open_page("clare", "/worklist")
    page.context.clear_cookies()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible(timeout=15_000)


def test_five_wrong_passwords_lock_the_account(open_page):
    page = open_page("", "/login")
    for password in ["wrong password"] * 5 + [PASSWORD]:
        page.get_by_label("User name").fill("clare")
        page.get_by_label("Password").fill(password)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("the account is locked")
