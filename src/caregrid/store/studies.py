"""Studies as the engine needs them: read whole, and moved from state to state with a record of who and why."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from caregrid.domain.states import check_transition
from caregrid.domain.study import InstanceRef, SeriesRef, Source, StudyRef
from caregrid.errors import NotFound
from caregrid.store import audit
from caregrid.store.tables import instance, now, run, series, study

#: States in which a study waits for instances rather than for the engine.
OPEN_STATES = ("receiving", "held")

_RUN_NAMESPACE = uuid.UUID("5b1b6a3e-6d0e-4f0c-9d57-0f6f0f2c7c11")


def run_id(study_instance_uid: str, generation: int, workflow: str) -> str:
    """The id of the one run of a workflow on a study generation: the same whoever works it out, and no patient data."""
    return str(uuid.uuid5(_RUN_NAMESPACE, f"{study_instance_uid}/{generation}/{workflow}"))


def load_study(connection: sa.Connection, folder: Path, study_instance_uid: str) -> StudyRef:
    """The study with its series and instances (first copies only). Raises NotFound."""
    row = study_row(connection, study_instance_uid)
    query = (
        sa.select(instance, series.c.modality, series.c.series_description, series.c.series_number)
        .join(series, series.c.series_instance_uid == instance.c.series_instance_uid)
        .where(instance.c.study_instance_uid == study_instance_uid, instance.c.copy == 0)
        .order_by(series.c.series_number, instance.c.series_instance_uid, instance.c.instance_number, instance.c.sop_instance_uid)
    )
    grouped: dict[str, list[Any]] = {}
    for each in connection.execute(query):
        grouped.setdefault(each.series_instance_uid, []).append(each)
    return StudyRef(
        study_instance_uid=study_instance_uid,
        generation=row["generation"],
        source=Source(row["protocol"], row["calling_ae"], row["called_ae"], row["address"]),
        series=tuple(_series_ref(uid, rows, folder) for uid, rows in grouped.items()),
    )


def _series_ref(uid: str, rows: list[Any], folder: Path) -> SeriesRef:
    instances = tuple(
        InstanceRef(each.sop_instance_uid, each.sop_class_uid, uid, each.transfer_syntax_uid, folder / each.path) for each in rows
    )
    return SeriesRef(uid, rows[0].modality, rows[0].series_description, instances)


def study_row(connection: sa.Connection, study_instance_uid: str) -> dict[str, Any]:
    """The study's row. Raises NotFound."""
    row = connection.execute(sa.select(study).where(study.c.study_instance_uid == study_instance_uid)).mappings().first()
    if row is None:
        raise NotFound(thing="study", key=study_instance_uid)
    return dict(row)


def move_study(connection: sa.Connection, study_instance_uid: str, new: str, *, who: str, why: str, **changes: Any) -> None:
    """Change a study's state by the state table, with its audit record, in the caller's transaction."""
    old = study_row(connection, study_instance_uid)["state"]
    if old != new:
        check_transition("study", old, new)
    connection.execute(
        study.update().where(study.c.study_instance_uid == study_instance_uid).values(state=new, state_reason=why, **changes)
    )
    audit.append(
        connection,
        who=who,
        what=f"study {new}",
        subject=f"study:{study_instance_uid}",
        why=why,
        detail={"from": old},
    )


def run_row(connection: sa.Connection, run_key: str) -> dict[str, Any]:
    """The run's row. Raises NotFound."""
    row = connection.execute(sa.select(run).where(run.c.id == run_key)).mappings().first()
    if row is None:
        raise NotFound(thing="run", key=run_key)
    return dict(row)


def move_run(connection: sa.Connection, run_key: str, new: str, *, who: str, why: str, **changes: Any) -> None:
    """Change a run's state by the state table, with its audit record; then settle its study."""
    row = run_row(connection, run_key)
    if row["state"] != new:
        check_transition("run", row["state"], new)
    finished = {"finished_at": now()} if new in ("done", "failed", "parked", "cancelled") else {}
    connection.execute(run.update().where(run.c.id == run_key).values(state=new, state_reason=why, **finished, **changes))
    audit.append(connection, who=who, what=f"run {new}", subject=f"run:{run_key}", why=why, detail={"from": row["state"]})
    settle_study(connection, row["study_instance_uid"])


def settled_state(run_states: list[str]) -> tuple[str, str]:
    """What a study is, given its current runs' states, and in words."""
    counts = {state: run_states.count(state) for state in sorted(set(run_states))}
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    if any(state in ("queued", "running", "delivering") for state in run_states):
        return "processing", f"runs: {words}"
    if "awaiting-review" in run_states:
        return "awaiting-review", f"runs: {words}"
    if any(state in ("failed", "parked") for state in run_states):
        return "failed", f"runs: {words}"
    if run_states and all(state == "cancelled" for state in run_states):
        return "cancelled", f"runs: {words}"
    return "done", f"runs: {words}"


def settle_study(connection: sa.Connection, study_instance_uid: str) -> None:
    """Bring the study's state in line with its runs; does nothing while it is still receiving or held."""
    row = study_row(connection, study_instance_uid)
    if row["state"] in OPEN_STATES:
        return
    states = list(
        connection.scalars(
            sa.select(run.c.state).where(run.c.study_instance_uid == study_instance_uid, run.c.generation == row["generation"])
        )
    )
    if not states:
        return
    new, words = settled_state(states)
    if new == row["state"]:
        connection.execute(study.update().where(study.c.study_instance_uid == study_instance_uid).values(state_reason=words))
    else:
        move_study(connection, study_instance_uid, new, who="caregrid", why=words)
