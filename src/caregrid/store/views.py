"""What the web pages show, read from the database: plain functions from an engine to rows (dicts), a page at a time.

Each function asks a fixed number of queries, however many rows it gives. Times are ISO text in UTC, as the tables keep them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from caregrid.domain.workflow import PRIORITIES
from caregrid.errors import AuditBroken, NotFound
from caregrid.store import audit as audit_log
from caregrid.store.database import reading, writing
from caregrid.store.tables import (
    allowed_sender,
    audit,
    delivery,
    finding,
    instance,
    model,
    notification,
    now,
    quarantine,
    rejection,
    result,
    review,
    run,
    series,
    study,
    task,
    trusted_key,
    user,
    verdict,
    worker,
    workflow_revision,
)

Row = dict[str, Any]

PAGE_SIZE = 25
RECENT_DAYS = 14
DECIDED = ("accepted", "rejected", "corrected")
RUN_OPEN = ("queued", "running", "awaiting-review", "delivering")


@dataclass(frozen=True)
class Page:
    """One page of a longer list. number starts at 1; total counts the whole list."""

    items: list[Row]
    number: int
    total: int
    size: int = PAGE_SIZE

    @property
    def pages(self) -> int:
        """How many pages there are, at least one."""
        return max(1, -(-self.total // self.size))


@dataclass(frozen=True)
class Filter:
    """What a person asked a list for; an empty text means no such limit. search: patient ID, accession number, name, UID."""

    state: str = ""
    modality: str = ""
    search: str = ""
    source: str = ""


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


# ---------------------------------------------------------------- clinicians


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
    query = _matching(query, asked)
    order = (waiting.c.at.is_(None), urgency.c.rank, waiting.c.at, study.c.last_received_at.desc())
    with reading(engine) as connection:
        page = _page(connection, query.order_by(*order), number)
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
    summaries = _grouped(found, "study_instance_uid")
    columns = (review.c.study_instance_uid, review.c.run_id, review.c.state, review.c.decided_by, review.c.decided_at)
    reviews = connection.execute(sa.select(*columns).where(review.c.study_instance_uid.in_(uids))).mappings()
    by_study = _grouped(reviews, "study_instance_uid")
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


# ---------------------------------------------------------------- one study's whole story


def story(engine: sa.Engine, study_uid: str) -> Story:
    """Everything about one study, in a fixed number of queries; NotFound when it was never received."""
    with reading(engine) as connection:
        row = connection.execute(sa.select(study).where(study.c.study_instance_uid == study_uid)).mappings().first()
        if row is None:
            raise NotFound(thing="study", key=study_uid)
        told = Story(study=dict(row))
        told.series = _of_study(connection, series, study_uid, series.c.series_number, series.c.series_instance_uid)
        told.sources = _sources(connection, study_uid)
        told.copies = _rows(
            connection, sa.select(instance).where(instance.c.study_instance_uid == study_uid, instance.c.copy > 0)
        )
        told.verdicts = _of_study(connection, verdict, study_uid, verdict.c.generation.desc(), verdict.c.workflow)
        told.deliveries = _of_study(connection, delivery, study_uid, delivery.c.id)
        told.notifications = _of_study(connection, notification, study_uid, notification.c.id.desc())
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
    return _rows(connection, query.where(instance.c.study_instance_uid == study_uid).group_by(*who).order_by(sa.text("first")))


def _runs_with_parts(connection: sa.Connection, study_uid: str) -> list[Row]:
    runs = _of_study(connection, run, study_uid, run.c.generation.desc(), run.c.created_at.desc(), run.c.workflow)
    ids = [row["id"] for row in runs]
    tasks = _rows(connection, sa.select(task).where(task.c.run_id.in_(ids)).order_by(task.c.position))
    parts = {
        "tasks": _grouped(tasks, "run_id"),
        "findings": _grouped(_of_study(connection, finding, study_uid, finding.c.task_id, finding.c.tracking_id), "run_id"),
        "results": _grouped(_of_study(connection, result, study_uid, result.c.created_at, result.c.kind), "run_id"),
        "reviews": _grouped(_of_study(connection, review, study_uid, review.c.opened_at), "run_id"),
    }
    for row in runs:
        row.update({name: by_run[row["id"]] for name, by_run in parts.items()})
    return runs


def _study_audit(connection: sa.Connection, study_uid: str, told: Story) -> list[Row]:
    subjects = [f"study:{study_uid}", *(f"run:{row['id']}" for row in told.runs)]
    subjects += [f"delivery:{row['id']}" for row in told.deliveries]
    subjects += [f"review:{row['run_id']}/{row['task_id']}" for run_row in told.runs for row in run_row["reviews"]]
    query = sa.select(audit).where(audit.c.subject.in_(subjects)).order_by(audit.c.seq.desc()).limit(200)
    return _rows(connection, query)


def _models_used(connection: sa.Connection, runs: list[Row]) -> dict[str, Row]:
    digests = {row["model_digest"] for part in runs for row in part["tasks"] if row["model_digest"]}
    digests |= {digest for part in runs for digest in (part["models"] or {}).values()}
    return {row["digest"]: row for row in _rows(connection, sa.select(model).where(model.c.digest.in_(digests)))}


# ---------------------------------------------------------------- operators


def dashboard(engine: sa.Engine, dead_after_seconds: float) -> Row:
    """The counts of the operations page. Today starts at midnight UTC."""
    today = datetime.now(UTC).strftime("%Y-%m-%dT00:00:00")
    day_ago = (datetime.now(UTC) - timedelta(hours=24)).isoformat(timespec="microseconds")
    alive = (datetime.now(UTC) - timedelta(seconds=dead_after_seconds)).isoformat(timespec="microseconds")
    with reading(engine) as connection:
        queue = _rows(
            connection, sa.select(run.c.state, run.c.priority, sa.func.count().label("n")).group_by(run.c.state, run.c.priority)
        )
        oldest = sa.select(run).where(run.c.state.in_(("queued", "running"))).order_by(run.c.created_at).limit(1)
        return {
            "queue": {(row["state"], row["priority"]): row["n"] for row in queue},
            "studies": _counts(connection, study.c.state),
            "deliveries": _counts(connection, delivery.c.state),
            "received_today": _count(connection, study, study.c.first_received_at >= today),
            "instances_today": _count(connection, instance, instance.c.received_at >= today),
            "runs_done_today": _count(connection, run, run.c.state == "done", run.c.finished_at >= today),
            "delivered_today": _count(connection, delivery, delivery.c.state == "delivered", delivery.c.delivered_at >= today),
            "oldest": next(iter(_rows(connection, oldest)), None),
            "open_reviews": _count(connection, review, review.c.state == "open"),
            "oldest_review": connection.execute(
                sa.select(sa.func.min(review.c.opened_at)).where(review.c.state == "open")
            ).scalar(),
            "quarantined": _count(connection, quarantine),
            "quarantined_day": _count(connection, quarantine, quarantine.c.received_at >= day_ago),
            "rejections_day": _count(connection, rejection, rejection.c.at >= day_ago),
            "conflicts": _count(connection, study, study.c.conflicts > 0),
            "workers": _rows(connection, sa.select(worker).order_by(worker.c.role, worker.c.id)),
            "alive_since": alive,
        }


def studies(engine: sa.Engine, asked: Filter, number: int = 1) -> Page:
    """Every study received, newest first."""
    query = _matching(sa.select(study), asked)
    if asked.state:
        query = query.where(study.c.state == asked.state)
    if asked.source:
        query = query.where(study.c.calling_ae == asked.source)
    with reading(engine) as connection:
        return _page(connection, query.order_by(study.c.last_received_at.desc()), number)


def runs(engine: sa.Engine, state: str = "", workflow: str = "", number: int = 1) -> Page:
    """Runs, those that need a person first (parked, failed), then the open ones, then the newest."""
    need = sa.case(
        {"parked": 0, "failed": 1, "running": 2, "queued": 3, "awaiting-review": 4, "delivering": 5}, value=run.c.state, else_=6
    )
    query = sa.select(run, study.c.modalities, study.c.study_description, study.c.accession_number)
    query = query.join(study, study.c.study_instance_uid == run.c.study_instance_uid)
    if state:
        query = query.where(run.c.state == state)
    if workflow:
        query = query.where(run.c.workflow == workflow)
    with reading(engine) as connection:
        return _page(connection, query.order_by(need, run.c.created_at.desc()), number)


def one_run(engine: sa.Engine, run_id: str) -> Row:
    """A run's own row; NotFound when there is none."""
    with reading(engine) as connection:
        row = connection.execute(sa.select(run).where(run.c.id == run_id)).mappings().first()
    if row is None:
        raise NotFound(thing="run", key=run_id)
    return dict(row)


