"""A site's database with a bit of everything in it, and actions that change it through SQL as the engine does.

For the web pages' tests: realistic rows in every state, a real secondary capture on disk, real argon2 passwords.
"""

from __future__ import annotations

import atexit
import hashlib
import random
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import sqlalchemy as sa
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian

from caregrid.domain.settings import Destination, SiteSettings, WebSettings
from caregrid.domain.states import check_transition
from caregrid.errors import AlreadyDecided, DeliveryFailed, NotFound
from caregrid.store import audit, tables, users
from caregrid.store.database import create_all, open_engine, writing
from caregrid.store.tables import now
from caregrid.web.actions import Actions

PASSWORD = "correct horse battery"
PEOPLE = {
    "clare": ("Dr Clare Okafor", ["clinician"]),
    "oliver": ("Oliver Hughes", ["operator"]),
    "grace": ("Grace Patel", ["governance"]),
    "adam": ("Adam Novak", ["admin"]),
}
CANARY = "<script>window.canary=1</script>"

WORKFLOW_TEXT = """name: ct-chest
description: Lung volume on every chest CT
owner: imaging.ai@hospital.example
priority: routine
when:
  any_series:
    Modality: {equals: CT}
    BodyPartExamined: {in: [CHEST, THORAX]}
tasks:
  - id: lungs
    run: lung-volume
  - id: check
    review: {of: [lungs], roles: [clinician]}
  - id: send
    deliver: {results: [lungs], destinations: [pacs]}
"""

MANIFEST = {
    "name": "lung-volume",
    "version": "1.2.0",
    "title": "Lung volume on CT",
    "runner": "python",
    "entry": "lung_volume:run",
    "intended_use": "Measures the volume of both lungs on chest CT, to support reporting. Not for diagnosis on its own.",
    "regulatory_status": "Not a medical device: for evaluation only",
    "manufacturer": "caregrid",
    "inputs": [
        {
            "name": "chest",
            "form": "volume",
            "modality": ["CT"],
            "where": {},
            "minimum_instances": 20,
            "many": False,
            "optional": False,
        }
    ],
    "outputs": [
        {"name": "volume", "kind": "measurement", "concept": ["118565006", "SCT", "Volume"], "unit": ["ml", "UCUM", "ml"]},
        {"name": "lung", "kind": "segment", "concept": ["39607008", "SCT", "Lung"], "unit": None},
    ],
    "resources": {"memory_mb": 4096, "cpus": 2, "gpu": False},
    "timeout_seconds": 300,
    "parameters": {"threshold": -500},
    "model_card": "README.md",
}
CARD = """# Lung volume on CT

Thresholding and region growing. Compared with 20 hand-drawn masks: Dice 0.97.

Limits: fails on pneumothorax.
"""


@dataclass
class Site:
    """What the factory made. uids: name → Study Instance UID; log: what the actions were asked."""

    engine: sa.Engine
    folder: Path
    settings: SiteSettings
    uids: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    log: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def actions(self) -> Actions:
        return make_actions(self)


def make_site(folder: Path) -> Site:
    """A site with studies in every state. folder holds the database and the store's files (made once, then copied)."""
    pattern = _pattern()
    shutil.copytree(pattern.settings.home, folder, dirs_exist_ok=True)
    return replace(_open(folder), uids=dict(pattern.uids), runs=dict(pattern.runs))


