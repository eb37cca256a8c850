"""The models of a site: add, sign, verify, activate, retire; and the keys the site trusts.

Nothing leaves this room unsigned: ``verify``, ``resolve`` and ``load`` check the signature and the files every time.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from caregrid.domain.algorithm import Manifest
from caregrid.domain.states import check_transition
from caregrid.errors import (
    KeyRevoked,
    KeyUnknown,
    ModelExists,
    ModelStateRefused,
    ModelUnknown,
    NotFound,
    PackageRefused,
    RegistryError,
)
from caregrid.registry import signing
from caregrid.registry.manifest import manifest_as_json, manifest_from_json, read_manifest
from caregrid.registry.package import (
    SIGNATURE_FILE,
    Fingerprint,
    PackageFile,
    copy_package,
    digest_of,
    fingerprint,
    list_files,
)
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.files import sync_path
from caregrid.store.tables import model, now, trusted_key

#: File times are coarse: a file changed this shortly before it was hashed could change again without showing.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Model:
    """A model as pages and the CLI list it. signed_by: a key's name, "" when unsigned."""

    manifest: Manifest
    state: str
    signed_by: str
    expires_at: str | None
    added_at: str

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """Its semantic version."""
        return self.manifest.version

    @property
    def digest(self) -> str:
        """SHA-256 over its files."""
        return self.manifest.digest


@dataclass(frozen=True)
class TrustedKey:
    """A key whose signatures the site accepts, until revoked_at is set."""

    key_id: str
    name: str
    public_key: str
    revoked_at: str | None
    who: str
    at: str


