"""Making a site: its folder, settings, signing key, database, built-in models and first user."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from caregrid import plugs
from caregrid.config import FILE
from caregrid.errors import BadSetting, ManifestInvalid
from caregrid.registry.manifest import read_manifest
from caregrid.registry.signing import new_keypair
from caregrid.site import Site
from caregrid.store.users import create_user

SETTINGS = """\
# A caregrid site. Every key is described in docs/reference/settings.md; an unknown key is an error.

[site]
name = {name}
# database = "postgresql+psycopg://caregrid@localhost/caregrid"   # default: SQLite in data/site.db
{database}

[dimse]
port = 11112
ae_titles = ["CAREGRID"]
# Who may send. Without a row here only this machine may.
# [[dimse.allow]]
# calling_ae = "CT1"
# address = "10.1.2.3"

[web]
host = "127.0.0.1"
port = 8080

[engine]
workers = 1
slots = 2

[[completion]]
source = "*"
quiet_seconds = 30
ceiling_seconds = 3600
at_ceiling = "proceed"
late = "rerun"

# Where results go.
# [[destination]]
# name = "PACS"
# kind = "cstore"
# host = "10.1.2.4"
# port = 104
# ae_title = "PACS"
"""


@dataclass(frozen=True)
class MadeSite:
    """What ``init_site`` made. admin_password is not kept anywhere."""

    home: Path
    admin_password: str
    models: tuple[str, ...]
    left_out: tuple[str, ...]


def init_site(
    path: Path, name: str, database: str = "", *, builtin: bool = True, who: str = "setup", settings: str = ""
) -> MadeSite:
    """Make a site at ``path``; raises BadSetting when there is one. settings: text of site.toml instead of the default."""
    file = path / FILE
    if file.exists():
        raise BadSetting(file=file, key="(file)", reason="is there already; this folder holds a site")
    path.mkdir(parents=True, exist_ok=True)
    database_line = f"database = {_toml(database)}" if database else ""
    file.write_text(settings or SETTINGS.format(name=_toml(name), database=database_line), "utf-8")
    site = Site.open(path)
    site.prepare()
    key = _signing_key(site, who)
    added, left_out = _add_builtin(site, key, who) if builtin else ([], [])
    password = secrets.token_urlsafe(15)
    create_user(site.engine, "admin", password, ["admin"], full_name="Administrator", who=who, why="site made")
    site.close()
    return MadeSite(path.resolve(), password, tuple(added), tuple(left_out))


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _signing_key(site: Site, who: str) -> bytes:
    """The site's own key: it signs what the site itself vouches for, and never leaves."""
    folder = site.settings.home / "keys"
    folder.mkdir(mode=0o700, exist_ok=True)
    private, public = new_keypair()
    handle = os.open(folder / "site.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(private)
    (folder / "site.pub").write_bytes(public)
    site.registry.trust(public, "site", who, "the site's own key, made with the site")
    return private


def builtin_packages() -> list[Path]:
    """Folders of the algorithms that come with caregrid."""
    slot = import_module("caregrid.algorithms")
    return [Path(slot.__path__[0]) / name for name in plugs.names("algorithms")]


def _add_builtin(site: Site, key: bytes, who: str) -> tuple[list[str], list[str]]:
    added, left_out = [], []
    for folder in builtin_packages():
        try:
            manifest = read_manifest(folder)
        except ManifestInvalid as error:
            left_out.append(error.message)
            continue
        if manifest.environment and not (site.settings.data / "environments" / manifest.environment / "bin" / "python").exists():
            left_out.append(f"{manifest.reference} needs the environment {manifest.environment}; see its README.md")
            continue
        add_signed(site, folder, key, who, "comes with caregrid")
        added.append(manifest.reference)
    return added, left_out


def add_signed(site: Site, folder: Path, key: bytes, who: str, why: str) -> None:
    """Add, sign and activate a package."""
    manifest = site.registry.add(folder, who, why)
    site.registry.sign(manifest.name, manifest.version, key, "site", who, why, 365)
    site.registry.activate(manifest.name, manifest.version, who, why)
