"""The registry hands out nothing that is not signed, unchanged, in date and trusted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from caregrid.errors import (
    KeyRevoked,
    KeyUnknown,
    ManifestInvalid,
    ModelExists,
    ModelStateRefused,
    ModelUnknown,
    NotFound,
    NotSigned,
    PackageAltered,
    PackageRefused,
    RegistryError,
    SignatureExpired,
    SignatureRefused,
    TransitionRefused,
)
from caregrid.registry import signing
from caregrid.registry.package import SIGNATURE_FILE
from caregrid.registry.registry import Registry, precedence
from caregrid.store import audit
from caregrid.store.tables import audit as audit_table
from tests.unit.registry.packages import make_package


@pytest.fixture
def registry(db: sa.Engine, tmp_path: Path) -> Registry:
    return Registry(db, tmp_path / "models")


@pytest.fixture
def key(registry: Registry) -> bytes:
    private, public = registry.new_keypair()
    registry.trust(public, "hospital", "admin", "our own key")
    return private


def active(registry: Registry, key: bytes, folder: Path, version: str = "1.0.0") -> str:
    manifest = registry.add(make_package(folder, version=version), "ann", "wanted")
    registry.sign("counting", version, key, "hospital", "ann", "checked")
    registry.activate("counting", version, "ann", "go live")
    return manifest.digest


def files_of(registry: Registry, digest: str) -> Path:
    return registry.folder / "packages" / digest


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def test_the_whole_way(registry: Registry, key: bytes, tmp_path: Path) -> None:
    digest = active(registry, key, tmp_path / "p")
    manifest, path = registry.load(digest)
    assert (manifest.name, manifest.version, manifest.digest) == ("counting", "1.0.0", digest)
    assert (path / "code" / "counting.py").is_file()
    assert registry.resolve("counting").digest == digest
    (listed,) = registry.list()
    assert (listed.state, listed.signed_by) == ("active", "hospital")
    assert listed.expires_at is not None


def test_every_change_is_audited_with_who_and_why(registry: Registry, key: bytes, tmp_path: Path) -> None:
    active(registry, key, tmp_path / "p")
    registry.retire("counting", "1.0.0", "bob", "replaced")
    with registry.engine.connect() as connection:
        rows = connection.execute(sa.select(audit_table.c.what, audit_table.c.who, audit_table.c.why)).all()
        audit.verify(connection)
    assert [tuple(row) for row in rows] == [
        ("key trusted", "admin", "our own key"),
        ("model added", "ann", "wanted"),
        ("model signed", "ann", "checked"),
        ("model activated", "ann", "go live"),
        ("model retired", "bob", "replaced"),
    ]


def test_unsigned_is_refused(registry: Registry, key: bytes, tmp_path: Path) -> None:
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    with pytest.raises(NotSigned):
        registry.verify("counting", "1.0.0")
    with pytest.raises(NotSigned):
        registry.activate("counting", "1.0.0", "ann", "go")


def test_one_changed_byte_is_noticed_after_it_was_handed_out(registry: Registry, key: bytes, tmp_path: Path) -> None:
    digest = active(registry, key, tmp_path / "p")
    _settle(files_of(registry, digest))
    registry.load(digest)
    assert digest in registry._hashed, "the next load must come from the cache for this test to mean something"
    code = files_of(registry, digest) / "code" / "counting.py"
    status = code.stat()
    changed = bytearray(code.read_bytes())
    changed[5] ^= 1
    overwrite(code, bytes(changed))
    code.chmod(status.st_mode)
    os.utime(code, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PackageAltered) as caught:
        registry.load(digest)
    assert caught.value.details["file"] == "code/counting.py"
    assert caught.value.details["what"] == "was changed"


def _settle(folder: Path) -> None:
    """Wait until the files are old enough for their times to be believed."""
    newest = max(path.stat().st_ctime for path in folder.rglob("*"))
    time.sleep(max(0.0, newest + 2.1 - time.time()))


@pytest.mark.parametrize(
    ("what", "file"), [("was added", "code/__pycache__/counting.cpython-311.pyc"), ("was removed", "README.md")]
)
def test_added_and_removed_files_are_named(registry: Registry, key: bytes, tmp_path: Path, what: str, file: str) -> None:
    digest = active(registry, key, tmp_path / "p")
    path = files_of(registry, digest) / file
    if what == "was added":
        path.parent.mkdir()
        path.write_bytes(b"x")
    else:
        path.unlink()
    with pytest.raises(PackageAltered) as caught:
        registry.load(digest)
    assert (caught.value.details["file"], caught.value.details["what"]) == (file, what)


def test_a_file_made_executable_is_noticed(registry: Registry, key: bytes, tmp_path: Path) -> None:
    digest = active(registry, key, tmp_path / "p")
    (files_of(registry, digest) / "README.md").chmod(0o755)
    with pytest.raises(PackageAltered):
        registry.load(digest)


def test_expired(registry: Registry, key: bytes, tmp_path: Path) -> None:
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    registry.sign("counting", "1.0.0", key, "hospital", "ann", "checked", valid_days=-1)
    with pytest.raises(SignatureExpired):
        registry.verify("counting", "1.0.0")


def test_signature_expires_while_active(registry: Registry, key: bytes, tmp_path: Path) -> None:
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    registry.sign("counting", "1.0.0", key, "hospital", "ann", "checked", valid_days=2 / 86400)
    digest = registry.activate("counting", "1.0.0", "ann", "go").digest
    time.sleep(2.1)
    with pytest.raises(SignatureExpired):
        registry.load(digest)


def test_unknown_key(registry: Registry, tmp_path: Path) -> None:
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    registry.sign("counting", "1.0.0", registry.new_keypair()[0], "stranger", "ann", "checked")
    with pytest.raises(KeyUnknown):
        registry.verify("counting", "1.0.0")


def test_revoked_key_stops_what_was_active(registry: Registry, key: bytes, tmp_path: Path) -> None:
    digest = active(registry, key, tmp_path / "p")
    (trusted,) = registry.keys()
    registry.revoke(trusted.key_id[:12], "admin", "laptop lost")
    with pytest.raises(KeyRevoked):
        registry.load(digest)
    with pytest.raises(RegistryError, match="was revoked"):
        registry.trust(trusted.public_key.encode(), "again", "admin", "why not")
    with pytest.raises(NotFound):
        registry.revoke("0" * 64, "admin", "no such key")


def test_signature_of_another_key_under_a_trusted_id(registry: Registry, key: bytes, tmp_path: Path) -> None:
    digest = active(registry, key, tmp_path / "p")
    path = files_of(registry, digest) / SIGNATURE_FILE
    envelope = json.loads(path.read_bytes())
    other = signing.read_private_key(registry.new_keypair()[0])
    signing.sign_folder(files_of(registry, digest), other)
    forged = json.loads(path.read_bytes())
    forged["signatures"][0]["keyid"] = envelope["signatures"][0]["keyid"]
    path.write_text(json.dumps(forged))
    with pytest.raises(SignatureRefused):
        registry.load(digest)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"payloadType":1,"payload":"","signatures":[]}', b"[" * 100_000])
def test_garbage_signature(registry: Registry, key: bytes, tmp_path: Path, content: bytes) -> None:
    digest = active(registry, key, tmp_path / "p")
    (files_of(registry, digest) / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(SignatureRefused):
        registry.load(digest)


def test_signature_of_an_older_package_does_not_hold_for_a_newer(registry: Registry, key: bytes, tmp_path: Path) -> None:
    old = active(registry, key, tmp_path / "p")
    new = registry.add(make_package(tmp_path / "q", version="1.1.0"), "ann", "wanted").digest
    content = (files_of(registry, old) / SIGNATURE_FILE).read_bytes()
    (files_of(registry, new) / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(SignatureRefused, match=r"it is for counting 1\.0\.0"):
        registry.verify("counting", "1.1.0")


def test_a_manufacturers_signature_comes_with_the_package(registry: Registry, key: bytes, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    signing.sign_folder(package, signing.read_private_key(key))
    registry.add(package, "ann", "wanted")
    assert registry.list()[0].signed_by == "hospital"
    registry.activate("counting", "1.0.0", "ann", "go")


def test_other_package_under_the_same_name_and_version(registry: Registry, tmp_path: Path) -> None:
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    registry.add(make_package(tmp_path / "p"), "ann", "the same again")
    assert len(registry.list()) == 1
    (tmp_path / "p" / "README.md").write_text("other")
    with pytest.raises(ModelExists):
        registry.add(tmp_path / "p", "ann", "changed")
    assert list((registry.folder / "tmp").iterdir()) == []


def test_links_and_pipes_are_refused(registry: Registry, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    (package / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(PackageRefused):
        registry.add(package, "ann", "wanted")
    (package / "passwd").unlink()
    os.mkfifo(package / "pipe")
    with pytest.raises(PackageRefused):
        registry.add(package, "ann", "wanted")
    assert list((registry.folder / "tmp").iterdir()) == []
    assert registry.list() == []


def test_too_many_files(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caregrid.registry.package.MAX_FILES", 2)
    with pytest.raises(PackageRefused, match="at most 2"):
        registry.add(make_package(tmp_path / "p"), "ann", "wanted")


def test_states(registry: Registry, key: bytes, tmp_path: Path) -> None:
    digest = registry.add(make_package(tmp_path / "p"), "ann", "wanted").digest
    with pytest.raises(ModelStateRefused, match="is added"):
        registry.resolve("counting")
    registry.sign("counting", "1.0.0", key, "hospital", "ann", "checked")
    with pytest.raises(ModelStateRefused):
        registry.load(digest)
    registry.activate("counting", "1.0.0", "ann", "go")
    with pytest.raises(TransitionRefused):
        registry.activate("counting", "1.0.0", "ann", "go")
    registry.retire("counting", "1.0.0", "ann", "old")
    with pytest.raises(ModelStateRefused, match="is retired"):
        registry.resolve("counting")
    assert registry.load(digest)[0].digest == digest, "a run under way keeps the model it started with"
    with pytest.raises(ModelUnknown):
        registry.resolve("nothing")
    with pytest.raises(ModelUnknown):
        registry.load("0" * 64)


def test_newest_active_by_semantic_version(registry: Registry, key: bytes, tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0", "2.0.0-rc.1"):
        active(registry, key, tmp_path / version, version)
    assert registry.resolve("counting").version == "1.10.0"
    assert registry.resolve("counting", "1.9").version == "1.9.0"
    assert registry.resolve("counting", "2.0.0-rc.1").version == "2.0.0-rc.1"
    with pytest.raises(ModelUnknown):
        registry.resolve("counting", "2")
    assert [item.manifest.version for item in registry.list()] == ["2.0.0-rc.1", "1.10.0", "1.9.0"]


def test_precedence_is_semvers_own_example() -> None:
    order = [
        "1.0.0-alpha",
        "1.0.0-alpha.1",
        "1.0.0-alpha.beta",
        "1.0.0-beta",
        "1.0.0-beta.2",
        "1.0.0-beta.11",
        "1.0.0-rc.1",
        "1.0.0",
    ]
    assert sorted([*order[4:], *order[:4]], key=precedence) == order


def test_keys_with_a_passphrase_and_of_another_kind(registry: Registry, tmp_path: Path) -> None:
    private, public = registry.new_keypair(b"long enough")
    by = registry.trust(public, "locked", "admin", "ours")
    registry.add(make_package(tmp_path / "p"), "ann", "wanted")
    with pytest.raises(RegistryError, match="passphrase"):
        registry.sign("counting", "1.0.0", private, "locked", "ann", "checked")
    assert registry.sign("counting", "1.0.0", private, "locked", "ann", "checked", passphrase=b"long enough") == by
    registry.verify("counting", "1.0.0")
    with pytest.raises(RegistryError):
        registry.trust(private, "not public", "admin", "oops")


def test_bad_manifest_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    package = make_package(tmp_path / "p")
    (package / "algorithm.toml").write_text("name = 1")
    with pytest.raises(ManifestInvalid):
        registry.add(package, "ann", "wanted")
    assert not (registry.folder / "packages").exists()


def test_envelope_is_plain_dsse(registry: Registry, key: bytes, tmp_path: Path) -> None:
    """Checked by hand as DSSE's protocol text says, so that other tools can verify it too."""
    import base64

    package = make_package(tmp_path / "p")
    private = signing.read_private_key(key)
    signing.sign_folder(package, private)
    envelope = json.loads((package / SIGNATURE_FILE).read_bytes())
    body = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"]
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(body)).encode(), body])
    private.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)
    statement = json.loads(body)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0]["name"] == "counting@1.0.0"
