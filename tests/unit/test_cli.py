"""The command line, as a person uses it: a site made, a model signed by another's key, workflows judged, the log verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from tests.support.site import PACKAGE, workflow_text


def caregrid(*arguments: str | Path, code: int = 0, stdin: str = "") -> str:
    """Run the command; what it printed. Fails when it ends with another exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "caregrid.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "HOME": "/tmp"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "site"
    said = caregrid("site", "init", folder, "--name", 'St "Elsewhere"', "--no-builtin")
    assert "web user admin, password" in said
    return folder


def test_second_init_is_refused(home: Path) -> None:
    assert "holds a site" in caregrid("site", "init", home, code=2)


def test_private_key_is_for_its_owner_only(home: Path) -> None:
    assert (home / "keys" / "site.key").stat().st_mode & 0o077 == 0


def test_no_site_here(tmp_path: Path) -> None:
    assert "make one with: caregrid site init" in caregrid("site", "status", "--home", tmp_path, code=2)


def test_misspelt_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('[site]\nname = "x"\n[dimse]\nprot = 1\n')
    assert "did you mean dimse.port" in caregrid("site", "status", "--home", tmp_path, code=2)


def test_model_is_refused_until_a_trusted_key_has_signed_it(home: Path, tmp_path: Path) -> None:
    at = ("--home", home)
    assert "mean-value 1.0.0 added" in caregrid("model", "add", PACKAGE, *at)
    assert "not signed" in caregrid("model", "verify", "mean-value", "1.0.0", *at, code=5)
    caregrid("model", "keygen", "vendor", "--folder", tmp_path)
    caregrid("model", "sign", "mean-value", "1.0.0", "--key", tmp_path / "vendor.key", "--why", "test", "--no-activate", *at)
    assert "does not trust" in caregrid("model", "verify", "mean-value", "1.0.0", *at, code=5)
    caregrid("model", "trust", tmp_path / "vendor.pub", "vendor", "--why", "contract 7", *at)
    caregrid("model", "sign", "mean-value", "1.0.0", "--key", tmp_path / "vendor.key", "--why", "test", *at)
    assert "signature holds" in caregrid("model", "verify", "mean-value", "1.0.0", *at)
    listed = caregrid("model", "list", *at)
    assert "vendor" in listed
    assert "active" in listed
    caregrid("model", "retire", "mean-value", "1.0.0", "--why", "test", *at)
    assert "retired" in caregrid("model", "list", *at)


def test_workflow_errors_have_lines(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("workflow: w\ndescription: d\nowner: o\npriority: urgent\ntasks:\n  - {id: a, kind: rum}\n")
    said = caregrid("workflow", "validate", file, code=4)
    assert f"{file}:4:" in said
    assert f"{file}:6:" in said


def test_workflow_is_added_listed_tested_and_retired(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(workflow_text())
    at = ("--home", home)
    assert "is active" in caregrid("workflow", "add", file, "--why", "test", *at)
    assert "mean-value" in caregrid("workflow", "list", *at)
    said = caregrid("workflow", "test", str(get_testdata_file("CT_small.dcm")), *at)
    assert "mean-value: applies" in said
    assert "would have run on 0 of 0 studies" in caregrid("workflow", "dry-run", file, *at)
    caregrid("workflow", "retire", "mean-value", "--why", "test", *at)
    assert "No workflow" in caregrid("workflow", "retire", "mean-value", "--why", "test", *at, code=4)


def test_status_is_json_for_machines(home: Path) -> None:
    facts = json.loads(caregrid("site", "status", "--json", "--home", home))
    assert set(facts) >= {"processes", "studies", "runs", "deliveries", "reviews", "quarantine", "rejections"}


def test_audit_verifies_and_finds_a_changed_head(home: Path) -> None:
    said = caregrid("audit", "verify", "--home", home)
    head = said.split("head ")[1].strip()
    caregrid("audit", "verify", "--home", home, "--head", head)
    wrong = head[:-1] + ("0" if head[-1] != "0" else "1")
    assert "differs from the copy" in caregrid("audit", "verify", "--home", home, "--head", wrong, code=10)


def test_unknown_run_study_and_delivery_are_named(home: Path) -> None:
    at = ("--home", home)
    assert "There is no run" in caregrid("run", "retry", "nope", "--why", "x", *at, code=8)
    assert "There is no study" in caregrid("study", "show", "1.2.3", *at, code=8)
    assert "There is no delivery" in caregrid("delivery", "resend", "99", "--why", "x", *at, code=8)


def test_user_with_a_weak_password_is_refused(home: Path) -> None:
    add = ("user", "add", "ann", "--role", "clinician", "--password-stdin", "--home", home)
    caregrid(*add, stdin="short\n", code=9)
    assert "user ann added" in caregrid(*add, stdin="correct horse battery\n")


def test_monai_workflow_is_imported_with_its_report(tmp_path: Path) -> None:
    source = tmp_path / "m.json"
    source.write_text(
        json.dumps(
            {
                "name": "lung",
                "version": "1",
                "informatics_gateway": {"ae_title": "MONAI", "data_origins": [], "export_destinations": ["PACS"]},
                "tasks": [
                    {
                        "id": "seg",
                        "type": "argo",
                        "args": {"workflow_template_name": "t"},
                        "task_destinations": [{"name": "out"}],
                    },
                    {"id": "out", "type": "export", "export_destinations": [{"name": "PACS"}], "task_destinations": []},
                ],
            }
        )
    )
    said = caregrid("workflow", "import-monai", source, "-o", tmp_path / "w.yaml")
    assert "no equivalent" in said
    caregrid("workflow", "validate", tmp_path / "w.yaml")


def test_doctor_says_what_is_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "caregrid.cli", "doctor", "--home", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1)
    assert "bubblewrap" in done.stdout