def destinations(engine: sa.Engine, names: Iterable[str]) -> list[Row]:
    """Per destination: deliveries by state, the last error, the last success. names: those configured, shown also when unused."""
    with reading(engine) as connection:
        counted = _rows(
            connection,
            sa.select(
                delivery.c.destination,
                delivery.c.state,
                sa.func.count().label("n"),
                sa.func.max(delivery.c.delivered_at).label("last"),
            ).group_by(delivery.c.destination, delivery.c.state),
        )
        latest = (
            sa.select(delivery.c.destination, sa.func.max(delivery.c.id).label("id"))
            .where(delivery.c.last_error != "", delivery.c.state != "delivered")
            .group_by(delivery.c.destination)
            .subquery()
        )
        errors = connection.execute(
            sa.select(delivery.c.destination, delivery.c.last_error).join(latest, latest.c.id == delivery.c.id)
        )
        last_errors = {row.destination: row.last_error for row in errors}
    known = {name: _destination(name) for name in sorted({*names, *(row["destination"] for row in counted)})}
    for row in counted:
        known[row["destination"]][row["state"]] = row["n"]
        known[row["destination"]]["last_delivered_at"] = max(known[row["destination"]]["last_delivered_at"], row["last"] or "")
    for name, entry in known.items():
        entry["last_error"] = last_errors.get(name, "")
    return list(known.values())


