"""An operator finds what is stuck and puts it on its way."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from caregrid.store import views_operations

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("javascript", [True, False])
def test_resends_a_parked_delivery(open_page, site, javascript):
    page = open_page("oliver", "/operations", java_script_enabled=javascript)
    page.get_by_role("link", name="parked deliveries").click()
    page.get_by_role("link", name="archive").click()
    expect(page.get_by_text("Resend all 4")).to_be_visible()
    first = views_operations.parked_ids(site.engine, "archive")[0]
    page.get_by_role("button", name=f"Resend delivery {first}", exact=True).click()
    page.get_by_role("link", name="Say why. It is kept in the audit log").click()
    page.get_by_label("Why are they sent again?").fill("The archive is back")
    page.get_by_role("button", name=f"Resend delivery {first}", exact=True).click()
    expect(page.get_by_text("Queued to be sent again")).to_be_visible()
    expect(page.get_by_text("Resend all 3")).to_be_visible()
    assert site.log == [("resent delivery", first, "oliver", "The archive is back")]


def test_allows_a_sender_that_was_turned_away(open_page, site):
    page = open_page("oliver", "/operations/rejections")
    page.get_by_role("link", name="Allow this sender MR_NEW").click()
    expect(page.get_by_label("Calling AE title")).to_have_value("MR_NEW")
    page.get_by_label("Why is it allowed?").fill("New scanner in room 4")
    page.get_by_role("button", name="Allow this sender").click()
    expect(page.get_by_text("The sender is allowed from now on")).to_be_visible()
    expect(page.get_by_text("Now allowed")).to_be_visible()


def test_retries_a_failed_run_from_the_study_s_story(open_page, site):
    page = open_page("oliver", "/operations/studies/{failed}")
    expect(page.get_by_text("did not finish in 300 s and was stopped")).to_be_visible()
    page.locator("main").get_by_role("link", name="ct-chest").first.click()
    page.get_by_label("Why is it retried?").fill("More memory")
    page.get_by_role("button", name="Retry run").click()
    expect(page.get_by_text("The run is queued again")).to_be_visible()


def test_a_clinician_sees_no_way_in_and_is_refused(open_page):
    page = open_page("clare", "/worklist")
    expect(page.get_by_role("link", name="Operations")).to_have_count(0)
    answer = page.goto("/operations")
    assert answer.status == 403
    expect(page.get_by_role("heading", name="You cannot do that")).to_be_visible()
