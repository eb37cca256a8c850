"""Signatures of packages: an in-toto statement (v1) in a DSSE envelope, signed with Ed25519.

DSSE: https://github.com/secure-systems-lab/dsse ; in-toto: https://github.com/in-toto/attestation.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from caregrid.domain.algorithm import Manifest
from caregrid.errors import NotSigned, PackageAltered, RegistryError, SignatureExpired, SignatureRefused
from caregrid.registry import manifest as manifests
from caregrid.registry.package import (
    IGNORED_FOLDERS,
    SIGNATURE_FILE,
    PackageFile,
    digest_of,
    file_sha256,
    list_files,
    write_durably,
)

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:caregrid:model-package:v1"
MAX_ENVELOPE_BYTES = 64 << 20


@dataclass(frozen=True)
class Statement:
    """What a signature says of a package. Times are ISO text in UTC; expires_at empty: does not expire."""

    name: str
    version: str
    digest: str
    manifest_sha256: str
    signed_at: str
    expires_at: str
    files: tuple[PackageFile, ...]


@dataclass(frozen=True)
class Signature:
    """A signature that held: by which key, over what."""

    key_id: str
    statement: Statement


def new_keypair(passphrase: bytes | None = None) -> tuple[bytes, bytes]:
    """A new Ed25519 key pair as PEM: private (PKCS8, encrypted when a passphrase is given) and public."""
    key = Ed25519PrivateKey.generate()
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    return private, public_pem(key.public_key())


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, hex."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def read_private_key(pem: bytes, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """The private key in ``pem``; RegistryError when it is none, of another kind, or the passphrase is wrong."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RegistryError(reason="the private key cannot be read (no PEM key, or a wrong or missing passphrase)") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RegistryError(reason="the private key is not an Ed25519 key")
    return key


def read_public_key(pem: bytes) -> Ed25519PublicKey:
    """The public key in ``pem``; RegistryError when it is none or of another kind."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RegistryError(reason="the public key cannot be read as PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise RegistryError(reason="the public key is not an Ed25519 key")
    return key


def sign_folder(folder: Path, private_key: Ed25519PrivateKey, valid_days: float | None = 365) -> Signature:
    """Sign the package in ``folder`` as it stands and leave the signature in it. valid_days None: it does not expire.

    This needs no registry: a manufacturer signs this way before sending a package out.
    """
    manifest = manifests.read_manifest(folder)
    files = list_files(folder, IGNORED_FOLDERS)
    signed = datetime.now(UTC)
    statement = Statement(
        name=manifest.name,
        version=manifest.version,
        digest=digest_of(files),
        manifest_sha256=file_sha256(folder / manifests.FILE),
        signed_at=signed.isoformat(timespec="seconds"),
        expires_at="" if valid_days is None else (signed + timedelta(days=valid_days)).isoformat(timespec="seconds"),
        files=files,
    )
    payload = json.dumps(_statement_as_json(statement), sort_keys=True, separators=(",", ":")).encode()
    by = key_id(private_key.public_key())
    write_durably(folder / SIGNATURE_FILE, _envelope(payload, by, private_key.sign(pae(PAYLOAD_TYPE, payload))))
    return Signature(by, statement)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is really signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def check_folder(
    folder: Path,
    manifest: Manifest,
    trusted: Callable[[str], Ed25519PublicKey],
    files: Callable[[], tuple[PackageFile, ...]],
) -> Signature:
    """The signature of the package in ``folder``, when it holds for ``files()`` now.

    trusted: gives the public key of a key id, or raises (KeyUnknown, KeyRevoked). Raises NotSigned, SignatureRefused,
    SignatureExpired, PackageAltered.
    """
    payload, signatures = _read_envelope(folder, manifest)
    by = _signed_by(payload, signatures, manifest, trusted)
    statement = _read_statement(payload, manifest)
    if (statement.name, statement.version) != (manifest.name, manifest.version):
        raise refused(manifest, f"it is for {statement.name} {statement.version}")
    if statement.expires_at and datetime.fromisoformat(statement.expires_at) <= datetime.now(UTC):
        raise SignatureExpired(name=manifest.name, version=manifest.version, expired=statement.expires_at)
    _check_unchanged(statement, files(), manifest)
    return Signature(by, statement)


def _check_unchanged(statement: Statement, files: tuple[PackageFile, ...], manifest: Manifest) -> None:
    then, now = ({file.path: file for file in listed} for listed in (statement.files, files))
    for path in sorted(then.keys() | now.keys()):
        what = "was added" if path not in then else "was removed" if path not in now else "was changed"
        if then.get(path) != now.get(path):
            raise PackageAltered(name=manifest.name, version=manifest.version, file=path, what=what)
    if digest_of(files) != statement.digest:
        raise refused(manifest, "its digest is not that of the files it lists")


def _signed_by(payload: bytes, signatures: list[Any], manifest: Manifest, trusted: Callable[[str], Ed25519PublicKey]) -> str:
    """The id of the first trusted key whose signature holds; the first key's trouble is raised when there is none."""
    trouble: RegistryError | None = None
    for entry in signatures[:16]:
        by = entry.get("keyid") if isinstance(entry, dict) else None
        try:
            raw = base64.b64decode(entry["sig"], validate=True)
            trusted(str(by)).verify(raw, pae(PAYLOAD_TYPE, payload))
            return str(by)
        except (InvalidSignature, binascii.Error, ValueError, TypeError, KeyError):
            trouble = trouble or refused(manifest, "the key did not sign these bytes")
        except RegistryError as error:
            trouble = trouble or error
    raise trouble or refused(manifest, "the envelope holds no signature")


