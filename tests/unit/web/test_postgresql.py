"""The same pages on PostgreSQL: every query of the read models is understood there, and lists come in the same order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from caregrid.store import tables, users, views, views_operations
from caregrid.store.database import create_all, open_engine, reading, writing
from caregrid.web.app import create_app
from tests.support.postgres import new_database
from tests.support.site_factory import PASSWORD
from tests.unit.web.test_guard import PAGES

pytestmark = pytest.mark.network


@pytest.fixture
def on_postgresql(site, postgres_server):
    engine = open_engine(new_database(postgres_server))
    create_all(engine)
    with reading(site.engine) as source, writing(engine) as target:
        for table in tables.metadata.sorted_tables:
            rows = [dict(row) for row in source.execute(sa.select(table)).mappings()]
            if rows:
                target.execute(table.insert(), rows)
    yield replace(site, engine=engine)
    engine.dispose()


def test_every_page_opens(on_postgresql):
    site = on_postgresql
    users.set_roles(site.engine, "adam", ["admin", "clinician"], "adam", "to see everything")
    users.check_password(site.engine, "adam", PASSWORD)
    token, _session = users.open_session(site.engine, "adam", 1)
    app = create_app(site.engine, site.folder, site.settings, site.actions)
    client = TestClient(app, follow_redirects=False, cookies={"caregrid": token})
    filtered = ["/worklist?search=byrne", "/worklist?state=unasked", "/governance/audit?subject=run:", "/metrics", "/health"]
    for page in [*PAGES, *filtered]:
        assert client.get(page.format(**site.uids)).status_code == 200, page


def test_lists_come_in_the_same_order(on_postgresql, site):
    for state in ("", "waiting", "decided"):
        asked = views.Filter(state=state)
        here, there = views.worklist(site.engine, asked), views.worklist(on_postgresql.engine, asked)
        assert [row["study_instance_uid"] for row in here.items] == [row["study_instance_uid"] for row in there.items]
    assert [row["id"] for row in views_operations.runs(site.engine).items] == [
        row["id"] for row in views_operations.runs(on_postgresql.engine).items
    ]
    assert views_operations.destinations(site.engine, ["pacs"]) == views_operations.destinations(on_postgresql.engine, ["pacs"])