class Registry:
    """The model packages of one site. folder: where they lie (``packages/<digest>``); one registry may be shared by threads."""

    def __init__(self, engine: sa.Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self._hashed: dict[str, tuple[Fingerprint, tuple[PackageFile, ...]]] = {}
        self._lock = threading.Lock()

    # --- packages ---

    def add(self, source_folder: Path, who: str, why: str) -> Manifest:
        """Copy a package into the registry (state ``added``). Adding the same again changes nothing.

        Raises ManifestInvalid, PackageRefused, ModelExists (another package has that name and version).
        """
        read_manifest(source_folder)
        scratch = copy_package(source_folder, self.folder)
        try:
            # What counts is what was copied: the source may have changed meanwhile.
            manifest = replace(read_manifest(scratch), digest=digest_of(list_files(scratch)))
            self._keep(manifest, scratch, who, why)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return manifest

    def _keep(self, manifest: Manifest, scratch: Path, who: str, why: str) -> None:
        with writing(self.engine) as connection:
            row = _row(connection, manifest.name, manifest.version)
            if row and row["digest"] != manifest.digest:
                raise ModelExists(name=manifest.name, version=manifest.version)
            target = self.folder / _relative(manifest.digest)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.rename(scratch, target)
                sync_path(target.parent)
            elif not (target / SIGNATURE_FILE).exists() and (scratch / SIGNATURE_FILE).exists():
                os.rename(scratch / SIGNATURE_FILE, target / SIGNATURE_FILE)
            if row:
                return
            connection.execute(
                model.insert().values(
                    digest=manifest.digest,
                    name=manifest.name,
                    version=manifest.version,
                    manifest=manifest_as_json(manifest),
                    path=_relative(manifest.digest),
                    state="added",
                    added_at=now(),
                )
            )
            _audit(connection, manifest, who, "model added", why, {"digest": manifest.digest})
        self._note_signature(manifest)

    def _note_signature(self, manifest: Manifest) -> None:
        """Show a signature that came with the package, if it already holds here; trust is judged again at every use."""
        try:
            signature = self._check(manifest)
        except RegistryError:
            return
        name = self._key_name(signature.key_id)
        with writing(self.engine) as connection:
            self._record_signature(connection, manifest.digest, name, signature)

    def sign(
        self,
        name: str,
        version: str,
        private_key_pem: bytes,
        key_name: str,
        who: str,
        why: str,
        valid_days: float | None = 365,
        passphrase: bytes | None = None,
    ) -> str:
        """Sign a model with an Ed25519 key and return the key's id. valid_days None: it never expires.

        The files are hashed anew: they must still be those that were added (PackageAltered).
        """
        key = signing.read_private_key(private_key_pem, passphrase)
        row = self._get(name, version)
        manifest, path = _manifest_of(row), self.folder / row["path"]
        if digest_of(list_files(path)) != manifest.digest:
            raise PackageRefused(file=f"{name} {version}", reason="is no longer what was added; add it again and sign that")
        signature = signing.sign_folder(path, key, valid_days)
        with writing(self.engine) as connection:
            self._record_signature(connection, manifest.digest, key_name, signature)
            detail = {"key_id": signature.key_id, "digest": manifest.digest, "expires_at": signature.statement.expires_at}
            _audit(connection, manifest, who, "model signed", why, detail)
        return signature.key_id

    @staticmethod
    def _record_signature(connection: sa.Connection, digest: str, name: str, signature: signing.Signature) -> None:
        values = {"signed_by": name, "expires_at": signature.statement.expires_at or None}
        connection.execute(model.update().where(model.c.digest == digest).values(**values))

    def verify(self, name: str, version: str) -> Manifest:
        """The manifest, when signature and files hold; raises NotSigned, PackageAltered, Signature… or Key…"""
        manifest = _manifest_of(self._get(name, version))
        self._check(manifest, hash_anew=True)
        return manifest

    def activate(self, name: str, version: str, who: str, why: str) -> Manifest:
        """Let workflows use a model; it must verify. Raises as ``verify``, and TransitionRefused."""
        manifest = self.verify(name, version)
        self._move(manifest, "active", "model activated", who, why)
        return manifest

    def retire(self, name: str, version: str, who: str, why: str) -> None:
        """Resolve it no more. Runs pinned to it still load it, so that they end as they began. Raises TransitionRefused."""
        self._move(_manifest_of(self._get(name, version)), "retired", "model retired", who, why)

    def _move(self, manifest: Manifest, state: str, what: str, who: str, why: str) -> None:
        with writing(self.engine) as connection:
            row = _row(connection, manifest.name, manifest.version)
            if row is None:
                raise ModelUnknown(name=manifest.name, version=manifest.version)
            check_transition("model", row["state"], state)
            connection.execute(model.update().where(model.c.digest == row["digest"]).values(state=state))
            _audit(connection, manifest, who, what, why, {"digest": manifest.digest, "was": row["state"]})

    def resolve(self, name: str, version: str = "") -> Manifest:
        """The newest active model called ``name``; version narrows it: "1", "1.2" or "1.2.0". Verified.

        A pre-release is taken only when asked for by its full version. Raises ModelUnknown, ModelStateRefused, and as ``verify``.
        """
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(model).where(model.c.name == name)).mappings().all()
        fitting = [row for row in rows if _fits(row["version"], version)]
        if not fitting:
            raise ModelUnknown(name=name, version=version)
        active = [row for row in fitting if row["state"] == "active"]
        if not active:
            newest = max(fitting, key=lambda row: precedence(row["version"]))
            raise ModelStateRefused(name=name, version=newest["version"], state=newest["state"])
        manifest = _manifest_of(max(active, key=lambda row: precedence(row["version"])))
        self._check(manifest)
        return manifest

    def load(self, digest: str) -> tuple[Manifest, Path]:
        """The model with this digest and the folder of its files, verified now, for a run that is pinned to it.

        A retired one is handed out too: a run keeps the model it started with. Raises as ``verify``, and ModelStateRefused for a
        model that was never activated.
        """
        row = self._by_digest(digest)
        manifest = _manifest_of(row)
        if row["state"] == "added":
            raise ModelStateRefused(name=manifest.name, version=manifest.version, state=row["state"])
        self._check(manifest)
        return manifest, self.folder / row["path"]

    def list(self) -> Sequence[Model]:
        """Every model, by name, newest version first."""
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(model)).mappings().all()
        newest_first = sorted(rows, key=lambda row: precedence(row["version"]), reverse=True)
        return [
            Model(_manifest_of(row), row["state"], row["signed_by"], row["expires_at"], row["added_at"])
            for row in sorted(newest_first, key=lambda row: str(row["name"]))
        ]

    def manifest(self, digest: str) -> Manifest:
        """The manifest of a model, unverified: for saying what made an earlier result, never for running it."""
        return _manifest_of(self._by_digest(digest))

    def _by_digest(self, digest: str) -> sa.RowMapping:
        with reading(self.engine) as connection:
            row = connection.execute(sa.select(model).where(model.c.digest == digest)).mappings().first()
        if row is None:
            raise ModelUnknown(name="with digest", version=digest)
        return row

    # --- checking ---

    def _check(self, manifest: Manifest, hash_anew: bool = False) -> signing.Signature:
        path = self.folder / _relative(manifest.digest)
        files = lambda: self._files(manifest.digest, path, hash_anew)  # noqa: E731 - asked for only once the signature holds
        trusted = lambda by: self._trusted(by, manifest)  # noqa: E731
        signature = signing.check_folder(path, manifest, trusted, files)
        if signature.statement.digest != manifest.digest:
            raise signing.refused(manifest, "it is for another package")
        return signature

    def _files(self, digest: str, path: Path, hash_anew: bool) -> tuple[PackageFile, ...]:
        """The package's files with their hashes; hashed again unless nothing in the file system has moved since."""
        started = time.time_ns()
        seen = fingerprint(path)
        with self._lock:
            known = self._hashed.get(digest)
        if known and known[0] == seen and not hash_anew:
            return known[1]
        files = list_files(path)
        if all(max(entry[4], entry[5]) < started - _SETTLED_NS for entry in seen):
            with self._lock:
                self._hashed[digest] = (seen, files)
        return files

    def _trusted(self, by: str, manifest: Manifest) -> Ed25519PublicKey:
        with reading(self.engine) as connection:
            row = connection.execute(sa.select(trusted_key).where(trusted_key.c.key_id == by)).mappings().first()
        if row is None:
            raise KeyUnknown(name=manifest.name, version=manifest.version, key_id=_short(by))
        if row["revoked_at"]:
            raise KeyRevoked(name=manifest.name, version=manifest.version, key_id=_short(by))
        key = signing.read_public_key(row["public_key"].encode())
        if signing.key_id(key) != by:
            raise KeyUnknown(name=manifest.name, version=manifest.version, key_id=_short(by))
        return key

    def _key_name(self, by: str) -> str:
        with reading(self.engine) as connection:
            name = connection.execute(sa.select(trusted_key.c.name).where(trusted_key.c.key_id == by)).scalar()
        return str(name or by[:12])

    def _get(self, name: str, version: str) -> sa.RowMapping:
        with reading(self.engine) as connection:
            row = _row(connection, name, version)
        if row is None:
            raise ModelUnknown(name=name, version=version)
        return row

    # --- keys ---

    @staticmethod
    def new_keypair(passphrase: bytes | None = None) -> tuple[bytes, bytes]:
        """A new Ed25519 key pair as PEM: private (encrypted when a passphrase is given) and public."""
        return signing.new_keypair(passphrase)

    def trust(self, public_key_pem: bytes, name: str, who: str, why: str) -> str:
        """Accept signatures of this key from now on; returns its id. A revoked key is not taken back (RegistryError)."""
        key = signing.read_public_key(public_key_pem)
        by = signing.key_id(key)
        with writing(self.engine) as connection:
            row = connection.execute(sa.select(trusted_key).where(trusted_key.c.key_id == by)).mappings().first()
            if row and row["revoked_at"]:
                raise RegistryError(reason=f"key {_short(by)} was revoked; make a new key")
            if row is None:
                values = {"key_id": by, "name": name, "public_key": signing.public_pem(key).decode(), "who": who, "at": now()}
                connection.execute(trusted_key.insert().values(**values))
                audit.append(connection, who=who, what="key trusted", subject=f"key:{by}", why=why, detail={"name": name})
        return by

    def revoke(self, key_id: str, who: str, why: str) -> None:
        """Refuse this key's signatures from now on, also those made before. key_id: the id or its beginning (8 or more)."""
        with writing(self.engine) as connection:
            rows = connection.execute(sa.select(trusted_key)).mappings().all()
            fitting = [row for row in rows if len(key_id) >= 8 and row["key_id"].startswith(key_id)]
            if len(fitting) != 1:
                raise NotFound(thing="key", key=key_id)
            by = fitting[0]["key_id"]
            connection.execute(trusted_key.update().where(trusted_key.c.key_id == by).values(revoked_at=now()))
            audit.append(connection, who=who, what="key revoked", subject=f"key:{by}", why=why, detail={})

    def keys(self) -> Sequence[TrustedKey]:
        """Every key ever trusted, newest first."""
        with reading(self.engine) as connection:
            rows = connection.execute(sa.select(trusted_key).order_by(trusted_key.c.at.desc())).mappings().all()
        return [TrustedKey(**row) for row in rows]