def _envelope(payload: bytes, by: str, signature: bytes) -> bytes:
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": by, "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, indent=1).encode()


def _read_envelope(folder: Path, manifest: Manifest) -> tuple[bytes, list[Any]]:
    try:
        descriptor = os.open(folder / SIGNATURE_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise NotSigned(name=manifest.name, version=manifest.version) from error
    except OSError as error:
        raise refused(manifest, f"{SIGNATURE_FILE} cannot be read") from error
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(MAX_ENVELOPE_BYTES)
    try:
        envelope = json.loads(content)
        if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(envelope["signatures"], list):
            raise ValueError
        return base64.b64decode(envelope["payload"], validate=True), envelope["signatures"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(manifest, f"{SIGNATURE_FILE} is not a DSSE envelope of an in-toto statement") from error


def _statement_as_json(statement: Statement) -> dict[str, Any]:
    subject = {"name": f"{statement.name}@{statement.version}", "digest": {"sha256": statement.digest}}
    predicate = {
        "name": statement.name,
        "version": statement.version,
        "manifest": {"sha256": statement.manifest_sha256},
        "signed_at": statement.signed_at,
        "expires_at": statement.expires_at,
        "files": [asdict(file) for file in statement.files],
    }
    return {"_type": STATEMENT_TYPE, "subject": [subject], "predicateType": PREDICATE_TYPE, "predicate": predicate}


def _read_statement(payload: bytes, manifest: Manifest) -> Statement:
    try:
        raw = json.loads(payload)
        if raw["_type"] != STATEMENT_TYPE or raw["predicateType"] != PREDICATE_TYPE:
            raise ValueError
        predicate = raw["predicate"]
        expires = str(predicate["expires_at"])
        if expires and datetime.fromisoformat(expires).tzinfo is None:
            raise ValueError
        return Statement(
            name=str(predicate["name"]),
            version=str(predicate["version"]),
            digest=str(raw["subject"][0]["digest"]["sha256"]),
            manifest_sha256=str(predicate["manifest"]["sha256"]),
            signed_at=str(predicate["signed_at"]),
            expires_at=expires,
            files=tuple(PackageFile(**file) for file in predicate["files"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError) as error:
        raise refused(manifest, "the statement is not one of a caregrid model package") from error


def refused(manifest: Manifest, reason: str) -> SignatureRefused:
    """The error for a signature that does not hold."""
    return SignatureRefused(name=manifest.name, version=manifest.version, reason=reason)
