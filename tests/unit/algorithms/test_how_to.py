"""The worked example of docs/how-to/add-an-algorithm.md works as it stands."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from caregrid.registry.manifest import read_manifest
from caregrid.runtime import python
from caregrid.runtime.exchange import read_findings, write_findings
from caregrid.runtime.inputs import prepare
from tests.unit.algorithms import packages

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "add-an-algorithm.md"


def blocks() -> dict[str, str]:
    """File name → the code block below its heading."""
    found = re.findall(r"^## \d\. `([^`]+)`.*?^```\w+\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return dict(found)


def test_the_example_is_a_package_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(blocks()) == ["README.md", "__init__.py", "algorithm.toml", "code/tissue_volume.py"]
    package = tmp_path / "tissue_volume"
    for name, text in blocks().items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    samples = importlib.import_module("tissue_volume").SAMPLES
    # The code folder has a module of the same name.
    monkeypatch.delitem(sys.modules, "tissue_volume")
    manifest = read_manifest(package)
    run = python.load_entry(manifest, package)
    given = prepare(manifest.inputs, packages.sample(samples[0]), manifest.parameters, package)
    write_findings(run(given), tmp_path)
    findings = read_findings(tmp_path, manifest)
    assert findings.values["tissue_ml"] > 0
