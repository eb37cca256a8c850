"""How each kind of task is done: select, run, branch, join, review, deliver, notify."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import sqlalchemy as sa
import structlog
from pydicom import Dataset
from pydicom.errors import InvalidDicomError

from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Findings
from caregrid.domain.study import SeriesRef, StudyRef
from caregrid.domain.workflow import RESULT_FORMATS, Condition
from caregrid.engine import outbox
from caregrid.engine.conditions import choose_case, select_series
from caregrid.engine.flow import Done, Job
from caregrid.engine.judge import cached_headers
from caregrid.engine.kept import KeptResults, MadeResult
from caregrid.errors import NoSuitableInput, ResultInvalid, WorkflowError
from caregrid.registry.registry import Registry
from caregrid.results import (
    Apart,
    Predecessor,
    ResultContext,
    Reviewer,
    make_uid,
    read_header,
    tracking_uid,
    unwritable,
)
from caregrid.runtime.exchange import finding_as_json
from caregrid.runtime.runtime import Answer, Runtime
from caregrid.store import audit
from caregrid.store.database import reading
from caregrid.store.studies import load_study
from caregrid.store.tables import finding, notification, now, result, review, run

log = structlog.get_logger()

_ASKED_FOR = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "Rows",
    "Columns",
)


@dataclass(frozen=True)
class Equipment:
    """How this site names itself in the objects it makes."""

    institution: str
    station_name: str
    device_serial: str
    software_version: str


class Tasks:
    """Does tasks. One per worker process; ``work`` maps a kind to its method."""

    def __init__(
        self,
        engine: sa.Engine,
        folder: Path,
        registry: Registry,
        runtime: Runtime,
        kept: KeptResults,
        destinations: Collection[str],
        equipment: Equipment,
    ) -> None:
        self.engine, self.folder = engine, folder
        self.registry, self.runtime, self.kept = registry, runtime, kept
        self.destinations, self.equipment = destinations, equipment
        self.apart = Apart()

    @property
    def work(self) -> dict[str, Callable[[Job], Done]]:
        """Task kind → how it is done."""
        return {
            "select": self.select,
            "run": self.run,
            "branch": self.branch,
            "join": lambda job: Done({}),
            "review": self.review,
            "deliver": self.deliver,
            "notify": self.notify,
        }

    def _study(self, job: Job) -> StudyRef:
        with reading(self.engine) as connection:
            return load_study(connection, self.folder, job.run["study_instance_uid"])

    # select ---------------------------------------------------------------------------------------------------------

    def select(self, job: Job) -> Done:
        """Choose series; the output names them, so that a retry runs on the same ones."""
        options = job.task.options
        chosen, reason = select_series(options.get("series"), options.get("choose", "all"), self._study(job), cached_headers())
        if not chosen:
            raise NoSuitableInput(input=job.task.id, reason=reason)
        output: dict[str, Any] = {
            "series": {each.series_instance_uid: [one.sop_instance_uid for one in each.instances] for each in chosen}
        }
        if options.get("frames"):
            output["frames"] = list(options["frames"])
        return Done(output, reason=reason)

    def _input(self, job: Job) -> tuple[dict[str, list[Path]], dict[str, Any]]:
        """The files by series that a run task reads, and parameters the selection adds."""
        study_ref = self._study(job)
        chosen = job.stands[job.task.options["input"]].output if job.task.options.get("input") else {}
        wanted: dict[str, list[str]] | None = chosen.get("series")
        files = {each.series_instance_uid: _paths(each, wanted) for each in study_ref.series}
        parameters = {"frames": chosen["frames"]} if "frames" in chosen else {}
        return {uid: paths for uid, paths in files.items() if paths}, parameters

    # run ------------------------------------------------------------------------------------------------------------

    def run(self, job: Job) -> Done:
        """Run the pinned model on its input and write its results down, once."""
        manifest, package = self.registry.load(job.run["models"][job.task.id])
        folder = self.kept.folder(job.run["id"], job.task.id)
        findings, seconds = self.kept.findings(folder, manifest), None
        ahead: Callable[[Path], Dataset] = read_header
        if findings is None:
            answer, ahead = self._compute(job, manifest, package)
            findings, seconds = answer.findings, answer.algorithm_seconds
            self.kept.keep_findings(folder, findings, answer.files)
            self.runtime.forget(answer)
        context = dataclasses.replace(self._context(job, manifest, findings), read=ahead)
        made = self.kept.write(folder, context, findings, RESULT_FORMATS, self.apart)
        bad = [each for each in made if each.errors]
        if bad:
            self._record_invalid(job, made)
            raise ResultInvalid(kind=bad[0].kind, reason="; ".join(bad[0].errors[:3]))
        without = [
            f"no SEG is written for {label}: its pictures have no place in the patient" for label in unwritable(context, findings)
        ]
        return Done(
            {"summary": findings.summary, "values": findings.values, "warnings": [*findings.warnings, *without]},
            write=lambda connection: self._record(connection, job, manifest, findings, made),
            reason=findings.summary,
            algorithm_seconds=seconds,
        )

    def _compute(self, job: Job, manifest: Manifest, package: Path) -> tuple[Answer, Callable[[Path], Dataset]]:
        """The algorithm's answer, and the headers of its input, which are read while it computes."""
        files, extra = self._input(job)
        parameters = dict(job.task.options.get("parameters", {})) | extra
        wanted = StillWanted(self.engine, job.run["id"])
        paths = [path for series in files.values() for path in series]
        if any(output.kind == "segment" for output in manifest.outputs):
            self.apart.expect(paths)
        with HeadersAhead(paths) as ahead:
            answer = self.runtime.answer(
                manifest, package, files, parameters, job.task.timeout_seconds, stop=lambda: not wanted()
            )
        return answer, ahead

    def _context(self, job: Job, manifest: Manifest, findings: Findings, reviewer: Reviewer | None = None) -> ResultContext:
        used = set(findings.used_instances)
        study_ref = self._study(job)
        files = [
            one.path
            for each in study_ref.series
            for one in each.instances
            if one.sop_instance_uid in used or (not used and not _is_result(each))
        ]
        return ResultContext(
            source_files=tuple(files),
            manifest=manifest,
            run_id=job.run["id"],
            task_id=job.task.id,
            uid_seed=f"{job.run['id']}/{job.task.id}{'/reviewed' if reviewer else ''}",
            started_at=datetime.fromisoformat(job.run["started_at"] or now()),
            written_at=reviewer.at if reviewer else self.kept.finished_at(self.kept.folder(job.run["id"], job.task.id)),
            device_serial=self.equipment.device_serial,
            institution=self.equipment.institution,
            station_name=self.equipment.station_name,
            software_version=self.equipment.software_version,
            supersedes=self._unverified(job) if reviewer else (),
            reviewed=reviewer,
        )

    def _unverified(self, job: Job) -> tuple[Predecessor, ...]:
        """The report of the task as it was before a clinician looked at it."""
        uid = make_uid(f"{job.run['id']}/{job.task.id}", "dicom_sr", "instance", 1)
        with reading(self.engine) as connection:
            row = connection.execute(sa.select(result).where(result.c.sop_instance_uid == uid)).mappings().first()
        return (Predecessor(row["sop_class_uid"], uid, row["series_instance_uid"]),) if row else ()

    def _record(
        self, connection: sa.Connection, job: Job, manifest: Manifest, findings: Findings, made: Sequence[MadeResult]
    ) -> None:
        """The rows of a finished run task; leaves alone what an earlier attempt already wrote."""
        uid = job.run["study_instance_uid"]
        where = (finding.c.run_id == job.run["id"], finding.c.task_id == job.task.id)
        connection.execute(finding.delete().where(*where))
        for each in findings.findings:
            connection.execute(
                finding.insert().values(
                    run_id=job.run["id"],
                    task_id=job.task.id,
                    tracking_id=each.tracking_id,
                    tracking_uid=tracking_uid(uid, manifest.name, each.tracking_id),
                    study_instance_uid=uid,
                    algorithm=manifest.name,
                    version=manifest.version,
                    summary=findings.summary,
                    content=finding_as_json(each),
                )
            )
        for one in made:
            record_result(connection, job.run, job.task.id, one)
        audit.append(
            connection,
            who="caregrid",
            what="algorithm finished",
            subject=f"run:{job.run['id']}",
            why=f"task {job.task.id}",
            detail={"model": manifest.reference, "digest": manifest.digest, "objects": [one.sop_instance_uid for one in made]},
        )

    def _record_invalid(self, job: Job, made: Sequence[MadeResult]) -> None:
        with self.engine.begin() as connection:
            for one in made:
                record_result(connection, job.run, job.task.id, one)

    # branch ---------------------------------------------------------------------------------------------------------

    def branch(self, job: Job) -> Done:
        """Take the first case that holds, else ``otherwise``."""
        values = {name: stand.output.get("values", {}) for name, stand in job.stands.items() if stand.state == "done"}
        cases: Sequence[tuple[str, Condition]] = job.task.options["cases"]
        name, reason = choose_case(cases, job.task.options["otherwise"], self._study(job), cached_headers(), values)
        return Done({"case": name}, reason=reason)

    # review ---------------------------------------------------------------------------------------------------------

    def review(self, job: Job) -> Done:
        """Open a review: a row, not a waiting thread. The run goes on when a clinician has decided."""
        options = job.task.options

        def write(connection: sa.Connection) -> None:
            key = (review.c.run_id == job.run["id"], review.c.task_id == job.task.id)
            if connection.scalar(sa.select(sa.func.count()).select_from(review).where(*key)):
                return
            connection.execute(
                review.insert().values(
                    run_id=job.run["id"],
                    task_id=job.task.id,
                    study_instance_uid=job.run["study_instance_uid"],
                    state="open",
                    roles=list(options.get("roles") or ("clinician",)),
                    question=options.get("question") or options.get("reason") or "",
                    of_tasks=list(options["of"]),
                    opened_at=now(),
                )
            )

        return Done({}, write=write, reason="a clinician is asked", open=True)

    # deliver --------------------------------------------------------------------------------------------------------

    def deliver(self, job: Job) -> Done:
        """Put results in the outbox; the run is done when their receivers have said so."""
        options = job.task.options
        unknown = [name for name in options["destinations"] if name not in self.destinations]
        if unknown:
            raise WorkflowError(reason=f"task {job.task.id} names a destination this site does not have: {unknown[0]}")
        ready = [name for name in options["results"] if job.stands[name].state == "done"]
        if not ready:
            return Done({"objects": []}, reason="no result to deliver")
        decisions = self._decisions(job)
        objects: list[str] = []
        writes: list[tuple[str, MadeResult]] = []
        for name in ready:
            decision = decisions.get(name)
            if decision and decision["state"] == "rejected":
                continue
            if options.get("only_if_accepted") and not decision:
                continue
            verified = self._verified(job, name, decision) if decision else []
            writes += [(name, each) for each in verified]
            objects += self._objects(job, name, options["formats"], {each.kind for each in verified})
            objects += [each.sop_instance_uid for each in verified if each.kind in options["formats"]]

        def write(connection: sa.Connection) -> None:
            for name, each in writes:
                record_result(connection, job.run, name, each)
            for uid in objects:
                for destination in options["destinations"]:
                    outbox.put(connection, job.run, uid, destination)

        words = f"{len(objects)} objects to {', '.join(options['destinations'])}"
        return Done(
            {"objects": objects}, write=write, reason=words if objects else "nothing to deliver: not accepted by a clinician"
        )

    def _decisions(self, job: Job) -> dict[str, dict[str, Any]]:
        """Run task → the latest clinician's decision that covers it."""
        query = (
            sa.select(review)
            .where(review.c.run_id == job.run["id"], review.c.decided_at.is_not(None))
            .order_by(review.c.decided_at)
        )
        with reading(self.engine) as connection:
            rows = connection.execute(query).mappings().all()
        return {name: dict(row) for row in rows for name in row["of_tasks"]}

    def _objects(self, job: Job, task_id: str, formats: Collection[str], replaced: Collection[str]) -> list[str]:
        query = sa.select(result.c.sop_instance_uid).where(
            result.c.run_id == job.run["id"],
            result.c.task_id == task_id,
            result.c.state == "valid",
            result.c.kind.in_([each for each in formats if each not in replaced]),
        )
        with reading(self.engine) as connection:
            return list(connection.scalars(query))

    def _verified(self, job: Job, task_id: str, decision: Mapping[str, Any]) -> list[MadeResult]:
        """The SR again, verified by the clinician who decided, with their corrections."""
        manifest, _ = self.registry.load(job.run["models"][task_id])
        folder = self.kept.folder(job.run["id"], task_id)
        findings = self.kept.findings(folder, manifest)
        if findings is None:
            return []
        corrected = self.kept.corrected(findings, decision["corrections"] or {})
        reviewer = Reviewer(
            name=decision["decided_by"],
            organisation=self.equipment.institution,
            at=datetime.fromisoformat(decision["decided_at"]),
            decision=decision["state"],
        )
        run_job = Job(job.run, job.workflow, job.workflow.task(task_id), job.stands, 1)
        context = self._context(run_job, manifest, findings, reviewer)
        made = self.kept.write_verified(folder, context, corrected)
        if made.errors:
            raise ResultInvalid(kind=made.kind, reason="; ".join(made.errors[:3]))
        return [made]

    # notify ---------------------------------------------------------------------------------------------------------

    def notify(self, job: Job) -> Done:
        """Tell someone. The message is the workflow author's own words: no patient data is filled in."""
        options = job.task.options
        channel, to, message = options.get("channel", "log"), options.get("to", ""), options.get("message", "")
        state = "sent"
        if channel == "webhook":
            state = _post(to, {"run": job.run["id"], "workflow": job.workflow.name, "message": message})
        else:
            log.info("notification", run=job.run["id"], workflow=job.workflow.name, message=message)

        def write(connection: sa.Connection) -> None:
            connection.execute(
                notification.insert().values(
                    at=now(),
                    run_id=job.run["id"],
                    study_instance_uid=job.run["study_instance_uid"],
                    channel=channel,
                    recipient=to,
                    message=message,
                    state=state,
                )
            )

        return Done({"state": state}, write=write, reason=f"{channel}: {state}")


