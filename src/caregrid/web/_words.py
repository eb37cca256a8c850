"""How things are said on the pages: states in plain words with a colour, times, names and numbers."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

#: thing → state → (words, NHS tag colour)
STATES: dict[str, dict[str, tuple[str, str]]] = {
    "study": {
        "receiving": ("Receiving", "blue"),
        "held": ("Held", "orange"),
        "complete": ("Complete", "blue"),
        "processing": ("Processing", "blue"),
        "awaiting-review": ("Waiting for review", "yellow"),
        "no-workflow": ("No workflow applied", "grey"),
        "done": ("Done", "green"),
        "failed": ("Failed", "red"),
        "cancelled": ("Cancelled", "grey"),
    },
    "run": {
        "queued": ("Queued", "grey"),
        "running": ("Running", "blue"),
        "awaiting-review": ("Waiting for review", "yellow"),
        "delivering": ("Delivering", "aqua-green"),
        "parked": ("Parked", "orange"),
        "failed": ("Failed", "red"),
        "done": ("Done", "green"),
        "cancelled": ("Cancelled", "grey"),
    },
    "task": {
        "waiting": ("Waiting", "grey"),
        "running": ("Running", "blue"),
        "done": ("Done", "green"),
        "failed": ("Failed", "red"),
        "skipped": ("Skipped", "grey"),
        "cancelled": ("Cancelled", "grey"),
    },
    "delivery": {
        "pending": ("Pending", "grey"),
        "sending": ("Sending", "blue"),
        "delivered": ("Delivered", "green"),
        "parked": ("Parked", "orange"),
        "cancelled": ("Cancelled", "grey"),
    },
    "review": {
        "open": ("Waiting for review", "yellow"),
        "accepted": ("Accepted", "green"),
        "rejected": ("Rejected", "red"),
        "corrected": ("Corrected", "purple"),
        "cancelled": ("Cancelled", "grey"),
    },
    "result": {"valid": ("Valid", "green"), "invalid": ("Held back", "red"), "withdrawn": ("Withdrawn", "purple")},
    "model": {"added": ("Not yet active", "grey"), "active": ("Active", "green"), "retired": ("Retired", "grey")},
    "signature": {
        "signed": ("Signed", "green"),
        "unsigned": ("Not signed", "red"),
        "untrusted key": ("Key not trusted", "red"),
        "revoked key": ("Key revoked", "red"),
        "expired": ("Signature expired", "red"),
    },
    "notification": {"sent": ("Sent", "green"), "failed": ("Failed", "red")},
    "priority": {"emergency": ("Emergency", "red"), "routine": ("Routine", "grey"), "off-peak": ("Off-peak", "white")},
}

UNITS = {"1": "", "[hnsf'U]": "HU", "cm2": "cm²", "mm2": "mm²", "cm3": "cm³", "ml": "ml", "mL": "ml", "{ratio}": ""}

#: UCUM units of quantities that cannot be less than nothing
NEVER_NEGATIVE = frozenset(
    {"mm", "cm", "m", "mm2", "cm2", "mm3", "cm3", "ml", "mL", "l", "%", "s", "ms", "g", "kg", "{beats}/min", "/min"}
)

RESULT_KINDS = {
    "dicom_seg": "Segmentation (SEG)",
    "dicom_sr": "Structured report (SR)",
    "dicom_sc": "Picture (secondary capture)",
    "dicom_kos": "Rejection note (KOS)",
}

PROTOCOLS = {"dimse": "DICOM", "dicomweb": "DICOMweb", "folder": "Folder"}

SEXES = {"M": "Male", "F": "Female", "O": "Other"}


def state(thing: str, value: str) -> tuple[str, str]:
    """A state's words and tag colour."""
    return STATES[thing].get(value, (value.replace("-", " ").capitalize(), "grey"))


def moment(value: str | None, seconds: bool = False) -> str:
    """A stored time in local time, ``25 Nov 2026, 04:03``; a dash when there is none."""
    if not value:
        return "–"
    local = datetime.fromisoformat(value).astimezone()
    return local.strftime(f"%-d %b %Y, %H:%M{':%S' if seconds else ''}")


def ago(value: str | None) -> str:
    """How long ago, roughly: ``2 hours``."""
    if not value:
        return "–"
    return duration((datetime.now(UTC) - datetime.fromisoformat(value)).total_seconds())


