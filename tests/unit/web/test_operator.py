"""The operator's and the administrator's forms do what they say, with who and why."""

from __future__ import annotations

import sqlalchemy as sa

from caregrid.store import views_operations
from caregrid.store.database import reading, writing
from caregrid.store.tables import audit, delivery, run, study
from tests.support.site_factory import digest
from tests.unit.web.conftest import login, post


def state_of(site, table, where):
    with reading(site.engine) as connection:
        return connection.execute(sa.select(table.c.state).where(where)).scalars().all()


def test_a_failed_run_is_retried_with_a_reason(signed_in, site):
    oliver = signed_in("oliver")
    page = "/operations/runs/run-failed"
    refused = post(oliver, f"{page}/retry", page, reason="")
    assert refused.status_code == 422
    assert 'href="#retry">Say why' in refused.text
    assert state_of(site, run, run.c.id == "run-failed") == ["failed"]
    assert post(oliver, f"{page}/retry", page, reason="GPU driver was updated").status_code == 303
    assert state_of(site, run, run.c.id == "run-failed") == ["queued"]
    assert site.log == [("retried run", "run-failed", "oliver", "GPU driver was updated")]
    assert "The run is queued again" in oliver.get(f"{page}?done=retry").text


def test_a_change_the_state_table_forbids_is_told(signed_in, site):
    oliver = signed_in("oliver")
    answer = post(oliver, "/operations/runs/run-cancelled/cancel", "/operations/runs", reason="again")
    assert answer.status_code == 409
    assert "A run that is cancelled cannot become cancelled" in answer.text


def test_unknown_verbs_and_runs_are_not_found(signed_in):
    oliver = signed_in("oliver")
    assert post(oliver, "/operations/runs/run-failed/explode", reason="x").status_code == 404
    assert post(oliver, "/operations/runs/none/retry", reason="x").status_code == 404


def test_parked_deliveries_are_resent_one_or_all(signed_in, site):
    oliver = signed_in("oliver")
    page = "/operations/destinations/archive"
    first, *rest = views_operations.parked_ids(site.engine, "archive")
    assert post(oliver, f"{page}/resend", page, one=str(first), reason="").status_code == 422
    assert post(oliver, f"{page}/resend", page, one=str(first), reason="archive is back").status_code == 303
    assert views_operations.parked_ids(site.engine, "archive") == rest
    assert post(oliver, f"{page}/resend", page, one=str(first), reason="again").status_code == 404
    assert post(oliver, f"{page}/resend", page, reason="the rest").status_code == 303
    assert views_operations.parked_ids(site.engine, "archive") == []
    assert "parked" not in state_of(site, delivery, delivery.c.destination == "archive")


def test_echo_tells_what_the_destination_said(signed_in):
    oliver = signed_in("oliver")
    assert "0000 Success in 12 ms" in post(oliver, "/operations/destinations/pacs/echo").text
    assert (
        "could not be reached or is out of resources: connection refused"
        in post(oliver, "/operations/destinations/archive/echo").text
    )
    assert post(oliver, "/operations/destinations/none/echo").status_code == 404


def test_a_held_study_is_released_or_cancelled(signed_in, site):
    oliver = signed_in("oliver")
    uid = site.uids["held"]
    page = f"/operations/held/{uid}"
    assert post(oliver, page, page, choice="", reason="x").status_code == 422
    assert post(oliver, page, page, choice="proceed", reason="").status_code == 422
    assert post(oliver, page, page, choice="proceed", reason="the scanner says that is all").status_code == 303
    assert state_of(site, study, study.c.study_instance_uid == uid) == ["complete"]
    assert "not held any more" in oliver.get(page).text


