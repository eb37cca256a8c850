"""The index rows of received objects, written by whole groups: one commit, one sync for all that wait at that moment.

Whoever comes first commits for everybody who came while the commit before was under way; nobody waits for company.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError

from caregrid.domain.study import Source
from caregrid.errors import StoreFull
from caregrid.store import audit
from caregrid.store._header import Header
from caregrid.store.database import open_engine, reading, writing
from caregrid.store.files import sync_file
from caregrid.store.tables import instance, now, series, study

_ATTEMPTS = 8


@dataclass
class Entry:
    """An object on disk that waits for its rows. ``status`` (one of RECEIPTS) or ``error`` is set once ``done``."""

    source: Source
    header: Header
    sha256: str
    size: int
    path: str
    status: str = ""
    error: Exception | None = None
    done: bool = False
    copy: int = 0
    journaled: bool = False
    uids: tuple[str, str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.uids = tuple(map(self.header.uid, ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")))  # type: ignore[assignment]


class Index:
    """Adds entries to the index; for several threads at once, beside other processes doing the same."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._waiting: deque[Entry] = deque()
        self._commit = threading.Lock()

    @cached_property
    def _sql(self) -> _Statements:
        return _Statements(self.engine.dialect)

    @cached_property
    def _unsynced(self) -> sa.Engine:
        """For rows the journal vouches for: committed, and seen by everybody, but not waited for until ``settle``."""
        engine = open_engine(self.engine.url.render_as_string(hide_password=False), pool_size=2)
        sqlite = engine.dialect.name == "sqlite"

        @sa.event.listens_for(engine, "connect")
        def _connect(connection: Any, _record: Any) -> None:
            with closing(connection.cursor()) as cursor:
                cursor.execute("pragma synchronous=normal" if sqlite else "set synchronous_commit=off")
            connection.commit()

        return engine

    def settle(self) -> None:
        """All rows committed so far are on the disk when this returns."""
        if self.engine.dialect.name == "sqlite":
            # SQLite holds no lock on this file (it does on the database itself, and closing that would let go of it).
            sync_file(Path(f"{self.engine.url.database}-wal"))
        else:
            with writing(self.engine) as connection:
                connection.execute(sa.text("select pg_logical_emit_message(true, 'caregrid', '')"))

    def close(self) -> None:
        """Let go of connections."""
        self.__dict__.get("_unsynced", self.engine).dispose()

    def holds(self, sop_instance_uid: str, sha256: str) -> bool:
        """Whether this very object is in the index."""
        with reading(self.engine) as connection:
            return any(known == sha256 for (known,) in self._sql.copies(connection, key=sop_instance_uid))

    def add(self, entry: Entry) -> str:
        """Commit the entry's rows and return its status. Raises StoreFull, or what the database says."""
        self._waiting.append(entry)
        with self._commit:
            if not entry.done:
                self._add_group([self._waiting.popleft() for _ in range(len(self._waiting))])
        if entry.error:
            raise entry.error
        return entry.status

    def _add_group(self, group: list[Entry]) -> None:
        # One order for everybody: two processes that touch the same studies never wait for each other in a circle.
        group.sort(key=lambda entry: entry.uids)
        try:
            self._transaction(group)
        except DBAPIError:
            for entry in group:
                self._add_alone(entry)
        finally:
            for entry in group:
                entry.error = entry.error or (None if entry.status else RuntimeError("the index commit broke off"))
                entry.done = True

    def _add_alone(self, entry: Entry) -> None:
        """Another process may just have added the same study or object: then the second look finds it there."""
        for attempt in range(_ATTEMPTS):
            try:
                entry.error = None
                self._transaction([entry])
                return
            except DBAPIError as error:
                entry.error = StoreFull() if _full(error) else error
                if isinstance(entry.error, StoreFull) or error.connection_invalidated or not _passing(error):
                    return
                time.sleep(random.uniform(0, 0.01 * (attempt + 1)))

    def _transaction(self, group: list[Entry]) -> None:
        engine = self._unsynced if all(entry.journaled for entry in group) else self.engine
        with writing(engine) as connection:
            new = self._judge(connection, group)
            for entry in new:
                self._sql.insert(connection, instance, _instance_row(entry))
            for uid in dict.fromkeys(entry.uids[0] for entry in new):
                self._count(connection, uid, [entry for entry in new if entry.uids[0] == uid])

    def _judge(self, connection: sa.Connection, group: list[Entry]) -> list[Entry]:
        """Set each entry's status and copy; returns those that need rows."""
        known: dict[str, list[str]] = {}
        new = []
        for entry in group:
            uid = entry.uids[2]
            copies = known.get(uid)
            if copies is None:
                copies = known[uid] = [sha256 for (sha256,) in self._sql.copies(connection, key=uid)]
            if entry.sha256 in copies:
                entry.status = "duplicate"
                continue
            entry.copy, entry.status = len(copies), "conflict" if copies else "stored"
            copies.append(entry.sha256)
            new.append(entry)
        return new

    def _count(self, connection: sa.Connection, uid: str, entries: list[Entry]) -> None:
        counts = {
            "new_series": self._count_series(connection, entries),
            "new_instances": sum(entry.copy == 0 for entry in entries),
            "new_conflicts": sum(entry.copy > 0 for entry in entries),
        }
        moment = now()
        modalities = {entry.header.text("Modality") for entry in entries} - {""}
        found = self._sql.count_study(connection, key=uid, moment=moment, came=len(entries), **counts)
        if not found:
            self._sql.insert(connection, study, _study_row(entries[0], moment, modalities, counts))
        elif not modalities <= (known := set(found[0][0].split("\\"))):
            self._sql.set_modalities(connection, key=uid, joined=_joined(known | modalities))
        for entry in entries:
            if entry.copy:
                _note_conflict(connection, entry)

    def _count_series(self, connection: sa.Connection, entries: list[Entry]) -> int:
        """Count the entries into their series; returns how many series are new."""
        new = 0
        for uid in dict.fromkeys(entry.uids[1] for entry in entries):
            of_series = [entry for entry in entries if entry.uids[1] == uid]
            count = sum(entry.copy == 0 for entry in of_series)
            if not self._sql.count_series(connection, key=uid, new_instances=count):
                self._sql.insert(connection, series, _series_row(of_series[0], count))
                new += 1
        return new


