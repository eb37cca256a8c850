"""What the operator's, governance's and administrator's pages and monitoring show, in the manner of ``caregrid.store.views``."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from caregrid.errors import AuditBroken, NotFound
from caregrid.store import audit as audit_log
from caregrid.store._lists import Filter, Page, Row, all_of, count, counts, grouped, matching, page_of, rows_of
from caregrid.store.database import reading
from caregrid.store.tables import (
    allowed_sender,
    audit,
    delivery,
    instance,
    model,
    notification,
    now,
    quarantine,
    rejection,
    result,
    review,
    run,
    study,
    trusted_key,
    user,
    verdict,
    worker,
    workflow_revision,
)


def dashboard(engine: sa.Engine, dead_after_seconds: float) -> Row:
    """The counts of the operations page. Today starts at midnight UTC."""
    today = datetime.now(UTC).strftime("%Y-%m-%dT00:00:00")
    day_ago = (datetime.now(UTC) - timedelta(hours=24)).isoformat(timespec="microseconds")
    alive = (datetime.now(UTC) - timedelta(seconds=dead_after_seconds)).isoformat(timespec="microseconds")
    with reading(engine) as connection:
        queue = rows_of(
            connection, sa.select(run.c.state, run.c.priority, sa.func.count().label("n")).group_by(run.c.state, run.c.priority)
        )
        oldest = sa.select(run).where(run.c.state.in_(("queued", "running"))).order_by(run.c.created_at).limit(1)
        return {
            "queue": {(row["state"], row["priority"]): row["n"] for row in queue},
            "studies": counts(connection, study.c.state),
            "deliveries": counts(connection, delivery.c.state),
            "received_today": count(connection, study, study.c.first_received_at >= today),
            "instances_today": count(connection, instance, instance.c.received_at >= today),
            "runs_done_today": count(connection, run, run.c.state == "done", run.c.finished_at >= today),
            "delivered_today": count(connection, delivery, delivery.c.state == "delivered", delivery.c.delivered_at >= today),
            "oldest": next(iter(rows_of(connection, oldest)), None),
            "open_reviews": count(connection, review, review.c.state == "open"),
            "oldest_review": connection.execute(
                sa.select(sa.func.min(review.c.opened_at)).where(review.c.state == "open")
            ).scalar(),
            "quarantined": count(connection, quarantine),
            "quarantined_day": count(connection, quarantine, quarantine.c.received_at >= day_ago),
            "rejections_day": count(connection, rejection, rejection.c.at >= day_ago),
            "conflicts": count(connection, study, study.c.conflicts > 0),
            "workers": rows_of(connection, sa.select(worker).order_by(worker.c.role, worker.c.id)),
            "alive_since": alive,
        }


def studies(engine: sa.Engine, asked: Filter, number: int = 1) -> Page:
    """Every study received, newest first."""
    query = matching(sa.select(study), asked)
    if asked.state:
        query = query.where(study.c.state == asked.state)
    if asked.source:
        query = query.where(study.c.calling_ae == asked.source)
    with reading(engine) as connection:
        return page_of(connection, query.order_by(study.c.last_received_at.desc()), number)


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
        return page_of(connection, query.order_by(need, run.c.created_at.desc()), number)


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
        counted = rows_of(
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
        return page_of(connection, query.order_by(delivery.c.id), number)


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
        return page_of(connection, query.group_by(*who).order_by(sa.text("last desc")), number)


def allowed_senders(engine: sa.Engine) -> list[Row]:
    """Senders allowed from the web pages, on top of those in site.toml."""
    return all_of(engine, sa.select(allowed_sender).order_by(allowed_sender.c.at.desc()))


def quarantined(engine: sa.Engine, number: int = 1) -> Page:
    """Objects that could not be taken in, newest first."""
    with reading(engine) as connection:
        return page_of(connection, sa.select(quarantine).order_by(quarantine.c.id.desc()), number)


def held(engine: sa.Engine, number: int = 1) -> Page:
    """Studies that wait for an operator to say proceed or cancel, longest waiting first."""
    with reading(engine) as connection:
        return page_of(connection, sa.select(study).where(study.c.state == "held").order_by(study.c.last_received_at), number)


def workflows(engine: sa.Engine) -> list[Row]:
    """Each workflow's active revision (or newest, when none is active), and how often it applied, with the commonest reasons."""
    with reading(engine) as connection:
        revisions = rows_of(connection, sa.select(workflow_revision).order_by(workflow_revision.c.active, workflow_revision.c.at))
        newest = {row["name"]: row for row in revisions}
        columns = (verdict.c.workflow, verdict.c.applies, verdict.c.reason)
        counted = rows_of(
            connection, sa.select(*columns, sa.func.count().label("n")).group_by(*columns).order_by(sa.text("n desc"))
        )
    reasons = grouped(counted, "workflow")
    for name, row in newest.items():
        row["reasons"] = reasons[name][:20]
        row["applied"] = sum(entry["n"] for entry in reasons[name] if entry["applies"])
        row["not_applied"] = sum(entry["n"] for entry in reasons[name] if not entry["applies"])
        row["revisions"] = sum(1 for other in revisions if other["name"] == name)
    return [newest[name] for name in sorted(newest)]


def models(engine: sa.Engine) -> list[Row]:
    """Model packages, by name and newest first, with whether the key that signed them is trusted."""
    keys = {row["key_id"]: row for row in all_of(engine, sa.select(trusted_key))}
    rows = all_of(engine, sa.select(model).order_by(model.c.name, model.c.added_at.desc()))
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
        return page_of(connection, sa.select(notification).order_by(notification.c.id.desc()), number)


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
        return page_of(connection, query.order_by(audit.c.seq.desc()), number)


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
    return all_of(engine, sa.select(*columns).order_by(user.c.name))


def access(engine: sa.Engine, who: str = "", number: int = 1) -> Page:
    """Who looked at which study and who signed in, newest first."""
    kinds = ("viewed study", "signed in", "signed out", "account locked", "changed password")
    query = sa.select(audit).where(audit.c.what.in_(kinds))
    if who:
        query = query.where(audit.c.who == who)
    with reading(engine) as connection:
        return page_of(connection, query.order_by(audit.c.seq.desc()), number)


def gauges(engine: sa.Engine, dead_after_seconds: float) -> list[tuple[str, dict[str, str], float]]:
    """Numbers for monitoring, as (name, labels, value); labels never hold patient data."""
    alive = (datetime.now(UTC) - timedelta(seconds=dead_after_seconds)).isoformat(timespec="microseconds")
    with reading(engine) as connection:
        found: list[tuple[str, dict[str, str], float]] = []
        for name, column in (("studies", study.c.state), ("deliveries", delivery.c.state), ("reviews", review.c.state)):
            found += [(name, {"state": state}, n) for state, n in sorted(counts(connection, column).items())]
        queue = sa.select(run.c.state, run.c.priority, sa.func.count()).group_by(run.c.state, run.c.priority)
        found += [("runs", {"state": state, "priority": rank}, n) for state, rank, n in connection.execute(queue)]
        found += [("instances", {}, count(connection, instance)), ("quarantined", {}, count(connection, quarantine))]
        found += [("rejections", {}, count(connection, rejection)), ("audit_records", {}, count(connection, audit))]
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