def _destination(name: str) -> Row:
    return {"name": name, "pending": 0, "sending": 0, "delivered": 0, "parked": 0, "cancelled": 0, "last_delivered_at": ""}


def parked(engine: sa.Engine, destination: str = "", number: int = 1) -> Page:
    """Deliveries that were given up, oldest first."""
    columns = (result.c.kind, study.c.modalities, study.c.study_description, study.c.accession_number)
    query = sa.select(delivery, *columns).where(delivery.c.state == "parked")
    query = query.outerjoin(result, result.c.sop_instance_uid == delivery.c.sop_instance_uid)
    query = query.join(study, study.c.study_instance_uid == delivery.c.study_instance_uid)
    if destination:
        query = query.where(delivery.c.destination == destination)
    with reading(engine) as connection:
        return _page(connection, query.order_by(delivery.c.id), number)


def parked_ids(engine: sa.Engine, destination: str) -> list[int]:
    """Every parked delivery of a destination."""
    query = sa.select(delivery.c.id).where(delivery.c.destination == destination, delivery.c.state == "parked")
    with reading(engine) as connection:
        return [int(key) for key in connection.execute(query.order_by(delivery.c.id)).scalars()]


def rejections(engine: sa.Engine, number: int = 1) -> Page:
    """Associations and requests turned away, grouped by who and why, the latest first."""
    who = (
        rejection.c.protocol,
        rejection.c.calling_ae,
        rejection.c.called_ae,
        rejection.c.address,
        rejection.c.what,
        rejection.c.reason,
    )
    query = sa.select(
        *who,
        sa.func.count().label("times"),
        sa.func.min(rejection.c.at).label("first"),
        sa.func.max(rejection.c.at).label("last"),
    )
    with reading(engine) as connection:
        return _page(connection, query.group_by(*who).order_by(sa.text("last desc")), number)


def allowed_senders(engine: sa.Engine) -> list[Row]:
    """Senders allowed from the web pages, on top of those in site.toml."""
    return _all(engine, sa.select(allowed_sender).order_by(allowed_sender.c.at.desc()))


def quarantined(engine: sa.Engine, number: int = 1) -> Page:
    """Objects that could not be taken in, newest first."""
    with reading(engine) as connection:
        return _page(connection, sa.select(quarantine).order_by(quarantine.c.id.desc()), number)


