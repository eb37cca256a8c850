"""When a study is complete: quiet time, named series, expected count, and a hard ceiling. The evidence is recorded."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from caregrid.domain.settings import CompletionPolicy
from caregrid.errors import CaregridError, DeliveryFailed, TransitionRefused
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.studies import OPEN_STATES, move_run, move_study, study_row
from caregrid.store.tables import now, run, series, study

#: Asks a destination how many instances it holds of a study (C-FIND); None when it does not say.
ExpectedCount = Callable[[str, str], int | None]

_SERIES_COLUMNS = {
    "Modality": "modality",
    "SeriesDescription": "series_description",
    "BodyPartExamined": "body_part_examined",
    "StationName": "station_name",
    "SeriesNumber": "series_number",
}


@dataclass(frozen=True)
class Facts:
    """What is known of an open study. Times in seconds; series: column name → value and number_of_instances."""

    quiet_seconds: float
    age_seconds: float
    instances: int
    series: tuple[dict[str, Any], ...]
    expected: int | None = None


@dataclass(frozen=True)
class Decision:
    """wait, complete or hold, with the reason in words and the evidence as kept."""

    action: str
    reason: str
    evidence: dict[str, Any]


def policy_for(policies: Sequence[CompletionPolicy], calling_ae: str) -> CompletionPolicy:
    """The first policy whose source matches the sender; ``*`` matches all and is always there."""
    exact = [policy for policy in policies if policy.source != "*" and fnmatch.fnmatchcase(calling_ae, policy.source)]
    return (exact or [policy for policy in policies if policy.source == "*"] or [CompletionPolicy()])[0]


def decide(policy: CompletionPolicy, facts: Facts) -> Decision:
    """Judge one open study by its policy. Pure."""
    missing = [_words(want.match) for want in policy.required_series if not _has(facts, want.match, want.minimum_instances)]
    short = facts.expected is not None and facts.instances < facts.expected
    evidence: dict[str, Any] = {
        "quiet_seconds": round(facts.quiet_seconds, 1),
        "quiet_needed": policy.quiet_seconds,
        "instances": facts.instances,
        "expected": facts.expected,
        "required_series_missing": missing,
        "policy_source": policy.source,
    }
    quiet = facts.quiet_seconds >= policy.quiet_seconds
    # An agreed count is proof by itself: no need to sit out the whole quiet time.
    counted = facts.expected is not None and not short and facts.quiet_seconds >= min(policy.quiet_seconds, 2.0)
    if (quiet or counted) and not missing and not short:
        return Decision(
            "complete", "all expected instances are here" if counted else "no instance came for the quiet time", evidence
        )
    if facts.age_seconds >= policy.ceiling_seconds:
        action = "complete" if policy.at_ceiling == "proceed" else "hold"
        lacking = f"required series missing: {'; '.join(missing)}" if missing else "instances still expected or arriving"
        return Decision(
            action, f"the ceiling of {policy.ceiling_seconds:g} s was reached; {lacking}", evidence | {"ceiling": True}
        )
    return Decision("wait", "waiting for instances", evidence)


def _has(facts: Facts, match: dict[str, str], minimum: int) -> bool:
    return any(each["number_of_instances"] >= minimum and _matches(each, match) for each in facts.series)


def _matches(row: dict[str, Any], match: dict[str, str]) -> bool:
    return all(
        fnmatch.fnmatch(str(row.get(_SERIES_COLUMNS.get(keyword, keyword)) or "").lower(), wanted.lower())
        for keyword, wanted in match.items()
    )


def _words(match: dict[str, str]) -> str:
    return ", ".join(f"{keyword} {value}" for keyword, value in match.items())


def _seconds_since(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


class Completion:
    """Watches open studies and late instances. ``closed`` is called with a study that became complete, once per generation."""

    def __init__(
        self,
        engine: sa.Engine,
        policies: Sequence[CompletionPolicy],
        closed: Callable[[str], object],
        expected_count: ExpectedCount | None = None,
    ) -> None:
        self.engine, self.policies = engine, policies
        self.closed, self.expected_count = closed, expected_count
        self._asked: dict[str, tuple[int, float]] = {}

    def tick(self) -> int:
        """Look at every open study once; returns how many were closed."""
        self._take_late()
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(study).where(study.c.state == "receiving")).mappings().all()
        closed = sum(self._look(dict(row)) for row in rows)
        with reading(self.engine) as connection:
            # A crash between closing and judging leaves "complete" behind; judging is repeatable.
            waiting = connection.scalars(sa.select(study.c.study_instance_uid).where(study.c.state == "complete")).all()
        for uid in waiting:
            self._judge(uid)
        return closed

    def _judge(self, uid: str) -> None:
        try:
            self.closed(uid)
        except sa.exc.SQLAlchemyError:
            raise
        except Exception as error:  # one study's surprise must not stop the line; it is failed, visibly, and can be run again
            reason = error.message if isinstance(error, CaregridError) else f"internal error {type(error).__name__}"
            with writing(self.engine) as connection:
                if study_row(connection, uid)["state"] == "complete":
                    move_study(connection, uid, "failed", who="caregrid", why=f"could not be judged: {reason}")

    def _look(self, row: dict[str, Any]) -> bool:
        policy = policy_for(self.policies, row["calling_ae"])
        if _seconds_since(row["last_received_at"]) < min(policy.quiet_seconds, 2.0):
            return False
        decision = decide(policy, self._facts(row, policy))
        if decision.action == "wait":
            return False
        return self._close(row, decision)

    def _close(self, row: dict[str, Any], decision: Decision) -> bool:
        uid = row["study_instance_uid"]
        with writing(self.engine) as connection:
            fresh = study_row(connection, uid)
            if fresh["state"] != "receiving" or fresh["last_received_at"] != row["last_received_at"]:
                return False
            new = "complete" if decision.action == "complete" else "held"
            move_study(
                connection, uid, new, who="caregrid", why=decision.reason, completed_at=now(), completion=decision.evidence
            )
        return new == "complete"

    def _facts(self, row: dict[str, Any], policy: CompletionPolicy) -> Facts:
        uid = row["study_instance_uid"]
        with reading(self.engine) as connection:
            found = connection.execute(sa.select(series).where(series.c.study_instance_uid == uid)).mappings().all()
        return Facts(
            quiet_seconds=_seconds_since(row["last_received_at"]),
            age_seconds=_seconds_since(row["opened_at"] or row["first_received_at"]),
            instances=row["number_of_instances"],
            series=tuple(dict(each) for each in found),
            expected=self._expected(uid, policy, row["number_of_instances"]),
        )

    def _expected(self, uid: str, policy: CompletionPolicy, instances: int) -> int | None:
        if not policy.expected_from or self.expected_count is None:
            return None
        # Ask again only when something changed or ten seconds have passed: the PACS is busy too.
        asked_at_count, asked_at = self._asked.get(uid, (-1, 0.0))
        moment = datetime.now(UTC).timestamp()
        if asked_at_count == instances and moment - asked_at < 10:
            with reading(self.engine) as connection:
                return study_row(connection, uid)["expected_instances"]
        self._asked[uid] = (instances, moment)
        try:
            expected = self.expected_count(policy.expected_from, uid)
        except DeliveryFailed:
            expected = None
        with writing(self.engine) as connection:
            connection.execute(study.update().where(study.c.study_instance_uid == uid).values(expected_instances=expected))
        return expected

    def _take_late(self) -> None:
        query = sa.select(study).where(study.c.late_instances > 0, study.c.state.not_in(OPEN_STATES))
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        for row in rows:
            self._late(dict(row), policy_for(self.policies, row["calling_ae"]).late)

    def _late(self, row: dict[str, Any], policy: str) -> None:
        uid = row["study_instance_uid"]
        with writing(self.engine) as connection:
            row = study_row(connection, uid)
            count = row["late_instances"]
            if count == 0 or row["state"] in OPEN_STATES:
                return
            if policy == "ignore":
                connection.execute(study.update().where(study.c.study_instance_uid == uid).values(late_instances=0))
                why = f"{count} late instances kept and, by policy, not run again"
                audit.append(connection, who="caregrid", what="late instances ignored", subject=f"study:{uid}", why=why)
                return
            why = f"{count} late instances came after completion"
            opened = {"late_instances": 0, "generation": row["generation"] + 1, "opened_at": now()}
            move_study(connection, uid, "receiving", who="caregrid", why=why, **opened)
            cancel_current_runs(connection, row, f"superseded: {why}")
            if policy == "ask":
                move_study(connection, uid, "held", who="caregrid", why=f"{why}; an operator decides")


def cancel_current_runs(connection: sa.Connection, row: dict[str, Any], why: str) -> None:
    """Cancel what is still under way for the study's present generation."""
    query = sa.select(run.c.id).where(
        run.c.study_instance_uid == row["study_instance_uid"],
        run.c.generation == row["generation"],
        run.c.state.in_(("queued", "running", "awaiting-review")),
    )
    for key in list(connection.scalars(query)):
        move_run(connection, key, "cancelled", who="caregrid", why=why)


def release(engine: sa.Engine, study_instance_uid: str, proceed: bool, who: str, why: str) -> None:
    """An operator's word on a held study: go on with what is there, or close it without a run."""
    with writing(engine) as connection:
        row = study_row(connection, study_instance_uid)
        if row["state"] != "held":
            raise TransitionRefused(thing="study", old=row["state"], new="complete" if proceed else "cancelled")
        new = "complete" if proceed else "cancelled"
        evidence = (row["completion"] or {}) | {"released_by": who}
        move_study(connection, study_instance_uid, new, who=who, why=why, completed_at=now(), completion=evidence)


def rerun(engine: sa.Engine, study_instance_uid: str, who: str, why: str) -> None:
    """Judge and run a closed study again as a new generation; new results get new UIDs."""
    with writing(engine) as connection:
        row = study_row(connection, study_instance_uid)
        if row["state"] in OPEN_STATES:
            raise TransitionRefused(thing="study", old=row["state"], new="complete")
        move_study(connection, study_instance_uid, "receiving", who=who, why=why, generation=row["generation"] + 1)
        cancel_current_runs(connection, row, f"superseded: {why}")
        move_study(connection, study_instance_uid, "complete", who=who, why=why, completed_at=now())
