"""Taking a result back: a rejection note (IHE IOCM) to wherever the result went, and nothing more sent of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydicom import Dataset

from caregrid.domain.codes import Code
from caregrid.engine import outbox
from caregrid.engine.kept import KeptResults
from caregrid.engine.tasks import Equipment, record_result
from caregrid.errors import StateError
from caregrid.registry.registry import Registry
from caregrid.results import ResultContext
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.studies import load_study, run_row
from caregrid.store.tables import delivery, result

#: Titles of a rejection note (PS3.16 CID 7011).
REASONS = {
    "quality": Code("113001", "DCM", "Rejected for Quality Reasons"),
    "safety": Code("113037", "DCM", "Rejected for Patient Safety Reasons"),
}

WriteNote = Callable[[ResultContext, Sequence[Path], Code], Dataset]


class Withdrawal:
    """Withdraws the results of a run."""

    def __init__(
        self, engine: sa.Engine, folder: Path, registry: Registry, kept: KeptResults, equipment: Equipment, note: WriteNote
    ) -> None:
        self.engine, self.folder, self.registry = engine, folder, registry
        self.kept, self.equipment, self.note = kept, equipment, note

    def withdraw(self, run_id: str, who: str, why: str, reason: str = "quality") -> int:
        """Withdraw everything the run made; returns how many objects. Raises NotFound, StateError when there is nothing."""
        with reading(self.engine) as connection:
            run = run_row(connection, run_id)
            valid = sa.select(result).where(result.c.run_id == run_id, result.c.state == "valid", result.c.kind != "dicom_kos")
            rows = [dict(row) for row in connection.execute(valid).mappings()]
        if not rows:
            raise StateError(reason="the run has no result that could be withdrawn")
        sent = self._where_sent(run_id)
        notes = {
            place: self._write_note(run, [row for row in rows if row["sop_instance_uid"] in uids], reason, place)
            for place, uids in sent.items()
        }
        with writing(self.engine) as connection:
            self._record(connection, run, rows, notes, who, why)
        return len(rows)

    def _where_sent(self, run_id: str) -> dict[str, set[str]]:
        """Destination → objects that went there, or may have."""
        query = sa.select(delivery.c.destination, delivery.c.sop_instance_uid).where(
            delivery.c.run_id == run_id, sa.or_(delivery.c.state.in_(("delivered", "sending")), delivery.c.attempts > 0)
        )
        places: dict[str, set[str]] = {}
        with reading(self.engine) as connection:
            for row in connection.execute(query):
                places.setdefault(row.destination, set()).add(row.sop_instance_uid)
        return places

    def _write_note(self, run: dict[str, Any], rows: list[dict[str, Any]], reason: str, place: str) -> Any:
        with reading(self.engine) as connection:
            study = load_study(connection, self.folder, run["study_instance_uid"])
        digest = next(iter(run["models"].values()))
        manifest = self.registry.manifest(digest)
        moment = datetime.now(UTC)
        context = ResultContext(
            source_files=(study.series[0].instances[0].path,),
            manifest=manifest,
            run_id=run["id"],
            task_id="withdraw",
            uid_seed=f"{run['id']}/withdraw/{place}/{','.join(sorted(row['sop_instance_uid'] for row in rows))}",
            started_at=moment,
            written_at=moment,
            device_serial=self.equipment.device_serial,
            institution=self.equipment.institution,
            station_name=self.equipment.station_name,
            software_version=self.equipment.software_version,
        )
        dataset = self.note(context, [self.folder / row["path"] for row in rows], REASONS[reason])
        return self.kept.keep(self.kept.folder(run["id"], "withdraw"), "dicom_kos", dataset)

    def _record(
        self,
        connection: sa.Connection,
        run: dict[str, Any],
        rows: list[dict[str, Any]],
        notes: dict[str, Any],
        who: str,
        why: str,
    ) -> None:
        uids = [row["sop_instance_uid"] for row in rows]
        connection.execute(result.update().where(result.c.sop_instance_uid.in_(uids)).values(state="withdrawn"))
        connection.execute(
            delivery.update()
            .where(delivery.c.sop_instance_uid.in_(uids), delivery.c.state.in_(("pending", "parked")))
            .values(state="cancelled", last_error="withdrawn")
        )
        for place, made in notes.items():
            record_result(connection, run, "withdraw", made)
            outbox.put(connection, run, made.sop_instance_uid, place)
        audit.append(
            connection,
            who=who,
            what="result withdrawn",
            subject=f"run:{run['id']}",
            why=why,
            detail={"objects": uids, "told": sorted(notes)},
        )
        outbox.settle_run(connection, run["id"])