@cache
def _pattern() -> Site:
    folder = Path(tempfile.mkdtemp(prefix="caregrid-site-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    site = _open(folder)
    create_all(site.engine)
    _people(site)
    _registry(site)
    _studies(site)
    _operations(site)
    site.engine.dispose()
    return site


def _open(folder: Path) -> Site:
    engine = open_engine(f"sqlite:///{folder}/site.db")
    settings = SiteSettings(
        name="St Elsewhere’s",
        home=folder,
        data=folder / "data",
        database_url="",
        web=WebSettings(),
        destinations=(
            Destination(name="pacs", kind="cstore", host="10.1.0.5", port=104, ae_title="PACS"),
            Destination(name="archive", kind="stow", url="https://vna.hospital.example/dicom-web"),
            Destination(name="drop", kind="folder", path=folder / "drop"),
        ),
    )
    return Site(engine, folder / "data" / "store", settings)


def _people(site: Site) -> None:
    hashed = _password_hash()
    with writing(site.engine) as connection:
        for name, (full_name, roles) in PEOPLE.items():
            row = {"name": name, "full_name": full_name, "password_hash": hashed, "roles": roles, "active": True}
            connection.execute(tables.user.insert().values(**row, failed_logins=0, created_at=now()))
            detail = {"roles": roles}
            audit.append(
                connection, who="cli:root", what="created user", subject=f"user:{name}", why="first users", detail=detail
            )


@cache
def _password_hash() -> str:
    return users._hasher.hash(PASSWORD)


def _registry(site: Site) -> None:
    package = site.settings.data / "models" / "packages" / "lung-volume-1.2.0"
    package.mkdir(parents=True)
    (package / "README.md").write_text(CARD, encoding="utf-8")
    with writing(site.engine) as connection:
        connection.execute(
            tables.trusted_key.insert().values(
                key_id="ab" * 32, name="hospital AI board", public_key="-", who="cli:root", at=now()
            )
        )
        for version, state, signed in (("1.2.0", "active", "ab" * 32), ("1.1.0", "retired", "ab" * 32), ("1.3.0", "added", "")):
            connection.execute(
                tables.model.insert().values(
                    digest=digest(version),
                    name="lung-volume",
                    version=version,
                    manifest={**MANIFEST, "version": version},
                    path="packages/lung-volume-1.2.0",
                    state=state,
                    signed_by=signed,
                    expires_at=ago(days=-300) if signed else None,
                    added_at=ago(days=30),
                )
            )
        for revision, active in (("1a2b3c4d5e6f", False), ("6f5e4d3c2b1a", True)):
            values = {"name": "ct-chest", "revision": revision, "source_text": WORKFLOW_TEXT, "active": active}
            connection.execute(
                tables.workflow_revision.insert().values(**values, who="oliver", why="Approved at AI board", at=ago(days=20))
            )


def digest(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()


def ago(days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0) -> str:
    past = datetime.now(UTC) - timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    return past.isoformat(timespec="microseconds")


def _studies(site: Site) -> None:
    plan = [
        # key, name, study state, run state, priority, review
        ("waiting", "Ahmed^Yusuf^^Mr", "awaiting-review", "awaiting-review", "routine", "open"),
        ("urgent", "Byrne^Niamh^^Mrs", "awaiting-review", "awaiting-review", "emergency", "open"),
        ("accepted", "Carter^James", "done", "done", "routine", "accepted"),
        ("rejected", "Davies^Rhiannon", "done", "done", "routine", "rejected"),
        ("corrected", "Evans^Thomas", "done", "done", "off-peak", "corrected"),
        ("unasked", "Fraser^Isla", "done", "done", "routine", ""),
        ("queued", "Green^Harold", "processing", "queued", "routine", ""),
        ("running", "Hussain^Aisha", "processing", "running", "emergency", ""),
        ("failed", "Iqbal^Sana", "failed", "failed", "routine", ""),
        ("parked", "Jones^Megan", "processing", "parked", "routine", ""),
        ("cancelled", "Kaur^Simran", "cancelled", "cancelled", "routine", ""),
        ("nothing", "Lewis^Peter", "no-workflow", "", "routine", ""),
        ("held", "Murphy^Sean", "held", "", "routine", ""),
        ("receiving", "Nowak^Zofia", "receiving", "", "routine", ""),
        ("canary", f"{CANARY}^Bobby", "awaiting-review", "awaiting-review", "routine", "open"),
    ]
    for number, (key, name, state, run_state, priority, review) in enumerate(plan):
        add_study(site, key, name, state, run_state, priority, review, number)


def add_study(
    site: Site, key: str, name: str, state: str, run_state: str, priority: str, review: str, number: int, pixels: bool = True
) -> str:
    """One study with its run, tasks, findings, results, deliveries and review, as far as its states say they exist."""
    uid = f"1.2.826.0.1.3680043.8.498.{1000 + number}"
    site.uids[key] = uid
    arrived, hours = ago(hours=number + 2), number + 2
    description = f"CT chest {CANARY}" if key == "canary" else "CT chest with contrast"
    with writing(site.engine) as connection:
        connection.execute(
            tables.study.insert().values(
                study_instance_uid=uid,
                generation=0,
                state=state,
                state_reason=_reason(state),
                patient_id=f"943 476 {5900 + number}",
                patient_name=name,
                patient_birth_date=f"19{40 + number * 3}0412",
                patient_sex="FMO"[number % 3],
                accession_number=f"RXH{20260000 + number}",
                study_date="20261120",
                study_time="1405",
                study_description=description,
                referring_physician_name="Osei^Kwame^^Dr",
                modalities="CT",
                number_of_series=2,
                number_of_instances=31 if state == "held" else 64,
                protocol="dimse",
                calling_ae="CT_SCANNER_1",
                called_ae="CAREGRID",
                address="10.2.3.4",
                first_received_at=arrived,
                last_received_at=ago(hours=hours - 0.1),
                completed_at=None if state in ("receiving", "held") else ago(hours=hours - 0.2),
                expected_instances=64,
                completion=None
                if state == "receiving"
                else {"quiet_seconds": 30, "instances": 64, "expected": 64, "by": "quiet time and count"},
                late_instances=0,
                conflicts=1 if key == "rejected" else 0,
            )
        )
        _series(connection, uid, description, arrived)
        audit.append(
            connection, who="intake:dimse", what="study received", subject=f"study:{uid}", why="C-STORE from CT_SCANNER_1"
        )
        if state not in ("receiving", "held"):
            _verdicts(connection, uid, applies=bool(run_state))
        if run_state:
            _run(connection, site, key, uid, run_state, priority, review, hours, pixels)
    return uid


def _reason(state: str) -> str:
    return {
        "held": "Only 31 of 64 expected images arrived within 1 hour",
        "failed": "Workflow ct-chest failed",
        "no-workflow": "No workflow applies",
        "cancelled": "Cancelled by oliver",
    }.get(state, "")


def _series(connection: sa.Connection, uid: str, description: str, arrived: str) -> None:
    for number in (1, 2):
        series = f"{uid}.{number}"
        connection.execute(
            tables.series.insert().values(
                series_instance_uid=series,
                study_instance_uid=uid,
                modality="CT",
                series_number=number,
                series_description=f"{description} {number}",
                body_part_examined="CHEST",
                station_name="CT1",
                number_of_instances=32,
                first_received_at=arrived,
            )
        )
        connection.execute(
            tables.instance.insert().values(
                sop_instance_uid=f"{series}.1",
                copy=0,
                study_instance_uid=uid,
                series_instance_uid=series,
                sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                sha256="0" * 64,
                size=525_000,
                path=f"instances/00/{series}.dcm",
                protocol="dimse",
                calling_ae="CT_SCANNER_1",
                called_ae="CAREGRID",
                address="10.2.3.4",
                received_at=arrived,
            )
        )


def _verdicts(connection: sa.Connection, uid: str, applies: bool) -> None:
    for workflow, yes, reason, trail in (
        (
            "ct-chest",
            applies,
            "A CT series of the chest" if applies else "No series has BodyPartExamined CHEST",
            ["Modality equals CT: yes", f"BodyPartExamined in CHEST, THORAX: {'yes' if applies else 'no'}"],
        ),
        ("mr-quality", False, "No series has Modality MR", ["Modality equals MR: no"]),
    ):
        values = {"study_instance_uid": uid, "generation": 0, "workflow": workflow, "revision": "6f5e4d3c2b1a", "applies": yes}
        connection.execute(tables.verdict.insert().values(**values, reason=reason, trail=trail, at=now()))


def _run(
    connection: sa.Connection, site: Site, key: str, uid: str, state: str, priority: str, review: str, hours: float, pixels: bool
) -> None:
    run_id = f"run-{key}"
    site.runs[key] = run_id
    finished = state in ("done", "failed", "cancelled", "parked")
    reasons = {
        "failed": "Algorithm lung-volume 1.2.0 did not finish in 300 s and was stopped",
        "parked": "Began 5 times and never ended",
    }
    connection.execute(
        tables.run.insert().values(
            id=run_id,
            study_instance_uid=uid,
            generation=0,
            workflow="ct-chest",
            revision="6f5e4d3c2b1a",
            models={"lungs": digest("1.2.0")},
            priority=priority,
            state=state,
            state_reason=reasons.get(state, ""),
            attempts=5 if state == "parked" else 1,
            worker="host-1/worker-0",
            created_at=ago(hours=hours - 0.2),
            started_at=None if state == "queued" else ago(hours=hours - 0.21),
            finished_at=ago(hours=hours - 0.25) if finished else None,
        )
    )
    _tasks(connection, run_id, state)
    audit.append(connection, who="engine", what="run queued", subject=f"run:{run_id}", why="workflow ct-chest applies")
    if state not in ("awaiting-review", "done"):
        return
    _findings(connection, run_id, uid)
    _results(connection, site, key, run_id, uid, pixels, delivered=state == "done" and review != "rejected")
    if review:
        _review(connection, run_id, uid, review, hours)


def _tasks(connection: sa.Connection, run_id: str, state: str) -> None:
    by_state = {
        "done": ("done", "done", "done"),
        "awaiting-review": ("done", "running", "waiting"),
        "queued": ("waiting", "waiting", "waiting"),
        "running": ("running", "waiting", "waiting"),
        "failed": ("failed", "skipped", "skipped"),
        "parked": ("failed", "waiting", "waiting"),
        "cancelled": ("cancelled", "cancelled", "cancelled"),
    }[state]
    for position, (task_id, kind) in enumerate((("lungs", "run"), ("check", "review"), ("send", "deliver"))):
        failed = by_state[position] == "failed"
        connection.execute(
            tables.task.insert().values(
                run_id=run_id,
                task_id=task_id,
                kind=kind,
                position=position,
                state=by_state[position],
                reason="did not finish in 300 s" if failed else "",
                attempts=3 if failed else 1,
                model_digest=digest("1.2.0") if kind == "run" else "",
                algorithm_seconds=12.4 if kind == "run" and by_state[position] == "done" else None,
                started_at=ago(hours=1),
                finished_at=ago(hours=0.9) if by_state[position] in ("done", "failed") else None,
            )
        )


def _findings(connection: sa.Connection, run_id: str, uid: str) -> None:
    for side, laterality, volume in (
        ("left", ["7771000", "SCT", "Left"], 2410.5),
        ("right", ["24028007", "SCT", "Right"], 2893.25),
    ):
        content = {
            "tracking_id": f"lung-{side}",
            "concept": ["39607008", "SCT", "Lung"],
            "site": ["39607008", "SCT", "Lung structure"],
            "laterality": laterality,
            "segment": f"Lung {side}",
            "measurements": [
                {"concept": ["118565006", "SCT", "Volume"], "value": volume, "unit": ["ml", "UCUM", "ml"], "qualifier": None},
                {
                    "concept": ["112031", "DCM", "Attenuation Coefficient"],
                    "value": -812.0,
                    "unit": ["[hnsf'U]", "UCUM", "Hounsfield unit"],
                    "qualifier": None,
                },
            ],
            "evaluations": [{"concept": ["363713009", "SCT", "Has interpretation"], "value": ["52101004", "SCT", "Present"]}],
            "source_instances": [f"{uid}.1.1"],
            "frames": [],
            "confidence": 0.93 if side == "left" else None,
        }
        connection.execute(
            tables.finding.insert().values(
                run_id=run_id,
                task_id="lungs",
                tracking_id=f"lung-{side}",
                tracking_uid=f"2.25.{random.getrandbits(100)}",
                study_instance_uid=uid,
                algorithm="lung-volume",
                version="1.2.0",
                summary="Total lung volume 5,304 ml (left 2,411 ml, right 2,893 ml)",
                content=content,
            )
        )


def _results(connection: sa.Connection, site: Site, key: str, run_id: str, uid: str, pixels: bool, delivered: bool) -> None:
    for kind, sop_class in (("dicom_sc", "1.2.840.10008.5.1.4.1.1.7"), ("dicom_sr", "1.2.840.10008.5.1.4.1.1.88.34")):
        sop = f"{uid}.90.{kind.count('c') + 1}{len(kind)}{'1' if kind == 'dicom_sc' else '2'}"
        path = f"results/{sop}.dcm"
        if kind == "dicom_sc" and pixels:
            (site.folder / "results").mkdir(parents=True, exist_ok=True)
            (site.folder / path).write_bytes(secondary_capture())
        warnings = ["Attribute InstitutionName is empty"] if kind == "dicom_sr" else []
        connection.execute(
            tables.result.insert().values(
                sop_instance_uid=sop,
                run_id=run_id,
                task_id="lungs",
                study_instance_uid=uid,
                series_instance_uid=f"{uid}.90",
                sop_class_uid=sop_class,
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                kind=kind,
                path=path,
                sha256="1" * 64,
                size=48_000,
                state="valid",
                validation={"errors": [], "warnings": warnings},
                created_at=ago(hours=1),
            )
        )
        if delivered:
            _deliveries(connection, key, run_id, uid, sop)


def _deliveries(connection: sa.Connection, key: str, run_id: str, uid: str, sop: str) -> None:
    for destination in ("pacs", "archive"):
        parked = destination == "archive" and key in ("accepted", "unasked")
        connection.execute(
            tables.delivery.insert().values(
                sop_instance_uid=sop,
                destination=destination,
                run_id=run_id,
                study_instance_uid=uid,
                state="parked" if parked else "delivered",
                attempts=14 if parked else 1,
                next_attempt_at=now(),
                last_error="Destination archive could not be reached: connection refused" if parked else "",
                receiver_said="" if parked else "0000 Success",
                created_at=ago(hours=1),
                delivered_at=None if parked else ago(minutes=50),
            )
        )


def _review(connection: sa.Connection, run_id: str, uid: str, state: str, hours: float) -> None:
    decided = state != "open"
    connection.execute(
        tables.review.insert().values(
            run_id=run_id,
            task_id="check",
            study_instance_uid=uid,
            state=state,
            roles=["clinician"],
            question="Are the lungs outlined correctly?",
            of_tasks=["lungs"],
            opened_at=ago(hours=hours - 0.3),
            first_viewed_at=ago(hours=hours - 0.5) if decided else None,
            decided_at=ago(hours=hours - 0.6) if decided else None,
            decided_by="clare" if decided else "",
            reason={
                "rejected": "The left lung is not included below the hilum",
                "corrected": "Outline leaks into the trachea",
            }.get(state, ""),
            corrections={"lung-left": {"Volume": 2295.0}} if state == "corrected" else None,
        )
    )


def _operations(site: Site) -> None:
    with writing(site.engine) as connection:
        for number in range(3):
            values = {"protocol": "dimse", "calling_ae": "MR_NEW", "called_ae": "CAREGRID", "address": "10.9.8.7"}
            what, reason = "association", "the calling AE title and address are not on the allow list"
            connection.execute(tables.rejection.insert().values(at=ago(minutes=number * 7), **values, what=what, reason=reason))
        values = {"protocol": "dicomweb", "calling_ae": "", "called_ae": "", "address": "10.9.9.9"}
        connection.execute(
            tables.rejection.insert().values(at=ago(hours=30), **values, what="POST /dicom-web/studies", reason="no valid token")
        )
        connection.execute(
            tables.quarantine.insert().values(
                received_at=ago(hours=3),
                protocol="dimse",
                calling_ae="US_ROOM_4",
                called_ae="CAREGRID",
                address="10.2.7.7",
                sop_instance_uid="1.2.3.4.5",
                reason="the data set ends inside element (0028,0010)",
                error="MalformedObject",
                sha256="c" * 64,
                size=1234,
                path="quarantine/c.bin",
            )
        )
        for role, seen in (("receiver", 1), ("worker", 1), ("worker", 600)):
            identity = f"host-1/{role}-{seen}"
            values = {"id": identity, "role": role, "host": "host-1", "pid": 4000 + seen}
            connection.execute(
                tables.worker.insert().values(
                    **values, started_at=ago(hours=5), seen_at=ago(seconds=-86400 if seen == 1 else seen)
                )
            )
        values = {
            "run_id": "run-failed",
            "study_instance_uid": site.uids["failed"],
            "channel": "webhook",
            "recipient": "https://hooks.hospital.example",
        }
        connection.execute(tables.notification.insert().values(at=ago(hours=2), **values, message="A run failed", state="failed"))
        values = {"run_id": "run-urgent", "study_instance_uid": site.uids["urgent"], "channel": "log", "recipient": "on-call"}
        connection.execute(
            tables.notification.insert().values(at=ago(hours=1), **values, message="An emergency result waits", state="sent")
        )


@cache
def secondary_capture() -> bytes:
    """A real secondary capture made by highdicom from pydicom's CT, with a coloured outline, as part 10 bytes."""
    source = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    grey = source.pixel_array.astype(np.float32)
    grey = np.clip((grey - grey.min()) / np.ptp(grey) * 255, 0, 255).astype(np.uint8)
    picture = np.repeat(np.kron(grey, np.ones((4, 4), np.uint8))[:, :, None], 3, axis=2)
    rows, columns = np.ogrid[:512, :512]
    distance = np.hypot((rows - 256) / 160, (columns - 256) / 120)
    picture[np.abs(distance - 1) < 0.02] = (255, 235, 59)
    capture = highdicom.sc.SCImage.from_ref_dataset(
        ref_dataset=source,
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=highdicom.UID(),
        sop_instance_uid=highdicom.UID(),
        series_number=90,
        instance_number=1,
        manufacturer="caregrid",
        patient_orientation=("L", "P"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    buffer = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(buffer, capture, enforce_file_format=True)
    return bytes(buffer.getvalue())


def make_actions(site: Site) -> Actions:
    """Actions that change the rows in one transaction with an audit record, as the engine's functions do."""

    def change(table: sa.Table, where: Any, thing: str, key: Any, values: dict[str, Any], who: str, what: str, why: str) -> None:
        with writing(site.engine) as connection:
            row = connection.execute(sa.select(table).where(where)).mappings().first()
            if row is None:
                raise NotFound(thing=thing, key=key)
            check_transition(thing, row["state"], values["state"])
            connection.execute(table.update().where(where).values(**values))
            audit.append(connection, who=who, what=what, subject=f"{thing}:{key}", why=why)
        site.log.append((what, key, who, why))

    def decide(run_id: str, task_id: str, decision: str, who: str, reason: str, corrections: Any) -> None:
        where = sa.and_(tables.review.c.run_id == run_id, tables.review.c.task_id == task_id)
        with writing(site.engine) as connection:
            row = connection.execute(sa.select(tables.review).where(where)).mappings().one()
            if row["state"] != "open":
                raise AlreadyDecided(key=f"{run_id}/{task_id}", decision=row["state"], who=row["decided_by"])
            values = {"state": decision, "decided_by": who, "decided_at": now(), "reason": reason, "corrections": corrections}
            connection.execute(tables.review.update().where(where).values(**values))
            connection.execute(tables.run.update().where(tables.run.c.id == run_id).values(state="queued"))
            audit.append(connection, who=who, what=f"review {decision}", subject=f"run:{run_id}", why=reason or decision)
        site.log.append(("decide", run_id, decision, who, reason, corrections))

    def run_to(state: str, what: str) -> Any:
        return lambda run_id, who, why: change(
            tables.run, tables.run.c.id == run_id, "run", run_id, {"state": state}, who, what, why
        )

    def resend(delivery_id: int, who: str, why: str) -> None:
        values = {"state": "pending", "attempts": 0, "next_attempt_at": now()}
        change(tables.delivery, tables.delivery.c.id == delivery_id, "delivery", delivery_id, values, who, "resent delivery", why)

    def release(uid: str, proceed: bool, who: str, why: str) -> None:
        values = {"state": "complete" if proceed else "cancelled"}
        change(tables.study, tables.study.c.study_instance_uid == uid, "study", uid, values, who, "released study", why)

    def withdraw(run_id: str, who: str, why: str) -> None:
        with writing(site.engine) as connection:
            connection.execute(tables.result.update().where(tables.result.c.run_id == run_id).values(state="withdrawn"))
            audit.append(connection, who=who, what="result withdrawn", subject=f"run:{run_id}", why=why)
        site.log.append(("withdraw", run_id, who, why))

    def allow(calling_ae: str, address: str, who: str, why: str) -> None:
        with writing(site.engine) as connection:
            values = {"calling_ae": calling_ae, "address": address, "who": who, "why": why, "at": now()}
            connection.execute(tables.allowed_sender.insert().values(**values))
            audit.append(connection, who=who, what="allowed sender", subject=f"sender:{calling_ae}@{address}", why=why)

    def echo(name: str) -> str:
        if name == "archive":
            raise DeliveryFailed(destination=name, reason="connection refused")
        return "0000 Success in 12 ms"

    return Actions(
        decide=decide,
        retry_run=run_to("queued", "retried run"),
        cancel_run=run_to("cancelled", "cancelled run"),
        resend=resend,
        release_study=release,
        withdraw=withdraw,
        allow_sender=allow,
        echo=echo,
    )


def with_session_hours(site: Site, hours: float) -> Site:
    """The same site with another session length."""
    return replace(site, settings=replace(site.settings, web=replace(site.settings.web, session_hours=hours)))