def held(engine: sa.Engine, number: int = 1) -> Page:
    """Studies that wait for an operator to say proceed or cancel, longest waiting first."""
    with reading(engine) as connection:
        return _page(connection, sa.select(study).where(study.c.state == "held").order_by(study.c.last_received_at), number)


def workflows(engine: sa.Engine) -> list[Row]:
    """Each workflow's active revision (or newest, when none is active), and how often it applied, with the commonest reasons."""
    with reading(engine) as connection:
        revisions = _rows(connection, sa.select(workflow_revision).order_by(workflow_revision.c.active, workflow_revision.c.at))
        newest = {row["name"]: row for row in revisions}
        columns = (verdict.c.workflow, verdict.c.applies, verdict.c.reason)
        counted = _rows(
            connection, sa.select(*columns, sa.func.count().label("n")).group_by(*columns).order_by(sa.text("n desc"))
        )
    reasons = _grouped(counted, "workflow")
    for name, row in newest.items():
        row["reasons"] = reasons[name][:20]
        row["applied"] = sum(entry["n"] for entry in reasons[name] if entry["applies"])
        row["not_applied"] = sum(entry["n"] for entry in reasons[name] if not entry["applies"])
        row["revisions"] = sum(1 for other in revisions if other["name"] == name)
    return [newest[name] for name in sorted(newest)]


def models(engine: sa.Engine) -> list[Row]:
    """Model packages, by name and newest first, with whether the key that signed them is trusted."""
    keys = {row["key_id"]: row for row in _all(engine, sa.select(trusted_key))}
    rows = _all(engine, sa.select(model).order_by(model.c.name, model.c.added_at.desc()))
    for row in rows:
        row["signature"] = _signature(row, keys)
    return rows


def one_model(engine: sa.Engine, digest: str) -> Row:
    """A model package by digest; NotFound when there is none."""
    for row in models(engine):
        if row["digest"] == digest:
            return row
    raise NotFound(thing="model", key=digest)


def _signature(row: Row, keys: dict[str, Row]) -> Row:
    key = keys.get(row["signed_by"]) or next((one for one in keys.values() if one["name"] == row["signed_by"]), None)
    if not row["signed_by"]:
        return {"state": "unsigned", "key": ""}
    if key is None:
        return {"state": "untrusted key", "key": row["signed_by"]}
    if key["revoked_at"]:
        return {"state": "revoked key", "key": key["name"]}
    if row["expires_at"] and row["expires_at"] < now():
        return {"state": "expired", "key": key["name"]}
    return {"state": "signed", "key": key["name"]}


def notifications(engine: sa.Engine, number: int = 1) -> Page:
    """Notifications sent or failed, newest first."""
    with reading(engine) as connection:
        return _page(connection, sa.select(notification).order_by(notification.c.id.desc()), number)


# ---------------------------------------------------------------- governance and administration


def audit_records(engine: sa.Engine, subject: str = "", who: str = "", what: str = "", number: int = 1) -> Page:
    """Audit records, newest first. subject matches from its start (``study:``, ``run:abc``); who and what match whole."""
    query = sa.select(audit)
    if subject:
        query = query.where(audit.c.subject.startswith(subject, autoescape=True))
    if who:
        query = query.where(audit.c.who == who)
    if what:
        query = query.where(audit.c.what == what)
    with reading(engine) as connection:
        return _page(connection, query.order_by(audit.c.seq.desc()), number)


def audit_chain(engine: sa.Engine) -> Row:
    """Whether the whole chain holds: {"holds", "records", "head", "reason"}."""
    with reading(engine) as connection:
        try:
            records, head = audit_log.verify(connection)
        except AuditBroken as broken:
            return {"holds": False, "records": int(broken.details["seq"]), "head": "", "reason": broken.message}
    return {"holds": True, "records": records, "head": head, "reason": ""}


def users(engine: sa.Engine) -> list[Row]:
    """Every user without the password hash."""
    columns = [column for column in user.c if column.name != "password_hash"]
    return _all(engine, sa.select(*columns).order_by(user.c.name))


