"""Who may do what at a site."""

from __future__ import annotations

from collections.abc import Collection

from caregrid.errors import NotAllowed

ROLES = ("clinician", "operator", "governance", "admin")

#: action → roles that may take it
ACTIONS: dict[str, frozenset[str]] = {
    "see worklist": frozenset({"clinician", "operator", "governance", "admin"}),
    "see images": frozenset({"clinician", "operator", "admin"}),
    "decide review": frozenset({"clinician"}),
    "see operations": frozenset({"operator", "governance", "admin"}),
    "retry run": frozenset({"operator", "admin"}),
    "cancel run": frozenset({"operator", "admin"}),
    "resend delivery": frozenset({"operator", "admin"}),
    "release study": frozenset({"operator", "admin"}),
    "withdraw result": frozenset({"clinician", "operator"}),
    "allow sender": frozenset({"operator", "admin"}),
    "manage models": frozenset({"admin"}),
    "see audit": frozenset({"governance", "admin"}),
    "manage users": frozenset({"admin"}),
}


def may(roles: Collection[str], action: str) -> bool:
    """Whether any of ``roles`` may take ``action``."""
    return not ACTIONS[action].isdisjoint(roles)


def check_may(roles: Collection[str], action: str) -> None:
    """Raise NotAllowed unless one of ``roles`` may take ``action``."""
    if not may(roles, action):
        raise NotAllowed(roles=", ".join(sorted(roles)) or "none", action=action)
