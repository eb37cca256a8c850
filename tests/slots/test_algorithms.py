"""The promise of slot ``algorithms``, on every plug: a valid package with an honest card, that answers on its samples."""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from pydicom.sr._concepts_dict import concepts

from caregrid import plugs
from caregrid.domain.algorithm import Manifest
from caregrid.domain.codes import Code
from caregrid.domain.findings import Findings
from caregrid.errors import NoSuitableInput, SandboxMissing
from caregrid.registry.manifest import read_manifest
from caregrid.registry.package import IGNORED_FOLDERS, digest_of, list_files
from caregrid.runtime.exchange import read_findings, write_findings
from caregrid.runtime.inputs import prepare
from caregrid.runtime.runtime import Runtime
from tests.unit.algorithms import packages

PLUGS = plugs.names("algorithms")
CARD_HEADINGS = ("**Status:", "## What it does", "## Data", "## Measured", "## Limits")

SAMPLES = [
    pytest.param(name, sample, id=f"{name}-{sample.rpartition(':')[2]}")
    for name in PLUGS
    for sample in plugs.load("algorithms", name).SAMPLES
]


def manifest_of(name: str) -> Manifest:
    return read_manifest(packages.package(name))


def answered(name: str, sample: str, folder: Path) -> Findings:
    """The answer on a sample, after it went through the exchange, which refuses what the manifest does not declare."""
    manifest = manifest_of(name)
    if manifest.environment:
        pytest.skip(f"needs the environment {manifest.environment}")
    files = packages.sample(sample)
    _manifest, run = packages.entry(name)
    write_findings(run(prepare(manifest.inputs, files, manifest.parameters, packages.package(name))), folder)
    return read_findings(folder, manifest)


def test_there_are_algorithms_for_ct_x_ray_ultrasound_and_mr() -> None:
    modalities = {modality for name in PLUGS for spec in manifest_of(name).inputs for modality in spec.modality}
    assert {"CT", "CR", "DX", "US", "MR"} <= modalities


@pytest.mark.parametrize("name", PLUGS)
def test_the_manifest_names_the_folder_and_says_what_it_is_for(name: str) -> None:
    manifest = manifest_of(name)
    assert manifest.name == name.replace("_", "-")
    assert len(manifest.intended_use) > 40
    assert "not a medical device" in manifest.regulatory_status


@pytest.mark.parametrize("name", PLUGS)
def test_the_model_card_says_status_data_figures_and_limits(name: str) -> None:
    card = (packages.package(name) / manifest_of(name).model_card).read_text()
    assert card.startswith(f"# {manifest_of(name).name}")
    assert [heading for heading in CARD_HEADINGS if heading not in card] == []
    assert (packages.package(name) / "evaluation" / "evaluate.py").is_file(), "figures nobody can measure again"


@pytest.mark.parametrize("name", PLUGS)
def test_codes_of_public_schemes_are_not_misused(name: str) -> None:
    """Where pydicom's dictionary knows a code's value, it must mean what we say it means."""
    manifest = manifest_of(name)
    said = [manifest.algorithm_family, *(spec.concept for spec in manifest.outputs)]
    said += [spec.unit for spec in manifest.outputs if spec.unit]
    assert [code for code in said if code.scheme == "DCM" and not _means(code)] == []
    assert [code for code in said if code.scheme not in ("DCM", "SCT", "UCUM", "LN", "99CAREGRID")] == []


def _means(code: Code) -> bool:
    for by_value in concepts[code.scheme].values():
        if code.value in by_value:
            return bool(by_value[code.value][0].casefold() == code.meaning.casefold())
    return False


@pytest.mark.parametrize(("name", "sample"), SAMPLES)
def test_it_answers_on_its_sample_with_what_it_declares(
    name: str, sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_args: Any) -> None:
        raise AssertionError("an algorithm opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    findings = answered(name, sample, tmp_path)
    used = {uid for files in packages.sample(sample).values() for uid in _instances(files)}
    assert findings.findings
    assert findings.summary
    assert set(findings.used_instances) <= used
    assert findings.used_instances
    assert all(set(one.source_instances) <= used for one in findings.findings)
    assert findings.values


def _instances(files: list[Path]) -> list[str]:
    pydicom = importlib.import_module("pydicom")
    return [str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID) for file in files]


@pytest.mark.parametrize(("name", "sample"), SAMPLES)
def test_it_answers_the_same_twice(name: str, sample: str, tmp_path: Path) -> None:
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        answered(name, sample, tmp_path / turn)
    first, second = (json.loads((tmp_path / turn / "findings.json").read_text()) for turn in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("name", PLUGS)
def test_a_study_without_its_input_is_refused_by_name(name: str) -> None:
    manifest = manifest_of(name)
    other = packages.by_series([packages.pydicom_file("waveform_ecg.dcm")])
    with pytest.raises(NoSuitableInput) as refusal:
        prepare(manifest.inputs, other, manifest.parameters, packages.package(name))
    assert manifest.inputs[0].name in refusal.value.message


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGS)
def test_it_answers_in_the_sandbox(name: str, tmp_path: Path) -> None:
    """As a site runs it: bubblewrap, no network, its own limits of memory; the environment of its own where it has one."""
    folder = packages.package(name)
    manifest = manifest_of(name)
    files = packages.sample(plugs.load("algorithms", name).SAMPLES[-1])
    environments = packages.environment(manifest.environment, folder / "requirements.txt") if manifest.environment else None
    runtime = Runtime(tmp_path, environments=environments)
    try:
        digest = digest_of(list_files(folder, IGNORED_FOLDERS))
        findings = runtime.run(dataclasses.replace(manifest, digest=digest), folder, files)
    except SandboxMissing as missing:
        pytest.skip(missing.message)
    finally:
        runtime.close()
    assert findings.findings