def access(engine: sa.Engine, who: str = "", number: int = 1) -> Page:
    """Who looked at which study and who signed in, newest first."""
    kinds = ("viewed study", "signed in", "signed out", "account locked", "changed password")
    query = sa.select(audit).where(audit.c.what.in_(kinds))
    if who:
        query = query.where(audit.c.who == who)
    with reading(engine) as connection:
        return _page(connection, query.order_by(audit.c.seq.desc()), number)


# ---------------------------------------------------------------- machines


def gauges(engine: sa.Engine, dead_after_seconds: float) -> list[tuple[str, dict[str, str], float]]:
    """Numbers for monitoring, as (name, labels, value); labels never hold patient data."""
    alive = (datetime.now(UTC) - timedelta(seconds=dead_after_seconds)).isoformat(timespec="microseconds")
    with reading(engine) as connection:
        found: list[tuple[str, dict[str, str], float]] = []
        for name, column in (("studies", study.c.state), ("deliveries", delivery.c.state), ("reviews", review.c.state)):
            found += [(name, {"state": state}, n) for state, n in sorted(_counts(connection, column).items())]
        queue = sa.select(run.c.state, run.c.priority, sa.func.count()).group_by(run.c.state, run.c.priority)
        found += [("runs", {"state": state, "priority": rank}, n) for state, rank, n in connection.execute(queue)]
        found += [("instances", {}, _count(connection, instance)), ("quarantined", {}, _count(connection, quarantine))]
        found += [("rejections", {}, _count(connection, rejection)), ("audit_records", {}, _count(connection, audit))]
        lively = sa.select(worker.c.role, sa.func.count()).where(worker.c.seen_at >= alive).group_by(worker.c.role)
        found += [("workers_alive", {"role": role}, n) for role, n in connection.execute(lively)]
        first = connection.execute(sa.select(sa.func.min(run.c.created_at)).where(run.c.state == "queued")).scalar()
        found.append(("oldest_queued_seconds", {}, _age(first)))
    return found


def alive(engine: sa.Engine) -> None:
    """Raise sqlalchemy.exc.SQLAlchemyError when the database does not answer."""
    with reading(engine) as connection:
        connection.execute(sa.select(1))


def _age(moment: str | None) -> float:
    if not moment:
        return 0.0
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


# ---------------------------------------------------------------- shared


def _matching(query: sa.Select[Any], asked: Filter) -> sa.Select[Any]:
    if asked.modality:
        query = query.where(study.c.modalities.contains(asked.modality, autoescape=True))
    if asked.search:
        text = asked.search.strip()
        query = query.where(
            sa.or_(
                study.c.patient_id.startswith(text, autoescape=True),
                study.c.accession_number.startswith(text, autoescape=True),
                study.c.study_instance_uid == text,
                study.c.patient_name.icontains(text, autoescape=True),
            )
        )
    return query


def _page(connection: sa.Connection, query: sa.Select[Any], number: int) -> Page:
    total = connection.execute(sa.select(sa.func.count()).select_from(query.order_by(None).subquery())).scalar_one()
    number = min(max(1, number), max(1, -(-total // PAGE_SIZE)))
    items = _rows(connection, query.limit(PAGE_SIZE).offset((number - 1) * PAGE_SIZE))
    return Page(items=items, number=number, total=total)


def _of_study(connection: sa.Connection, table: sa.Table, study_uid: str, *order: Any) -> list[Row]:
    return _rows(connection, sa.select(table).where(table.c.study_instance_uid == study_uid).order_by(*order))


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> list[Row]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _all(engine: sa.Engine, query: sa.Select[Any]) -> list[Row]:
    with reading(engine) as connection:
        return _rows(connection, query)


def _grouped(rows: Iterable[Any], key: str) -> defaultdict[str, list[Row]]:
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(dict(row))
    return groups


def _count(connection: sa.Connection, table: sa.Table, *where: Any) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one())


def _counts(connection: sa.Connection, column: sa.Column[str]) -> dict[str, int]:
    rows = connection.execute(sa.select(column, sa.func.count()).group_by(column))
    return {str(value): int(n) for value, n in rows}