def precedence(version: str) -> tuple[Any, ...]:
    """A key that sorts semantic versions by semver.org's rule 11."""
    core, _, extra = version.partition("+")[0].partition("-")
    numbers = tuple(int(part) for part in core.split("."))
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in extra.split(".")) if extra else ()
    return (numbers, not extra, parts)


def _fits(version: str, wanted: str) -> bool:
    if version == wanted:
        return True
    return "-" not in version and (not wanted or version.startswith(f"{wanted}."))


def _relative(digest: str) -> str:
    return f"packages/{digest}"


def _row(connection: sa.Connection, name: str, version: str) -> sa.RowMapping | None:
    found = connection.execute(sa.select(model).where(model.c.name == name, model.c.version == version))
    return found.mappings().first()


def _manifest_of(row: sa.RowMapping) -> Manifest:
    return replace(manifest_from_json(row["manifest"]), digest=row["digest"])


def _audit(connection: sa.Connection, manifest: Manifest, who: str, what: str, why: str, detail: dict[str, Any]) -> None:
    subject = f"model:{manifest.name}@{manifest.version}"
    audit.append(connection, who=who, what=what, subject=subject, why=why, detail=detail)


def _short(key_id: str) -> str:
    return key_id[:16] if key_id.isalnum() else "of an unreadable id"
