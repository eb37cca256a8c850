"""What the pages may ask the engine to do. ``caregrid.site`` fills these in; the pages know nothing of how they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: finding's tracking id → {measurement's concept meaning → corrected value}
Corrections = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Actions:
    """Every change a person can make from the web pages. Each says who and why, and raises errors of caregrid.errors.

    decide(run_id, task_id, decision, who, reason, corrections): decision is accepted, rejected or corrected.
    retry_run, cancel_run, withdraw (run_id, who, why); resend(delivery_id, who, why).
    release_study(study_uid, proceed, who, why): let a held study go on, or cancel it.
    allow_sender(calling_ae, address, who, why); echo(destination name) → what the destination said.
    """

    decide: Callable[[str, str, str, str, str, Corrections | None], Any]
    retry_run: Callable[[str, str, str], Any]
    cancel_run: Callable[[str, str, str], Any]
    resend: Callable[[int, str, str], Any]
    release_study: Callable[[str, bool, str, str], Any]
    withdraw: Callable[[str, str, str], Any]
    allow_sender: Callable[[str, str, str, str], Any]
    echo: Callable[[str], str]
