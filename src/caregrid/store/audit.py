"""The audit log: who did what to which thing, and why; each record's hash covers the one before.

Written in the same transaction as the change it tells of, so neither exists without the other.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa

from caregrid.errors import AuditBroken
from caregrid.store.tables import audit, now

GENESIS = "0" * 64


def append(
    connection: sa.Connection, *, who: str, what: str, subject: str, why: str, detail: dict[str, Any] | None = None
) -> int:
    """Add a record within the caller's transaction and return its sequence number.

    subject is ``thing:key`` (``run:…``, ``study:<UID>``, ``model:<name>@<version>``). detail is JSON without patient data.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("select pg_advisory_xact_lock(4242001)"))
    last = connection.execute(sa.select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).first()
    seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
    row: dict[str, Any] = {
        "seq": seq,
        "at": now(),
        "who": who,
        "what": what,
        "subject": subject,
        "why": why,
        "detail": detail or {},
        "previous": previous,
    }
    connection.execute(audit.insert().values(**row, hash=record_hash(row)))
    return int(seq)


def record_hash(row: dict[str, Any]) -> str:
    """SHA-256 over the record's canonical JSON, previous hash included."""
    text = json.dumps(
        {key: row[key] for key in ("seq", "at", "who", "what", "subject", "why", "detail", "previous")},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def verify(connection: sa.Connection, expected_head: tuple[int, str] | None = None) -> tuple[int, str]:
    """Walk the whole chain; return (records, head hash). Raises AuditBroken at the first record that does not hold.

    expected_head: an earlier (seq, hash), e.g. a copy kept off the machine; its absence shows truncation.
    """
    previous, count = GENESIS, 0
    for row in connection.execute(sa.select(audit).order_by(audit.c.seq)).mappings():
        count += 1
        _check_record(dict(row), count, previous)
        previous = row["hash"]
        if expected_head and row["seq"] == expected_head[0] and previous != expected_head[1]:
            raise AuditBroken(seq=count, reason="the hash differs from the copy kept elsewhere")
    if expected_head and count < expected_head[0]:
        raise AuditBroken(seq=count, reason=f"the log ends here, but record {expected_head[0]} was once written")
    return count, previous


def _check_record(row: dict[str, Any], count: int, previous: str) -> None:
    if row["seq"] != count:
        raise AuditBroken(seq=count, reason="a record is missing")
    if row["previous"] != previous:
        raise AuditBroken(seq=count, reason="it does not follow from the record before it")
    if row["hash"] != record_hash(row):
        raise AuditBroken(seq=count, reason="its content was changed")