def duration(seconds: float | None) -> str:
    """A length of time in one rounded unit."""
    if seconds is None:
        return "–"
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count != 1 else ''}"
    if 0 <= seconds < 0.1:
        return "less than 0.1 seconds"
    return f"{max(0.0, seconds):.1f} seconds" if 0 < seconds < 10 else f"{max(0, round(seconds))} seconds"


def between(start: str | None, end: str | None) -> str:
    """The time from one moment to another."""
    if not start or not end:
        return "–"
    return duration((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())


def person(name: str) -> str:
    """A DICOM person name as UK clinical systems write it: ``SMITH, John (Mr)``."""
    alphabetic = name.split("=")[0]
    family, given, middle, prefix, _suffix = (*alphabetic.split("^"), "", "", "", "", "")[:5]
    shown = ", ".join(part for part in (family.strip().upper(), f"{given} {middle}".strip()) if part)
    return (f"{shown} ({prefix.strip()})" if prefix.strip() and shown else shown) or "Name not given"


def day(value: str) -> str:
    """A DICOM date, ``1 Jan 1970``; as it came when it is not one."""
    try:
        return datetime.strptime(value, "%Y%m%d").strftime("%-d %b %Y")
    except ValueError:
        return value or "–"


def age(birth: str, on: str = "") -> str:
    """Whole years from a DICOM birth date to today (or a study's date); empty when it cannot be said."""
    try:
        born = datetime.strptime(birth, "%Y%m%d").date()
        to = datetime.strptime(on, "%Y%m%d").date() if on else date.today()
    except ValueError:
        return ""
    years = to.year - born.year - ((to.month, to.day) < (born.month, born.day))
    return f"{years} years" if years > 1 else count_of(max(0, (to - born).days // 30), "month", "months")


def clock(value: str) -> str:
    """A DICOM time, ``14:05``."""
    return f"{value[:2]}:{value[2:4]}" if len(value) >= 4 and value[:4].isdigit() else ""


def size(count: int | None) -> str:
    """Bytes for people."""
    value = float(count or 0)
    for unit in ("bytes", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def study_title(row: dict[str, Any]) -> str:
    """What was examined: the description, with the modality in front where it does not say it."""
    modality, description = row["modalities"].replace("\\", ", "), row["study_description"].strip()
    if not description or not modality:
        return description or modality or "Study without description"
    return description if description.upper().startswith(modality.upper()) else f"{modality} {description}"


def site(content: dict[str, Any]) -> str:
    """Where a finding is: ``Left lung``; a dash when the algorithm does not say."""
    side, place = meaning(content.get("laterality")), meaning(content.get("site"))
    return f"{side} {place[:1].lower()}{place[1:]}" if side and place else side or place or "–"


def said(value: Any) -> str:
    """A recorded value of any kind: lists joined, nothing as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(said(one) for one in value) or "none"
    return "–" if value is None or value == "" else str(value)


def count_of(count: int, one: str, many: str) -> str:
    """A number of things: ``1 study``, ``2 studies``."""
    return f"{count:,} {one if count == 1 else many}"


def number(value: float | int | None) -> str:
    """A measured value with at most two decimals and thousands separators."""
    if value is None:
        return "–"
    shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}".rstrip("0").rstrip(".")
    shown = shown if float(value) == 0 or shown.strip("-0.,") else f"{value:.2g}"
    return shown.replace("-", "−", 1) if shown.startswith("-") else shown


def plain(value: float | int | None) -> str:
    """A measured value as a form field holds it."""
    return "" if value is None else number(value).replace(",", "").replace("−", "-")


def unit(code: list[str] | None) -> str:
    """A coded unit as people write it."""
    return "" if not code else UNITS.get(code[0], code[0] if code[0].isalpha() or code[0] == "%" else code[2])


def meaning(code: list[str] | None) -> str:
    """What a coded concept means."""
    return code[2] if code else ""


def short(uid: str, length: int = 12) -> str:
    """The end of a UID or the start of a digest, for tables; the whole stands on the page it links to."""
    return uid if len(uid) <= length + 1 else (f"…{uid[-length:].lstrip('.')}" if "." in uid else f"{uid[:length]}…")


def sender(row: dict[str, Any]) -> str:
    """Who sent something, in a few words."""
    who = " to ".join(part for part in (row.get("calling_ae"), row.get("called_ae")) if part)
    return f"{who or 'unnamed'} ({row.get('address') or 'address not known'})"
