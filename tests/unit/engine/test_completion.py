"""When a study is complete, and what late instances do."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from caregrid.domain.settings import CompletionPolicy, RequiredSeries
from caregrid.engine.completion import Completion, Facts, decide, policy_for, release, rerun
from caregrid.errors import DeliveryFailed, TransitionRefused
from caregrid.store.database import reading, writing
from caregrid.store.studies import study_row
from caregrid.store.tables import audit, study
from tests.support.rows import put_run, put_study, state_of

CT = {"modality": "CT", "series_description": "Chest 1.0", "number_of_instances": 20}


def facts(**changes: object) -> Facts:
    values: dict[str, object] = {"quiet_seconds": 60.0, "age_seconds": 90.0, "instances": 20, "series": (CT,)}
    return Facts(**(values | changes))  # type: ignore[arg-type]


POLICY = CompletionPolicy(quiet_seconds=30, ceiling_seconds=600)


def test_quiet_study_is_complete_with_evidence() -> None:
    decision = decide(POLICY, facts())
    assert decision.action == "complete"
    assert decision.evidence["instances"] == 20
    assert decision.evidence["quiet_seconds"] == 60.0


def test_not_quiet_yet_waits() -> None:
    assert decide(POLICY, facts(quiet_seconds=5.0)).action == "wait"


def test_missing_series_waits_until_the_ceiling_then_follows_the_policy() -> None:
    wants = (RequiredSeries({"Modality": "SR"}),)
    proceed = CompletionPolicy(required_series=wants, ceiling_seconds=600)
    hold = CompletionPolicy(required_series=wants, ceiling_seconds=600, at_ceiling="hold")
    assert decide(proceed, facts()).action == "wait"
    assert decide(proceed, facts(age_seconds=601.0)).action == "complete"
    held = decide(hold, facts(age_seconds=601.0))
    assert held.action == "hold"
    assert "Modality SR" in held.reason


def test_required_series_matches_with_wildcards_and_minimum() -> None:
    wants = (RequiredSeries({"Modality": "CT", "SeriesDescription": "chest*"}, minimum_instances=20),)
    assert decide(CompletionPolicy(required_series=wants), facts()).action == "complete"
    wants = (RequiredSeries({"SeriesDescription": "chest*"}, minimum_instances=21),)
    assert decide(CompletionPolicy(required_series=wants), facts()).action == "wait"


def test_expected_count_completes_early_and_holds_back() -> None:
    assert decide(POLICY, facts(quiet_seconds=3.0, expected=20)).action == "complete"
    assert decide(POLICY, facts(expected=21)).action == "wait"


def test_policy_of_the_sender_comes_before_the_general_one() -> None:
    general, ct = CompletionPolicy(), CompletionPolicy(source="CT*", quiet_seconds=5)
    assert policy_for((general, ct), "CT1") is ct
    assert policy_for((general, ct), "MR1") is general


def test_tick_closes_quiet_studies_once_and_judges_them(db: sa.Engine) -> None:
    put_study(db, "1.2.3", seconds_ago=100)
    put_study(db, "1.2.4", seconds_ago=1)
    closed: list[str] = []
    completion = Completion(db, (POLICY,), closed.append)
    assert completion.tick() == 1
    assert closed == ["1.2.3"]
    assert state_of(db, "1.2.3") == "complete"
    assert state_of(db, "1.2.4") == "receiving"


def test_study_that_cannot_be_judged_fails_visibly_and_the_next_goes_on(db: sa.Engine) -> None:
    put_study(db, "1.2.3", seconds_ago=100)
    put_study(db, "1.2.4", seconds_ago=100)
    judged: list[str] = []

    def judge(uid: str) -> None:
        if uid == "1.2.3":
            raise FileNotFoundError("/secret/path")
        judged.append(uid)

    Completion(db, (POLICY,), judge).tick()
    assert judged == ["1.2.4"]
    with reading(db) as connection:
        row = study_row(connection, "1.2.3")
    assert row["state"] == "failed"
    assert row["state_reason"] == "could not be judged: internal error FileNotFoundError"


def test_pacs_that_does_not_answer_is_as_if_not_asked(db: sa.Engine) -> None:
    put_study(db, "1.2.3", seconds_ago=100)

    def away(_destination: str, _uid: str) -> int | None:
        raise DeliveryFailed(destination="PACS", reason="refused")

    policy = CompletionPolicy(quiet_seconds=30, expected_from="PACS")
    assert Completion(db, (policy,), lambda _uid: None, away).tick() == 1


@pytest.mark.parametrize(("late", "state", "generation"), [("rerun", "receiving", 1), ("ask", "held", 1), ("ignore", "done", 0)])
def test_late_instances_follow_the_policy(db: sa.Engine, late: str, state: str, generation: int) -> None:
    put_study(db, "1.2.3", state="done", late_instances=2, seconds_ago=1)
    put_run(db, "1.2.3", "old", state="queued")
    Completion(db, (CompletionPolicy(late=late),), lambda _uid: None).tick()
    with reading(db) as connection:
        row = study_row(connection, "1.2.3")
        told = connection.scalars(sa.select(audit.c.why)).all()
    assert (row["state"], row["generation"], row["late_instances"]) == (state, generation, 0)
    assert any("late instances" in why for why in told)


def test_operator_releases_a_held_study(db: sa.Engine) -> None:
    put_study(db, "1.2.3", state="held")
    release(db, "1.2.3", True, "ann", "the localizer never comes")
    assert state_of(db, "1.2.3") == "complete"
    with pytest.raises(TransitionRefused):
        release(db, "1.2.3", True, "ann", "again")


def test_rerun_makes_a_new_generation_and_cancels_what_was_under_way(db: sa.Engine) -> None:
    put_study(db, "1.2.3", state="processing")
    put_run(db, "1.2.3", "old", state="running")
    rerun(db, "1.2.3", "ann", "new model")
    with reading(db) as connection:
        row = study_row(connection, "1.2.3")
        assert connection.scalar(sa.text("select state from run where workflow = 'old'")) == "cancelled"
    assert (row["state"], row["generation"]) == ("complete", 1)


def test_study_that_gets_an_instance_while_closing_stays_open(db: sa.Engine) -> None:
    put_study(db, "1.2.3", seconds_ago=100)
    completion = Completion(db, (POLICY,), lambda _uid: None)
    real = completion._facts

    def arrives_meanwhile(row: dict[str, object], policy: CompletionPolicy) -> Facts:
        with writing(db) as connection:
            connection.execute(study.update().values(last_received_at="2999-01-01T00:00:00.000000+00:00"))
        return real(row, policy)

    completion._facts = arrives_meanwhile  # type: ignore[method-assign]
    assert completion.tick() == 0
    assert state_of(db, "1.2.3") == "receiving"
