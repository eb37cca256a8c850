"""Every table of a site's database. Times are UTC, as ISO text with microseconds, so both databases sort them alike."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa

metadata = sa.MetaData()
Text, Integer, Float, JSON, Boolean = sa.Text, sa.Integer, sa.Float, sa.JSON, sa.Boolean


def now() -> str:
    """The present moment as the tables keep it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)


#: A DICOM object as received. copy 0 is the first seen; further copies have other bytes under the same UID (flagged).
instance = sa.Table(
    "instance",
    metadata,
    sa.Column("sop_instance_uid", Text, primary_key=True),
    sa.Column("copy", Integer, primary_key=True, default=0),
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("series_instance_uid", Text, nullable=False, index=True),
    sa.Column("sop_class_uid", Text, nullable=False),
    sa.Column("transfer_syntax_uid", Text, nullable=False),
    sa.Column("instance_number", Integer),
    sa.Column("number_of_frames", Integer),
    sa.Column("rows", Integer),
    sa.Column("columns", Integer),
    sa.Column("sha256", Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("path", Text, nullable=False),  # relative to the store's folder
    sa.Column("protocol", Text, nullable=False),
    sa.Column("calling_ae", Text, nullable=False),
    sa.Column("called_ae", Text, nullable=False),
    sa.Column("address", Text, nullable=False),
    sa.Column("received_at", Text, nullable=False, index=True),
)

#: A study: patient and study fields as first received, and where it stands.
study = sa.Table(
    "study",
    metadata,
    sa.Column("study_instance_uid", Text, primary_key=True),
    sa.Column("generation", Integer, nullable=False, default=0),
    sa.Column("state", Text, nullable=False, index=True),
    sa.Column("state_reason", Text, nullable=False, default=""),
    sa.Column("patient_id", Text, nullable=False, default="", index=True),
    sa.Column("patient_name", Text, nullable=False, default=""),
    sa.Column("patient_birth_date", Text, nullable=False, default=""),
    sa.Column("patient_sex", Text, nullable=False, default=""),
    sa.Column("accession_number", Text, nullable=False, default="", index=True),
    sa.Column("study_id", Text, nullable=False, default=""),
    sa.Column("study_date", Text, nullable=False, default=""),
    sa.Column("study_time", Text, nullable=False, default=""),
    sa.Column("study_description", Text, nullable=False, default=""),
    sa.Column("referring_physician_name", Text, nullable=False, default=""),
    sa.Column("modalities", Text, nullable=False, default=""),  # backslash-separated, sorted
    sa.Column("number_of_series", Integer, nullable=False, default=0),
    sa.Column("number_of_instances", Integer, nullable=False, default=0),
    sa.Column("protocol", Text, nullable=False),
    sa.Column("calling_ae", Text, nullable=False),
    sa.Column("called_ae", Text, nullable=False),
    sa.Column("address", Text, nullable=False),
    sa.Column("first_received_at", Text, nullable=False),
    sa.Column("last_received_at", Text, nullable=False),
    sa.Column("opened_at", Text),  # when late instances opened it again; None: when first received
    sa.Column("completed_at", Text),
    sa.Column("expected_instances", Integer),
    sa.Column("completion", JSON),  # the evidence completion rested on
    sa.Column("late_instances", Integer, nullable=False, default=0),
    sa.Column("conflicts", Integer, nullable=False, default=0),
)

series = sa.Table(
    "series",
    metadata,
    sa.Column("series_instance_uid", Text, primary_key=True),
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("modality", Text, nullable=False, default=""),
    sa.Column("series_number", Integer),
    sa.Column("series_description", Text, nullable=False, default=""),
    sa.Column("body_part_examined", Text, nullable=False, default=""),
    sa.Column("station_name", Text, nullable=False, default=""),
    sa.Column("number_of_instances", Integer, nullable=False, default=0),
    sa.Column("first_received_at", Text, nullable=False),
)

#: What could not be taken in, kept for a person to look at.
quarantine = sa.Table(
    "quarantine",
    metadata,
    _id(),
    sa.Column("received_at", Text, nullable=False),
    sa.Column("protocol", Text, nullable=False),
    sa.Column("calling_ae", Text, nullable=False),
    sa.Column("called_ae", Text, nullable=False),
    sa.Column("address", Text, nullable=False),
    sa.Column("sop_instance_uid", Text, nullable=False, default=""),
    sa.Column("reason", Text, nullable=False),
    sa.Column("error", Text, nullable=False),  # class of caregrid.errors
    sa.Column("sha256", Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("path", Text, nullable=False),
)

#: An association (or web request) turned away: who, what, why.
rejection = sa.Table(
    "rejection",
    metadata,
    _id(),
    sa.Column("at", Text, nullable=False, index=True),
    sa.Column("protocol", Text, nullable=False),
    sa.Column("calling_ae", Text, nullable=False),
    sa.Column("called_ae", Text, nullable=False),
    sa.Column("address", Text, nullable=False),
    sa.Column("what", Text, nullable=False),
    sa.Column("reason", Text, nullable=False),
)

#: Senders allowed on top of site.toml, by an operator, from the page of rejected associations.
allowed_sender = sa.Table(
    "allowed_sender",
    metadata,
    sa.Column("calling_ae", Text, primary_key=True),
    sa.Column("address", Text, primary_key=True),  # IP or network, e.g. 10.2.0.0/16
    sa.Column("who", Text, nullable=False),
    sa.Column("why", Text, nullable=False),
    sa.Column("at", Text, nullable=False),
)

workflow_revision = sa.Table(
    "workflow_revision",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("revision", Text, primary_key=True),
    sa.Column("source_text", Text, nullable=False),
    sa.Column("active", Boolean, nullable=False),
    sa.Column("who", Text, nullable=False),
    sa.Column("why", Text, nullable=False),
    sa.Column("at", Text, nullable=False),
)

#: Every workflow judged for every study generation, also when it does not apply.
verdict = sa.Table(
    "verdict",
    metadata,
    sa.Column("study_instance_uid", Text, primary_key=True),
    sa.Column("generation", Integer, primary_key=True),
    sa.Column("workflow", Text, primary_key=True),
    sa.Column("revision", Text, nullable=False),
    sa.Column("applies", Boolean, nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("trail", JSON, nullable=False),
    sa.Column("at", Text, nullable=False),
)

run = sa.Table(
    "run",
    metadata,
    sa.Column("id", Text, primary_key=True),  # derived from study, generation, workflow
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("generation", Integer, nullable=False),
    sa.Column("workflow", Text, nullable=False),
    sa.Column("revision", Text, nullable=False),
    sa.Column("models", JSON, nullable=False),  # run-task id → digest it is pinned to
    sa.Column("priority", Text, nullable=False),
    sa.Column("state", Text, nullable=False, index=True),
    sa.Column("state_reason", Text, nullable=False, default=""),
    sa.Column("attempts", Integer, nullable=False, default=0),  # times a worker began it
    sa.Column("round", Integer, nullable=False, default=0),  # rises with each retry or verdict
    sa.Column("worker", Text, nullable=False, default=""),
    sa.Column("created_at", Text, nullable=False),
    sa.Column("started_at", Text),
    sa.Column("finished_at", Text),
)

task = sa.Table(
    "task",
    metadata,
    sa.Column("run_id", Text, primary_key=True),
    sa.Column("task_id", Text, primary_key=True),
    sa.Column("kind", Text, nullable=False),
    sa.Column("position", Integer, nullable=False),
    sa.Column("state", Text, nullable=False),
    sa.Column("reason", Text, nullable=False, default=""),
    sa.Column("attempts", Integer, nullable=False, default=0),
    sa.Column("model_digest", Text, nullable=False, default=""),
    sa.Column("output", JSON),
    sa.Column("algorithm_seconds", Float),
    sa.Column("started_at", Text),
    sa.Column("finished_at", Text),
)

#: What an algorithm found, one row per finding (shown to people; the DICOM objects are in ``result``).
finding = sa.Table(
    "finding",
    metadata,
    sa.Column("run_id", Text, primary_key=True),
    sa.Column("task_id", Text, primary_key=True),
    sa.Column("tracking_id", Text, primary_key=True),
    sa.Column("tracking_uid", Text, nullable=False),
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("algorithm", Text, nullable=False),
    sa.Column("version", Text, nullable=False),
    sa.Column("summary", Text, nullable=False),
    sa.Column("content", JSON, nullable=False),  # see caregrid.runtime.exchange.finding_as_json
)

#: A DICOM object caregrid made. Written once; every retry sends these same bytes.
result = sa.Table(
    "result",
    metadata,
    sa.Column("sop_instance_uid", Text, primary_key=True),
    sa.Column("run_id", Text, nullable=False, index=True),
    sa.Column("task_id", Text, nullable=False),
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("series_instance_uid", Text, nullable=False),
    sa.Column("sop_class_uid", Text, nullable=False),
    sa.Column("transfer_syntax_uid", Text, nullable=False),
    sa.Column("kind", Text, nullable=False),  # dicom_seg, dicom_sr, dicom_sc, dicom_kos
    sa.Column("path", Text, nullable=False),
    sa.Column("sha256", Text, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("state", Text, nullable=False),  # valid, invalid, withdrawn
    sa.Column("validation", JSON, nullable=False),
    sa.Column("created_at", Text, nullable=False),
)

#: The outbox: one object to one destination.
delivery = sa.Table(
    "delivery",
    metadata,
    _id(),
    sa.Column("sop_instance_uid", Text, nullable=False, index=True),
    sa.Column("destination", Text, nullable=False, index=True),
    sa.Column("run_id", Text, nullable=False, index=True),
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("priority", Integer, nullable=False, default=5),
    sa.Column("state", Text, nullable=False, index=True),
    sa.Column("attempts", Integer, nullable=False, default=0),
    sa.Column("next_attempt_at", Text, nullable=False),
    sa.Column("owner", Text, nullable=False, default=""),
    sa.Column("lease_until", Text, nullable=False, default=""),
    sa.Column("last_error", Text, nullable=False, default=""),
    sa.Column("receiver_said", Text, nullable=False, default=""),
    sa.Column("created_at", Text, nullable=False),
    sa.Column("delivered_at", Text),
    sa.Column("commitment", Text, nullable=False, default=""),  # "", requested, committed, failed
    sa.UniqueConstraint("sop_instance_uid", "destination"),
)

#: A clinician's decision, asked for by a review task (or taken without being asked).
review = sa.Table(
    "review",
    metadata,
    sa.Column("run_id", Text, primary_key=True),
    sa.Column("task_id", Text, primary_key=True),
    sa.Column("study_instance_uid", Text, nullable=False, index=True),
    sa.Column("state", Text, nullable=False, index=True),
    sa.Column("roles", JSON, nullable=False),
    sa.Column("question", Text, nullable=False, default=""),
    sa.Column("of_tasks", JSON, nullable=False),
    sa.Column("opened_at", Text, nullable=False),
    sa.Column("first_viewed_at", Text),
    sa.Column("decided_at", Text),
    sa.Column("decided_by", Text, nullable=False, default=""),
    sa.Column("reason", Text, nullable=False, default=""),
    sa.Column("corrections", JSON),  # tracking_id → {concept meaning → corrected value}
)

model = sa.Table(
    "model",
    metadata,
    sa.Column("digest", Text, primary_key=True),
    sa.Column("name", Text, nullable=False, index=True),
    sa.Column("version", Text, nullable=False),
    sa.Column("manifest", JSON, nullable=False),
    sa.Column("path", Text, nullable=False),
    sa.Column("state", Text, nullable=False),
    sa.Column("signed_by", Text, nullable=False, default=""),
    sa.Column("expires_at", Text),
    sa.Column("added_at", Text, nullable=False),
    sa.UniqueConstraint("name", "version"),
)

trusted_key = sa.Table(
    "trusted_key",
    metadata,
    sa.Column("key_id", Text, primary_key=True),  # sha256 of the raw public key, hex
    sa.Column("name", Text, nullable=False),
    sa.Column("public_key", Text, nullable=False),  # PEM
    sa.Column("revoked_at", Text),
    sa.Column("who", Text, nullable=False),
    sa.Column("at", Text, nullable=False),
)

user = sa.Table(
    "user_account",
    metadata,
    sa.Column("name", Text, primary_key=True),
    sa.Column("full_name", Text, nullable=False, default=""),
    sa.Column("password_hash", Text, nullable=False),
    sa.Column("roles", JSON, nullable=False),
    sa.Column("active", Boolean, nullable=False, default=True),
    sa.Column("failed_logins", Integer, nullable=False, default=0),
    sa.Column("locked_until", Text),
    sa.Column("created_at", Text, nullable=False),
)

login_session = sa.Table(
    "login_session",
    metadata,
    sa.Column("token_sha256", Text, primary_key=True),
    sa.Column("user_name", Text, nullable=False),
    sa.Column("csrf", Text, nullable=False),
    sa.Column("created_at", Text, nullable=False),
    sa.Column("expires_at", Text, nullable=False),
)

#: Processes that are alive, by heartbeat.
worker = sa.Table(
    "worker",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("role", Text, nullable=False),
    sa.Column("host", Text, nullable=False),
    sa.Column("pid", Integer, nullable=False),
    sa.Column("started_at", Text, nullable=False),
    sa.Column("seen_at", Text, nullable=False),
)

notification = sa.Table(
    "notification",
    metadata,
    _id(),
    sa.Column("at", Text, nullable=False),
    sa.Column("run_id", Text, nullable=False, default=""),
    sa.Column("study_instance_uid", Text, nullable=False, default=""),
    sa.Column("channel", Text, nullable=False),
    sa.Column("recipient", Text, nullable=False),
    sa.Column("message", Text, nullable=False),
    sa.Column("state", Text, nullable=False),  # sent, failed
)

#: The audit log: each record's hash covers the one before it.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("at", Text, nullable=False),
    sa.Column("who", Text, nullable=False),
    sa.Column("what", Text, nullable=False),
    sa.Column("subject", Text, nullable=False, index=True),
    sa.Column("why", Text, nullable=False),
    sa.Column("detail", JSON, nullable=False),
    sa.Column("previous", Text, nullable=False),
    sa.Column("hash", Text, nullable=False),
)