class _Statements:
    """The statements of a receipt, compiled once: building them anew costs more than the database takes to carry them out."""

    def __init__(self, dialect: sa.Dialect) -> None:
        key, open_study = _given("key", sa.Text), sa.or_(study.c.state == "receiving", study.c.state == "held")
        count = {name: _given(name, sa.Integer) for name in ("new_series", "new_instances", "new_conflicts", "came")}
        self._dialect = dialect
        self._inserts: dict[str, _Statement] = {}
        self.copies = _Statement(sa.select(instance.c.sha256).where(instance.c.sop_instance_uid == key), dialect)
        self.count_series = _Statement(
            series.update()
            .where(series.c.series_instance_uid == key)
            .values(number_of_instances=series.c.number_of_instances + count["new_instances"])
            .returning(series.c.series_instance_uid),
            dialect,
        )
        self.count_study = _Statement(
            study.update()
            .where(study.c.study_instance_uid == key)
            .values(
                number_of_series=study.c.number_of_series + count["new_series"],
                number_of_instances=study.c.number_of_instances + count["new_instances"],
                conflicts=study.c.conflicts + count["new_conflicts"],
                late_instances=study.c.late_instances + sa.case((open_study, 0), else_=count["came"]),
                last_received_at=_given("moment", sa.Text),
            )
            .returning(study.c.modalities),
            dialect,
        )
        self.set_modalities = _Statement(
            study.update().where(study.c.study_instance_uid == key).values(modalities=_given("joined", sa.Text)), dialect
        )

    def insert(self, connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> None:
        """Add a row that gives every column that must be given."""
        statement = self._inserts.get(table.name)
        if statement is None:
            statement = self._inserts[table.name] = _Statement(table.insert().inline(), self._dialect, list(row))
        statement(connection, **row)


def _given(name: str, kind: type[Any]) -> sa.BindParameter[Any]:
    return sa.bindparam(name, type_=kind, required=False)


class _Statement:
    """Goes straight to the driver: of five small statements, SQLAlchemy's way to each costs more than the statement itself."""

    def __init__(self, clause: Any, dialect: sa.Dialect, columns: list[str] | None = None) -> None:
        compiled = clause.compile(dialect=dialect, column_keys=columns)
        self._text, self._order, self._fixed = str(compiled), compiled.positiontup, dict(compiled.params)
        self._gives_rows = isinstance(clause, sa.Select) or bool(getattr(clause, "_returning", ()))
        self._driver = dialect.loaded_dbapi

    def __call__(self, connection: sa.Connection, **values: Any) -> list[Any]:
        given: dict[str, Any] = self._fixed | values
        parameters = tuple(given[name] for name in self._order) if self._order is not None else given
        cursor = connection.connection.cursor()
        try:
            cursor.execute(self._text, parameters)
            return list(cursor.fetchall()) if self._gives_rows else []
        except self._driver.IntegrityError as error:
            raise IntegrityError("index", None, error) from error
        except self._driver.Error as error:
            # Without the parameters: they are patient data, and messages get logged.
            raise DBAPIError("index", None, error) from error
        finally:
            cursor.close()


def _sender(source: Source) -> dict[str, str]:
    return {
        "protocol": source.protocol,
        "calling_ae": source.calling_ae,
        "called_ae": source.called_ae,
        "address": source.address,
    }


def _instance_row(entry: Entry) -> dict[str, Any]:
    header, (study_uid, series_uid, uid) = entry.header, entry.uids
    return _sender(entry.source) | {
        "sop_instance_uid": uid,
        "copy": entry.copy,
        "study_instance_uid": study_uid,
        "series_instance_uid": series_uid,
        "sop_class_uid": header.uid("SOPClassUID"),
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "instance_number": header.number("InstanceNumber"),
        "number_of_frames": header.number("NumberOfFrames"),
        "rows": header.number("Rows"),
        "columns": header.number("Columns"),
        "sha256": entry.sha256,
        "size": entry.size,
        "path": entry.path,
        "received_at": now(),
    }


def _series_row(entry: Entry, count: int) -> dict[str, Any]:
    header = entry.header
    return {
        "series_instance_uid": entry.uids[1],
        "study_instance_uid": entry.uids[0],
        "modality": header.text("Modality"),
        "series_number": header.number("SeriesNumber"),
        "series_description": header.text("SeriesDescription"),
        "body_part_examined": header.text("BodyPartExamined"),
        "station_name": header.text("StationName"),
        "number_of_instances": count,
        "first_received_at": now(),
    }


_STUDY_TEXTS = {
    "patient_id": "PatientID",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "accession_number": "AccessionNumber",
    "study_id": "StudyID",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "study_description": "StudyDescription",
    "referring_physician_name": "ReferringPhysicianName",
}


def _study_row(entry: Entry, moment: str, modalities: set[str], counts: dict[str, int]) -> dict[str, Any]:
    texts = {column: entry.header.text(keyword) for column, keyword in _STUDY_TEXTS.items()}
    return (
        _sender(entry.source)
        | texts
        | {
            "study_instance_uid": entry.uids[0],
            "generation": 0,
            "state": "receiving",
            "state_reason": "",
            "modalities": _joined(modalities),
            "number_of_series": counts["new_series"],
            "number_of_instances": counts["new_instances"],
            "conflicts": counts["new_conflicts"],
            "late_instances": 0,
            "first_received_at": moment,
            "last_received_at": moment,
        }
    )


def _joined(modalities: set[str]) -> str:
    return "\\".join(sorted(modalities - {""}))


def _note_conflict(connection: sa.Connection, entry: Entry) -> None:
    audit.append(
        connection,
        who="caregrid",
        what="conflicting instance kept",
        subject=f"study:{entry.uids[0]}",
        why="the same SOP Instance UID came again with other bytes",
        detail={"object": entry.uids[2], "copy": entry.copy, "from": entry.source.calling_ae or entry.source.protocol},
    )


def _passing(error: DBAPIError) -> bool:
    """Whether trying again may help: another process was faster, or two got in each other's way."""
    state = getattr(error.orig, "sqlstate", None)
    return isinstance(error, IntegrityError) or state in ("40001", "40P01") or "locked" in str(error.orig)


def _full(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) == "53100" or "disk is full" in str(error.orig)