def test_a_sender_is_allowed_after_its_address_was_checked(signed_in, site):
    oliver = signed_in("oliver")
    page = "/operations/rejections/allow?calling_ae=MR_NEW&address=10.9.8.7"
    assert 'value="MR_NEW"' in oliver.get(page).text
    for bad in (
        {"calling_ae": "*"},
        {"calling_ae": "x" * 17},
        {"calling_ae": ""},
        {"address": "10.9.8.999"},
        {"address": ""},
        {"reason": ""},
    ):
        fields = {"calling_ae": "MR_NEW", "address": "10.9.8.7", "reason": "new scanner", **bad}
        assert post(oliver, "/operations/rejections/allow", page, **fields).status_code == 422, bad
    fields = {"calling_ae": "MR_NEW", "address": "10.9.8.7", "reason": "new scanner"}
    assert post(oliver, "/operations/rejections/allow", page, **fields).status_code == 303
    html = oliver.get("/operations/rejections").text
    assert "Now allowed" in html
    assert "new scanner" in html


def test_the_story_tells_arrival_verdicts_runs_results_deliveries_and_audit(signed_in, site):
    html = signed_in("oliver").get(f"/operations/studies/{site.uids['accepted']}").text
    for words in (
        "CT_SCANNER_1 to CAREGRID (10.2.3.4)",
        "Quiet seconds",
        "No series has Modality MR",
        "BodyPartExamined in CHEST, THORAX: yes",
        "algorithm itself 12 seconds",
        digest("1.2.0")[:12],
        "Attribute InstitutionName is empty",
        "0000 Success",
        "connection refused",
        "workflow ct-chest applies",
        "Are the lungs outlined correctly?",
    ):
        assert words in html, words


def test_why_nothing_ran_is_on_the_page(signed_in, site):
    html = signed_in("oliver").get(f"/operations/studies/{site.uids['nothing']}").text
    assert "No series has BodyPartExamined CHEST" in html
    assert "No run." in html


def test_a_model_shows_its_card_and_the_state_of_its_signature(signed_in):
    oliver = signed_in("oliver")
    html = oliver.get(f"/operations/models/{digest('1.2.0')}").text
    assert "Dice 0.97" in html
    assert "hospital AI board" in html
    assert "Not signed" in oliver.get(f"/operations/models/{digest('1.3.0')}").text


def test_an_altered_audit_log_is_shown_as_such(signed_in, site):
    grace = signed_in("grace")
    assert "Chain holds" in grace.get("/governance/audit?verify=1").text
    with writing(site.engine) as connection:
        connection.execute(audit.update().where(audit.c.seq == 5).values(why="nothing to see"))
    html = grace.get("/governance/audit?verify=1").text
    assert "The audit log was altered" in html
    assert "at record 5" in html


def test_the_audit_log_filters(signed_in, site):
    html = signed_in("grace").get("/governance/audit?subject=run:run-failed&who=engine").text
    assert "Records (1)" in html
    assert "No record matches" in signed_in("grace").get("/governance/audit?who=nobody").text


def test_an_admin_adds_a_user_and_changes_them(signed_in, client):
    adam = signed_in("adam")
    page = "/admin/users/new"
    form = {"name": "ann", "full_name": "Ann Lee", "roles": "operator", "password": "violet tractor seaside", "reason": "joined"}
    assert post(adam, page, page, **{**form, "reason": ""}).status_code == 422
    assert post(adam, page, page, **{**form, "password": "short"}).status_code == 422
    assert post(adam, page, page, **form).status_code == 303
    assert login(client, "ann", "violet tractor seaside").status_code == 303
    assert client.get("/operations").status_code == 200
    assert post(adam, "/admin/users/ann/roles", "/admin/users/ann", roles="clinician", reason="moved").status_code == 303
    assert client.get("/operations").status_code == 403
    assert post(adam, "/admin/users/ann/active", "/admin/users/ann", active="no", reason="left").status_code == 303
    assert client.get("/worklist").status_code == 303


def test_an_admin_cannot_lock_themself_out(signed_in):
    adam = signed_in("adam")
    assert post(adam, "/admin/users/adam/active", "/admin/users", active="no", reason="x").status_code == 422
    assert post(adam, "/admin/users/adam/roles", "/admin/users", roles="clinician", reason="x").status_code == 422
    assert adam.get("/admin/users").status_code == 200
