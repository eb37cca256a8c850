"""The state tables: which states a thing can be in and which changes are allowed. Diagrams in docs are made from these."""

from __future__ import annotations

from caregrid.errors import TransitionRefused

Table = dict[str, frozenset[str]]


def _table(rows: dict[str, str]) -> Table:
    return {old: frozenset(new.split()) for old, new in rows.items()}


#: A received study. Every study ends in exactly one of done, no-workflow, failed, held, cancelled.
STUDY = _table(
    {
        "receiving": "receiving complete held",
        "held": "complete cancelled receiving",
        "complete": "processing no-workflow receiving failed",
        "processing": "done failed awaiting-review cancelled receiving",
        "awaiting-review": "processing done failed cancelled receiving",
        "no-workflow": "receiving processing complete",
        "done": "receiving processing complete",
        "failed": "receiving processing done complete",
        "cancelled": "receiving processing complete",
    }
)

#: One run of one workflow on one study generation.
RUN = _table(
    {
        "queued": "running cancelled parked",
        "running": "running queued awaiting-review delivering done failed parked cancelled",
        "awaiting-review": "queued running cancelled failed",
        "delivering": "done parked cancelled",
        "parked": "queued cancelled delivering done",
        "failed": "queued cancelled",
        "done": "",  # to run a done study again, the study is judged anew as a new generation
        "cancelled": "queued",
    }
)

#: One task of a run.
TASK = _table(
    {
        "waiting": "running skipped cancelled done",
        "running": "done failed waiting skipped cancelled running",
        "done": "waiting",
        "failed": "waiting",
        "skipped": "waiting",
        "cancelled": "waiting",
    }
)

#: One object to one destination.
DELIVERY = _table(
    {
        "pending": "sending cancelled",
        "sending": "delivered pending parked",
        "delivered": "pending",
        "parked": "pending cancelled",
        "cancelled": "pending",
    }
)

#: A clinician's decision on a result.
REVIEW = _table(
    {"open": "accepted rejected corrected cancelled", "accepted": "", "rejected": "", "corrected": "", "cancelled": ""}
)

#: A model package.
MODEL = _table({"added": "active retired", "active": "retired", "retired": "active"})

TABLES: dict[str, Table] = {
    "study": STUDY,
    "run": RUN,
    "task": TASK,
    "delivery": DELIVERY,
    "review": REVIEW,
    "model": MODEL,
}


def check_transition(thing: str, old: str, new: str) -> None:
    """Raise TransitionRefused unless the table of ``thing`` lets ``old`` become ``new``."""
    if new not in TABLES[thing].get(old, frozenset()):
        raise TransitionRefused(thing=thing, old=old, new=new)
