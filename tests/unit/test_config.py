"""site.toml: read whole, or refused with the key that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from caregrid.config import read_site
from caregrid.errors import BadSetting, SiteMissing, UnknownSetting

GOOD = """
[site]
name = "St Elsewhere"
[dimse]
port = 4242
ae_titles = ["A", "B"]
idle_seconds = 5
[[dimse.allow]]
calling_ae = "CT1"
address = "10.0.0.0/8"
[dimse.tls]
certificate = "keys/a.pem"
key = "keys/a.key"
[engine]
off_peak = [20, 6]
[[completion]]
source = "CT*"
quiet_seconds = 5
expected_from = "PACS"
[[completion.required_series]]
match = {Modality = "CT"}
[[destination]]
name = "PACS"
kind = "cstore"
host = "pacs"
port = 104
ae_title = "PACS"
"""


def site(tmp_path: Path, text: str) -> Path:
    (tmp_path / "site.toml").write_text(text)
    return tmp_path


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    settings = read_site(site(tmp_path, GOOD))
    assert settings.dimse.ae_titles == ("A", "B")
    assert settings.dimse.allow[0].address == "10.0.0.0/8"
    assert settings.dimse.idle_seconds == 5.0
    assert settings.dimse.tls is not None
    assert settings.dimse.tls.certificate == tmp_path.resolve() / "keys/a.pem"
    assert settings.engine.off_peak == (20, 6)
    assert [policy.source for policy in settings.completion] == ["CT*", "*"]
    assert settings.completion[0].required_series[0].match == {"Modality": "CT"}
    assert settings.database_url == f"sqlite:///{tmp_path.resolve()}/data/site.db"
    assert settings.institution == "St Elsewhere"


def test_database_comes_from_the_environment_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAREGRID_DATABASE_URL", "postgresql+psycopg://x@y/z")
    assert read_site(site(tmp_path, GOOD)).database_url == "postgresql+psycopg://x@y/z"


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("port = 4242", "prot = 4242", UnknownSetting, "dimse.prot; did you mean dimse.port"),
        ("[engine]", "[engin]", UnknownSetting, "did you mean engine"),
        ("port = 4242", 'port = "4242"', BadSetting, "dimse.port must be int, not str"),
        ("port = 4242", "port = true", BadSetting, "dimse.port must be int, not bool"),
        ('kind = "cstore"', 'kind = "ftp"', BadSetting, "must be one of cstore, stow, folder"),
        ('host = "pacs"\n', "", BadSetting, "destination.PACS.host is missing"),
        ('expected_from = "PACS"', 'expected_from = "PAX"', BadSetting, "names no destination: PAX"),
        ('name = "St Elsewhere"', "", BadSetting, "site.name is missing"),
        ('calling_ae = "CT1"\n', "", BadSetting, "needs calling_ae, address"),
        ("[site]", "[site", BadSetting, "is not TOML"),
    ],
)
def test_wrong_setting_is_named(tmp_path: Path, old: str, new: str, error: type[Exception], words: str) -> None:
    assert old in GOOD
    with pytest.raises(error) as caught:
        read_site(site(tmp_path, GOOD.replace(old, new)))
    assert words in str(caught.value)


def test_no_site(tmp_path: Path) -> None:
    with pytest.raises(SiteMissing):
        read_site(tmp_path)
