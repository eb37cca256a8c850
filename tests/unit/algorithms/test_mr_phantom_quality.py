"""The adapter round hazen: picking, limits and failures here; the same numbers as hazen's command line in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caregrid.domain.codes import ABSENT, INDETERMINATE, PRESENT
from caregrid.registry.manifest import read_manifest
from tests.support.data import shared
from tests.unit.algorithms import packages

adapter = packages.code("mr_phantom_quality", "mr_phantom_quality")
names = packages.code("mr_phantom_quality", "mr_phantom_names")

LIMITS = read_manifest(packages.package("mr_phantom_quality")).parameters


def measurement(subtype: str, value: Any, description: str = "", kind: str = "measured") -> dict[str, Any]:
    return {"name": "any", "type": kind, "subtype": subtype, "description": description, "value": value}


def test_the_right_number_is_picked_out_of_several() -> None:
    answer = [
        measurement("length difference", 0.5, "Slice 1 series"),
        measurement("length difference", 4.5, "Slice 11 series"),
    ]
    assert [names.pick(answer, wanted) for wanted in names.WANTED["acr_slice_position"]] == [0.5, 4.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True, "7", {"a": 1}])
def test_what_is_not_a_finite_number_is_no_measurement(value: Any) -> None:
    (wanted,) = names.WANTED["acr_ghosting"]
    assert names.pick([measurement("signal ghosting", value)], wanted) is None
    assert names.pick([], wanted) is None


@pytest.mark.parametrize(
    ("task", "values", "tesla", "kept"),
    [
        ("acr_uniformity", [87.5], 1.5, True),
        ("acr_uniformity", [87.4], 1.5, False),
        ("acr_uniformity", [82.0], 3.0, True),
        ("acr_ghosting", [2.6], 1.5, False),
        ("acr_slice_position", [5.0, -5.0], 1.5, True),
        ("acr_slice_position", [0.0, -5.1], 1.5, False),
        ("acr_slice_thickness", [4.3], 1.5, True),
        ("acr_slice_thickness", [5.71], 1.5, False),
        ("acr_geometric_accuracy", [188.0, 192.0], 1.5, True),
        ("acr_geometric_accuracy", [190.0, 187.9], 1.5, False),
        ("acr_spatial_resolution", [1.0], 1.5, True),
        ("acr_spatial_resolution", [1.1], 1.5, False),
        ("acr_uniformity", [None], 1.5, None),
        ("acr_snr", [40.0], 1.5, None),
    ],
)
def test_limits_are_kept_or_not(task: str, values: list[float | None], tesla: float, kept: bool | None) -> None:
    assert names.within_limits(task, values, LIMITS, tesla) is kept


def test_a_task_that_failed_is_a_measurement_that_could_not_be_made() -> None:
    from pydicom.dataset import Dataset

    finding = adapter._finding("acr_uniformity", "UnboundLocalError", LIMITS, Dataset(), ("1.2",))
    (one,) = finding.measurements
    assert one.value is None
    assert one.qualifier == names.MEASUREMENT_FAILURE
    assert [answer.value for answer in finding.evaluations] == [INDETERMINATE]


@pytest.mark.parametrize(("length", "recognised"), [(190.0, PRESENT), (150.0, ABSENT), (None, INDETERMINATE)])
def test_the_phantom_is_known_by_its_width(length: float | None, recognised: Any) -> None:
    from pydicom.dataset import Dataset

    subtypes = [wanted.subtype for wanted in names.WANTED["acr_geometric_accuracy"]]
    answer = [measurement(subtype, length) for subtype in subtypes]
    finding = adapter._finding("acr_geometric_accuracy", answer, LIMITS, Dataset(), ("1.2",))
    assert adapter._recognised([finding]) == recognised


@pytest.mark.slow
def test_the_adapter_gives_the_numbers_of_hazens_own_command_line(tmp_path: Path) -> None:
    folder = shared("mr-acr-phantom/GE")
    package = packages.package("mr_phantom_quality")
    python = packages.environment("hazen-2", package / "requirements.txt") / "hazen-2" / "bin" / "python"
    command = [str(python), str(package / "evaluation" / "evaluate.py"), str(folder)]
    sources = str(Path(packages.SLOT).parents[1])
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": sources}, capture_output=True, check=True, timeout=250
    )
    report = json.loads(done.stdout[done.stdout.index(b"{") :])
    assert report["differing"] == []
    line, adapted = report["command line and adapter"]["GE"]["acr_snr"]
    assert line == adapted
    assert line["snr"] > 1
