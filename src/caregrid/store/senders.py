"""Senders an operator allowed on top of site.toml."""

from __future__ import annotations

import fnmatch
import ipaddress

import sqlalchemy as sa

from caregrid.errors import StateError
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.tables import allowed_sender, now


def allow_sender(engine: sa.Engine, calling_ae: str, address: str, who: str, why: str) -> None:
    """Let ``calling_ae`` at an IP or network (CIDR) send from now on. Raises StateError when the address is none."""
    try:
        ipaddress.ip_network(address, strict=False)
    except ValueError as error:
        raise StateError(reason="the address is not an IP address or network") from error
    if not calling_ae.strip():
        raise StateError(reason="the calling AE title is empty")
    with writing(engine) as connection:
        key = (allowed_sender.c.calling_ae == calling_ae, allowed_sender.c.address == address)
        connection.execute(allowed_sender.delete().where(*key))
        connection.execute(allowed_sender.insert().values(calling_ae=calling_ae, address=address, who=who, why=why, at=now()))
        audit.append(
            connection, who=who, what="sender allowed", subject=f"sender:{calling_ae}", why=why, detail={"address": address}
        )


def is_allowed(engine: sa.Engine, calling_ae: str, address: str) -> bool:
    """Whether an operator allowed this sender."""
    with reading(engine) as connection:
        rows = connection.execute(sa.select(allowed_sender.c.calling_ae, allowed_sender.c.address)).all()
    return any(
        fnmatch.fnmatchcase(calling_ae, row.calling_ae)
        and ipaddress.ip_address(address) in ipaddress.ip_network(row.address, strict=False)
        for row in rows
    )
