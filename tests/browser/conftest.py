"""A site's pages on a real port, and Chromium in front of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from caregrid.store import users
from caregrid.web.app import create_app
from tests.support.browser import CHROMIUM, chromium, serving
from tests.support.site_factory import Site, make_site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not on this machine")
    with chromium() as started:
        yield started


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path)
    yield made
    made.engine.dispose()


@pytest.fixture
def address(site: Site) -> Iterator[str]:
    with serving(create_app(site.engine, site.folder, site.settings, site.actions)) as base:
        yield base


@pytest.fixture
def open_page(browser: Browser, address: str, site: Site) -> Iterator[Callable[..., Page]]:
    """open_page("clare", "/worklist"): a signed-in user's page. Options go to the browser context."""
    contexts: list[BrowserContext] = []

    def open_as(name: str, path: str, **options: object) -> Page:
        context = browser.new_context(base_url=address, **options)
        contexts.append(context)
        if name:
            token, _session = users.open_session(site.engine, name, 1)
            context.add_cookies([{"name": "caregrid", "value": token, "url": address}])
        page = context.new_page()
        page.goto(path.format(**site.uids))
        return page

    yield open_as
    for context in contexts:
        context.close()