class HeadersAhead:
    """Reads headers in a thread of its own while the algorithm, in another process, computes. Called: a file's header.

    Each header is handed out once: who takes it may change it. It stops reading ahead at the end of the ``with`` block.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._read: dict[Path, Dataset] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="headers-ahead", daemon=True)

    def __enter__(self) -> HeadersAhead:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        for path in self._paths:
            if self._stop.is_set():
                return
            try:
                self._read[path] = _touched(read_header(path))
            except (OSError, ValueError, InvalidDicomError):
                return  # whoever needs the header of this file reads it again, and says what is wrong with it

    def __call__(self, path: Path) -> Dataset:
        """The header of ``path``."""
        return self._read.pop(path) if path in self._read else read_header(path)


def _touched(header: Dataset) -> Dataset:
    """The header with what every writer asks for turned into values already."""
    for keyword in _ASKED_FOR:
        header.get(keyword)
    return header


class StillWanted:
    """Whether a run is still to be carried out; asks the database at most once a second."""

    def __init__(self, engine: sa.Engine, run_id: str) -> None:
        self.engine, self.run_id = engine, run_id
        self._asked, self._answer = time.monotonic(), True

    def __call__(self) -> bool:
        """False once the run was cancelled."""
        if self._answer and time.monotonic() - self._asked >= 1.0:
            self._asked = time.monotonic()
            with reading(self.engine) as connection:
                self._answer = connection.scalar(sa.select(run.c.state).where(run.c.id == self.run_id)) == "running"
        return self._answer


def record_result(connection: sa.Connection, run_row: Mapping[str, Any], task_id: str, made: MadeResult) -> None:
    """The row of a result object; an existing one stays (objects are written once)."""
    if connection.scalar(sa.select(result.c.state).where(result.c.sop_instance_uid == made.sop_instance_uid)):
        return
    connection.execute(
        result.insert().values(
            sop_instance_uid=made.sop_instance_uid,
            run_id=run_row["id"],
            task_id=task_id,
            study_instance_uid=run_row["study_instance_uid"],
            series_instance_uid=made.series_instance_uid,
            sop_class_uid=made.sop_class_uid,
            transfer_syntax_uid=made.transfer_syntax_uid,
            kind=made.kind,
            path=made.path,
            sha256=made.sha256,
            size=made.size,
            state="invalid" if made.errors else "valid",
            validation={"errors": list(made.errors), "warnings": list(made.warnings)},
            created_at=now(),
        )
    )


def _paths(series: SeriesRef, wanted: Mapping[str, Sequence[str]] | None) -> list[Path]:
    if wanted is None:
        return [] if _is_result(series) else [one.path for one in series.instances]
    chosen = set(wanted.get(series.series_instance_uid, ()))
    return [one.path for one in series.instances if one.sop_instance_uid in chosen]


def _is_result(series: SeriesRef) -> bool:
    return series.modality in ("SEG", "SR", "KO", "PR")


def _post(url: str, body: dict[str, Any]) -> str:
    try:
        httpx.post(url, json=body, timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        log.warning("webhook failed", error=type(error).__name__)
        return "failed"
    return "sent"
