"""What the clinician's pages and a study's page show: plain functions from an engine to rows (dicts), a page at a time.

Each function asks a fixed number of queries, however many rows it gives. Times are ISO text in UTC, as the tables keep them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from caregrid.domain.workflow import PRIORITIES
from caregrid.errors import NotFound
from caregrid.store._lists import Filter, Page, Row, grouped, matching, of_study, page_of, rows_of
from caregrid.store.database import reading, writing
from caregrid.store.tables import (
    audit,
    delivery,
    finding,
    instance,
    model,
    notification,
    now,
    result,
    review,
    run,
    series,
    study,
    task,
    verdict,
)

RECENT_DAYS = 14
DECIDED = ("accepted", "rejected", "corrected")


@dataclass
class Story:
    """Everything known of one study, ready to be told on one page. runs carry their tasks, findings, results and reviews."""

    study: Row
    series: list[Row] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    copies: list[Row] = field(default_factory=list)
    verdicts: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)
    deliveries: list[Row] = field(default_factory=list)
    notifications: list[Row] = field(default_factory=list)
    audit: list[Row] = field(default_factory=list)
    models: dict[str, Row] = field(default_factory=dict)


def worklist(engine: sa.Engine, asked: Filter, number: int = 1) -> Page:
    """Studies with AI results: waiting for review first (emergency, then longest waiting), then recently done.

    asked.state: "" (waiting, or done in the last RECENT_DAYS days), waiting, decided, unasked (no review was asked for).
    """
    waiting = _reviews_by_study(sa.func.min(review.c.opened_at), ("open",), "waiting")
    decided = _reviews_by_study(sa.func.max(review.c.decided_at), DECIDED, "decided")
    rank = sa.select(run.c.study_instance_uid, sa.func.min(_priority_rank()).label("rank")).group_by(run.c.study_instance_uid)
    urgency = rank.subquery("urgency")
    query = (
        sa.select(study, waiting.c.at.label("waiting_since"), decided.c.at.label("decided_at"), urgency.c.rank)
        .outerjoin(waiting, waiting.c.study_instance_uid == study.c.study_instance_uid)
        .outerjoin(decided, decided.c.study_instance_uid == study.c.study_instance_uid)
        .outerjoin(urgency, urgency.c.study_instance_uid == study.c.study_instance_uid)
    )
    query = _worklist_state(query, asked, waiting.c.at, decided.c.at)
    query = matching(query, asked)
    order = (waiting.c.at.is_(None), urgency.c.rank, waiting.c.at, study.c.last_received_at.desc())
    with reading(engine) as connection:
        page = page_of(connection, query.order_by(*order), number)
        _add_summaries(connection, page.items)
    return page


def _worklist_state(query: sa.Select[Any], asked: Filter, waiting: Any, decided: Any) -> sa.Select[Any]:
    found = sa.exists().where(finding.c.study_instance_uid == study.c.study_instance_uid)
    if asked.state == "waiting":
        return query.where(waiting.is_not(None))
    if asked.state == "decided":
        return query.where(waiting.is_(None), decided.is_not(None))
    if asked.state == "unasked":
        return query.where(waiting.is_(None), decided.is_(None), found)
    if asked.search:
        return query.where(sa.or_(waiting.is_not(None), decided.is_not(None), found))
    since = (datetime.now(UTC) - timedelta(days=RECENT_DAYS)).isoformat(timespec="microseconds")
    recent = sa.and_(study.c.last_received_at > since, found)
    return query.where(sa.or_(waiting.is_not(None), decided > since, recent))


def _reviews_by_study(moment: Any, states: Collection[str], name: str) -> sa.Subquery:
    query = sa.select(review.c.study_instance_uid, moment.label("at")).where(review.c.state.in_(states))
    return query.group_by(review.c.study_instance_uid).subquery(name)


def _priority_rank() -> sa.Case[int]:
    whens = {name: place for place, name in enumerate(PRIORITIES)}
    return sa.case(whens, value=run.c.priority, else_=len(PRIORITIES))


def _add_summaries(connection: sa.Connection, items: list[Row]) -> None:
    uids = [item["study_instance_uid"] for item in items]
    query = sa.select(finding.c.study_instance_uid, finding.c.run_id, finding.c.algorithm, finding.c.version, finding.c.summary)
    found = connection.execute(query.where(finding.c.study_instance_uid.in_(uids)).distinct()).mappings()
    summaries = grouped(found, "study_instance_uid")
    columns = (review.c.study_instance_uid, review.c.run_id, review.c.state, review.c.decided_by, review.c.decided_at)
    reviews = connection.execute(sa.select(*columns).where(review.c.study_instance_uid.in_(uids))).mappings()
    by_study = grouped(reviews, "study_instance_uid")
    for item in items:
        item["priority"] = PRIORITIES[item["rank"]] if item["rank"] is not None and item["rank"] < len(PRIORITIES) else "routine"
        item["summaries"] = summaries[item["study_instance_uid"]]
        item["reviews"] = by_study[item["study_instance_uid"]]


def modalities(engine: sa.Engine) -> list[str]:
    """Every modality seen, for the filter."""
    with reading(engine) as connection:
        texts = connection.execute(sa.select(study.c.modalities).distinct()).scalars()
        return sorted({name for text in texts for name in text.split("\\") if name})


def mark_first_view(engine: sa.Engine, study_uid: str) -> None:
    """Note when a person who may decide first saw the open reviews of a study (time to decision is counted from here)."""
    unseen = sa.and_(review.c.study_instance_uid == study_uid, review.c.state == "open", review.c.first_viewed_at.is_(None))
    with reading(engine) as connection:
        if connection.execute(sa.select(review.c.run_id).where(unseen).limit(1)).first() is None:
            return
    with writing(engine) as connection:
        connection.execute(review.update().where(unseen).values(first_viewed_at=now()))


def result_file(engine: sa.Engine, study_uid: str, sop_uid: str) -> Row:
    """The row of a result object of a study; NotFound when there is none."""
    query = sa.select(result).where(result.c.sop_instance_uid == sop_uid, result.c.study_instance_uid == study_uid)
    with reading(engine) as connection:
        row = connection.execute(query).mappings().first()
    if row is None:
        raise NotFound(thing="result", key=sop_uid)
    return dict(row)


def story(engine: sa.Engine, study_uid: str) -> Story:
    """Everything about one study, in a fixed number of queries; NotFound when it was never received."""
    with reading(engine) as connection:
        row = connection.execute(sa.select(study).where(study.c.study_instance_uid == study_uid)).mappings().first()
        if row is None:
            raise NotFound(thing="study", key=study_uid)
        told = Story(study=dict(row))
        told.series = of_study(connection, series, study_uid, series.c.series_number, series.c.series_instance_uid)
        told.sources = _sources(connection, study_uid)
        told.copies = rows_of(
            connection, sa.select(instance).where(instance.c.study_instance_uid == study_uid, instance.c.copy > 0)
        )
        told.verdicts = of_study(connection, verdict, study_uid, verdict.c.generation.desc(), verdict.c.workflow)
        told.deliveries = of_study(connection, delivery, study_uid, delivery.c.id)
        told.notifications = of_study(connection, notification, study_uid, notification.c.id.desc())
        told.runs = _runs_with_parts(connection, study_uid)
        told.audit = _study_audit(connection, study_uid, told)
        told.models = _models_used(connection, told.runs)
    return told


def _sources(connection: sa.Connection, study_uid: str) -> list[Row]:
    who = (instance.c.protocol, instance.c.calling_ae, instance.c.called_ae, instance.c.address)
    query = sa.select(
        *who,
        sa.func.count().label("instances"),
        sa.func.sum(instance.c.size).label("bytes"),
        sa.func.min(instance.c.received_at).label("first"),
        sa.func.max(instance.c.received_at).label("last"),
    )
    return rows_of(connection, query.where(instance.c.study_instance_uid == study_uid).group_by(*who).order_by(sa.text("first")))


def _runs_with_parts(connection: sa.Connection, study_uid: str) -> list[Row]:
    runs = of_study(connection, run, study_uid, run.c.generation.desc(), run.c.created_at.desc(), run.c.workflow)
    ids = [row["id"] for row in runs]
    tasks = rows_of(connection, sa.select(task).where(task.c.run_id.in_(ids)).order_by(task.c.position))
    parts = {
        "tasks": grouped(tasks, "run_id"),
        "findings": grouped(of_study(connection, finding, study_uid, finding.c.task_id, finding.c.tracking_id), "run_id"),
        "results": grouped(of_study(connection, result, study_uid, result.c.created_at, result.c.kind), "run_id"),
        "reviews": grouped(of_study(connection, review, study_uid, review.c.opened_at), "run_id"),
    }
    for row in runs:
        row.update({name: by_run[row["id"]] for name, by_run in parts.items()})
    return runs


def _study_audit(connection: sa.Connection, study_uid: str, told: Story) -> list[Row]:
    subjects = [f"study:{study_uid}", *(f"run:{row['id']}" for row in told.runs)]
    subjects += [f"delivery:{row['id']}" for row in told.deliveries]
    subjects += [f"review:{row['run_id']}/{row['task_id']}" for run_row in told.runs for row in run_row["reviews"]]
    query = sa.select(audit).where(audit.c.subject.in_(subjects)).order_by(audit.c.seq.desc()).limit(200)
    return rows_of(connection, query)


def _models_used(connection: sa.Connection, runs: list[Row]) -> dict[str, Row]:
    digests = {row["model_digest"] for part in runs for row in part["tasks"] if row["model_digest"]}
    digests |= {digest for part in runs for digest in (part["models"] or {}).values()}
    return {row["digest"]: row for row in rows_of(connection, sa.select(model).where(model.c.digest.in_(digests)))}
