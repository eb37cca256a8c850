"""Rows for tests of the engine: studies, runs and deliveries as the rooms would have written them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from caregrid.store.database import reading, writing
from caregrid.store.studies import run_id
from caregrid.store.tables import delivery, now, result, run, study


def ago(seconds: float) -> str:
    """That many seconds ago, as the tables keep it."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="microseconds")


def put_study(engine: sa.Engine, uid: str, *, state: str = "receiving", seconds_ago: float = 0, **values: Any) -> None:
    """A study last received ``seconds_ago``."""
    row = {
        "study_instance_uid": uid,
        "state": state,
        "protocol": "dimse",
        "calling_ae": "CT1",
        "called_ae": "CAREGRID",
        "address": "127.0.0.1",
        "first_received_at": ago(seconds_ago + 10),
        "last_received_at": ago(seconds_ago),
        "number_of_instances": 1,
        "number_of_series": 1,
    }
    with writing(engine) as connection:
        connection.execute(study.insert().values(**(row | values)))


def put_run(engine: sa.Engine, study_uid: str, workflow: str, *, state: str = "queued", **values: Any) -> str:
    """A run of a workflow on generation 0 of a study; its id."""
    key = run_id(study_uid, 0, workflow)
    row = {
        "id": key,
        "study_instance_uid": study_uid,
        "generation": 0,
        "workflow": workflow,
        "revision": "r",
        "models": {},
        "priority": "routine",
        "state": state,
        "created_at": now(),
    }
    with writing(engine) as connection:
        connection.execute(run.insert().values(**(row | values)))
    return key


def put_result(engine: sa.Engine, run_key: str, study_uid: str, sop_uid: str, path: str = "x.dcm", **values: Any) -> None:
    """A valid result object of a run."""
    row = {
        "sop_instance_uid": sop_uid,
        "run_id": run_key,
        "task_id": "t",
        "study_instance_uid": study_uid,
        "series_instance_uid": "1.9",
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.88.34",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "kind": "dicom_sr",
        "path": path,
        "sha256": "0",
        "size": 1,
        "state": "valid",
        "validation": {},
        "created_at": now(),
    }
    with writing(engine) as connection:
        connection.execute(result.insert().values(**(row | values)))


def deliveries(engine: sa.Engine) -> list[dict[str, Any]]:
    """All rows of the outbox."""
    with reading(engine) as connection:
        return [dict(row) for row in connection.execute(sa.select(delivery).order_by(delivery.c.id)).mappings()]


def state_of(engine: sa.Engine, study_uid: str) -> str:
    """A study's state."""
    with reading(engine) as connection:
        return str(connection.scalar(sa.select(study.c.state).where(study.c.study_instance_uid == study_uid)))
