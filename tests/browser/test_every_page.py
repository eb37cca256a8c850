"""Every page: no accessibility violation, no foreign request, no policy breach, no overflow, nothing from a name runs."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.support.site_factory import digest

pytestmark = pytest.mark.browser

PAGES = {
    "": ["/login", "/login?done=password"],
    "clare": [
        "/worklist",
        "/worklist?search=nobody",
        "/studies/{waiting}",
        "/studies/{accepted}?done=accepted",
        "/studies/{corrected}",
        "/studies/{nothing}",
        "/studies/{canary}",
        "/account/password",
        "/operations",
        "/nothing/here",
    ],
    "oliver": [
        "/operations",
        "/operations/studies",
        "/operations/studies/{accepted}",
        "/operations/studies/{canary}",
        "/operations/runs",
        "/operations/runs/run-failed",
        "/operations/destinations",
        "/operations/destinations/archive",
        "/operations/held",
        "/operations/held/{held}",
        "/operations/rejections",
        "/operations/rejections/allow",
        "/operations/quarantine",
        "/operations/workflows",
        "/operations/models",
        f"/operations/models/{digest('1.2.0')}",
        "/operations/notifications",
    ],
    "adam": ["/governance/audit?verify=1", "/governance/access", "/admin/users", "/admin/users/new", "/admin/users/clare"],
}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_no_accessibility_violation_and_no_overflow(open_page, site, name, width):
    axe, found = Axe(), []
    # The audit script itself needs a page without our policy; the policy is judged in the test below.
    page = open_page(name, "/login", bypass_csp=True, viewport={"width": width, "height": 900})
    for path in PAGES[name]:
        page.goto(path.format(**site.uids))
        for details in page.locator("details").all():
            details.evaluate("one => { one.open = true }")
        for one in axe.run(page).response["violations"]:
            found.append((path, one["id"], [node["html"][:200] for node in one["nodes"]]))
        if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
            found.append((path, "wider than the screen", []))
    assert found == []


def test_forms_with_errors_are_accessible_too(open_page, site):
    axe = Axe()
    page = open_page("clare", "/studies/{waiting}", bypass_csp=True)
    page.get_by_role("radio", name="Correct").check(force=True)
    page.get_by_label("Volume, lung-left (ml)").fill("much")
    page.get_by_role("button", name="Record decision").click()
    assert page.locator(".nhsuk-error-summary a").count() == 2
    assert [one["id"] for one in axe.run(page).response["violations"]] == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_foreign_nothing_inline_nothing_injected(open_page, site, address, name):
    page = open_page(name, "/login")
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append("dialog"))
    for path in PAGES[name]:
        answer = page.goto(path.format(**site.uids))
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert page.evaluate("window.canary") is None
        page.wait_for_load_state("networkidle")
    assert [url for url in requests if not url.startswith(f"{address}/")] == []
    # A page answered with 403 or 404 is itself reported by the browser; nothing else may be.
    assert [text for text in complaints if "the server responded with a status of 40" not in text] == []


def test_the_policy_stops_inline_script(open_page):
    page = open_page("clare", "/worklist")
    page.evaluate("""() => {
        const script = document.createElement('script'); script.textContent = 'window.ran = 1'; document.body.append(script)
        document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.ran = 1">')
    }""")
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
