"""The clinician's decision: what is taken, what is sent back, and what is recorded."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.tables import finding, result, review
from caregrid.web import _words
from caregrid.web.pages_clinician import parse_value
from tests.support.site_factory import secondary_capture
from tests.unit.web.conftest import post

VOLUME = {"concept": ["118565006", "SCT", "Volume"], "value": 2410.5, "unit": ["ml", "UCUM", "ml"]}
DENSITY = {"concept": ["112031", "DCM", "Attenuation"], "value": -812.0, "unit": ["[hnsf'U]", "UCUM", "Hounsfield unit"]}


def seen(html: str) -> str:
    return html.split('name="seen" value="')[1].split('"')[0]


def send(client, site, key="waiting", **fields):
    uid = site.uids[key]
    page = f"/studies/{uid}"
    fields = {"seen": seen(client.get(page).text), **fields}
    return post(client, f"{page}/reviews/run-{key}/check", page, **fields)


def decided(site, key="waiting"):
    with reading(site.engine) as connection:
        return connection.execute(sa.select(review).where(review.c.run_id == f"run-{key}")).mappings().one()


def test_accept(signed_in, site):
    clare = signed_in("clare")
    answer = send(clare, site, decision="accepted")
    assert answer.headers["location"].endswith("?done=accepted")
    assert "You accepted the AI result" in clare.get(answer.headers["location"]).text
    row = decided(site)
    assert (row["state"], row["decided_by"]) == ("accepted", "clare")
    assert row["first_viewed_at"] < row["decided_at"]


@pytest.mark.parametrize(
    ("fields", "words", "link"),
    [
        ({}, "Choose whether you accept, reject or correct the result", "#decision"),
        ({"decision": "maybe"}, "Choose whether you accept, reject or correct the result", "#decision"),
        ({"decision": "rejected"}, "Say why you reject the result", "#reason"),
        ({"decision": "rejected", "reason": "   "}, "Say why you reject the result", "#reason"),
        ({"decision": "corrected", "value-0-0": "12"}, "Say why you correct the result", "#reason"),
        ({"decision": "corrected", "reason": "leak"}, "Change at least one value", "#corrections"),
        ({"decision": "corrected", "reason": "leak", "value-0-0": "big"}, "Volume must be a number, like 2410.5", "#value-0-0"),
        ({"decision": "corrected", "reason": "leak", "value-0-0": "-1"}, "Volume cannot be less than 0", "#value-0-0"),
        ({"decision": "corrected", "reason": "leak", "value-0-0": "nan"}, "Volume must be a finite number", "#value-0-0"),
        ({"decision": "accepted", "reason": "x" * 2001}, "The reason must have at most 2,000 characters", "#reason"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_recorded(signed_in, site, fields, words, link):
    answer = send(signed_in("clare"), site, **fields)
    assert answer.status_code == 422
    assert f'href="{link}">{words}' in answer.text
    assert f'id="{link[1:]}"' in answer.text
    assert "<title>Error: " in answer.text
    assert decided(site)["state"] == "open"
    assert site.log == []


def test_what_was_typed_is_still_there_after_an_error(signed_in, site):
    answer = send(signed_in("clare"), site, decision="corrected", reason="leak <b>", **{"value-0-0": "2x"})
    assert 'value="2x"' in answer.text
    assert "leak &lt;b&gt;" in answer.text
    assert 'value="corrected" aria-describedby="decision-3-hint" checked' in answer.text


def test_only_changed_values_are_corrections(signed_in, site):
    answer = send(
        signed_in("clare"), site, decision="corrected", reason="leak",
        **{"value-0-0": "2,295.5", "value-0-1": "-812", "value-1-0": "2893.25", "value-1-1": "-790"},
    )  # fmt: skip
    assert answer.status_code == 303
    expected = {"lung-left": {"Volume": 2295.5}, "lung-right": {"Attenuation Coefficient": -790.0}}
    assert site.log == [("decide", "run-waiting", "corrected", "clare", "leak", expected)]


def test_the_corrected_value_is_shown_beside_what_the_ai_said(signed_in, site):
    html = signed_in("clare").get(f"/studies/{site.uids['corrected']}").text
    assert "2,295 ml" in html
    assert "AI said 2,410.5" in html


def test_a_result_that_changed_meanwhile_is_not_decided_on(signed_in, site):
    clare = signed_in("clare")
    page = f"/studies/{site.uids['waiting']}"
    was = seen(clare.get(page).text)
    with writing(site.engine) as connection:
        connection.execute(
            finding.update().where(finding.c.run_id == "run-waiting").values(content={"measurements": [], "concept": None})
        )
    answer = post(clare, f"{page}/reviews/run-waiting/check", "/account/password", seen=was, decision="accepted")
    assert answer.status_code == 409
    assert "The result changed after the page was opened" in answer.text
    assert decided(site)["state"] == "open"


def test_a_second_decision_is_refused_with_who_took_the_first(signed_in, site):
    clare = signed_in("clare")
    page = f"/studies/{site.uids['waiting']}"
    was = seen(clare.get(page).text)
    assert send(clare, site, decision="accepted").status_code == 303
    again = post(clare, f"{page}/reviews/run-waiting/check", page, seen=was, decision="rejected", reason="no")
    assert again.status_code == 409
    assert "already decided: accepted by clare" in again.text


def test_only_the_roles_a_review_names_may_decide(signed_in, site):
    with writing(site.engine) as connection:
        connection.execute(review.update().where(review.c.run_id == "run-waiting").values(roles=["governance"]))
    clare = signed_in("clare")
    html = clare.get(f"/studies/{site.uids['waiting']}").text
    assert "Record decision" not in html
    assert "Waiting for a decision by: governance" in html
    assert decided(site)["first_viewed_at"] is None


def test_time_to_decision_counts_from_the_first_view_by_someone_who_may_decide(signed_in, site):
    signed_in("oliver").get(f"/studies/{site.uids['waiting']}")
    assert decided(site)["first_viewed_at"] is None
    clare = signed_in("clare")
    clare.get(f"/studies/{site.uids['waiting']}")
    first = decided(site)["first_viewed_at"]
    assert first is not None
    clare.get(f"/studies/{site.uids['waiting']}")
    assert decided(site)["first_viewed_at"] == first


def test_who_looked_is_audited_once_a_session_and_study(signed_in, site):
    clare = signed_in("clare")
    for _ in range(3):
        clare.get(f"/studies/{site.uids['waiting']}")
    signed_in("clare").get(f"/studies/{site.uids['waiting']}")
    signed_in("oliver").get(f"/operations/studies/{site.uids['waiting']}")
    subject = f"study:{site.uids['waiting']}"
    query = sa.select(audit.audit.c.who).where(audit.audit.c.subject == subject, audit.audit.c.what == "viewed study")
    with reading(site.engine) as connection:
        assert sorted(connection.execute(query).scalars()) == ["clare", "clare", "oliver"]
        audit.verify(connection)


def test_unverified_results_say_so(signed_in, site):
    clare = signed_in("clare")
    assert "AI result, not yet verified" in clare.get(f"/studies/{site.uids['waiting']}").text
    assert "no clinician has accepted it" in clare.get(f"/studies/{site.uids['unasked']}").text
    assert "A clinician looked at it and rejected it" in clare.get(f"/studies/{site.uids['rejected']}").text
    assert "not yet verified" not in clare.get(f"/studies/{site.uids['accepted']}").text


def test_withdraw_needs_a_reason_and_marks_the_result(signed_in, site):
    clare = signed_in("clare")
    page = f"/studies/{site.uids['accepted']}"
    refused = post(clare, f"{page}/withdraw/run-accepted", page, reason="")
    assert refused.status_code == 422
    assert "Say why the result is withdrawn" in refused.text
    assert post(clare, f"{page}/withdraw/run-waiting", page, reason="wrong patient").status_code == 404
    assert post(clare, f"{page}/withdraw/run-accepted", page, reason="wrong patient").status_code == 303
    assert "This result was withdrawn" in clare.get(page).text


def test_the_picture_is_the_secondary_capture_pixel_for_pixel(signed_in, site):
    clare = signed_in("clare")
    html = clare.get(f"/studies/{site.uids['waiting']}").text
    address = html.split('<img class="nhsuk-image__img" src="')[1].split('"')[0]
    answer = clare.get(address)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cache-control"] == "no-store"
    shown = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.array_equal(shown, pydicom.dcmread(io.BytesIO(secondary_capture())).pixel_array)
    assert signed_in("grace").get(address).status_code == 403
    other = address.replace(site.uids["waiting"], site.uids["accepted"], 1)
    assert clare.get(other).status_code == 404


@pytest.mark.parametrize("path", ["../../site.db", "/etc/passwd", "results/none.dcm"])
def test_a_picture_never_leaves_the_store(signed_in, site, path):
    uid = site.uids["waiting"]
    with writing(site.engine) as connection:
        connection.execute(result.update().where(result.c.study_instance_uid == uid).values(path=path))
        sop = connection.execute(
            sa.select(result.c.sop_instance_uid).where(result.c.study_instance_uid == uid, result.c.kind == "dicom_sc")
        ).scalar_one()
    assert signed_in("clare").get(f"/studies/{uid}/pictures/{sop}.png").status_code == 404


@given(st.text(max_size=40))
def test_any_text_is_a_value_or_an_error(given_text):
    for measured in (VOLUME, DENSITY):
        value, error = parse_value(given_text.strip(), measured)
        assert (value is None) != (error == "")
        assert value is None or abs(value) <= 1e9
        assert not (measured is VOLUME and value is not None and value < 0)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6))
def test_a_shown_value_reads_back(value):
    back, error = parse_value(_words.plain(value), DENSITY)
    assert error == ""
    assert back == pytest.approx(value, abs=0.0051, rel=0.06)
