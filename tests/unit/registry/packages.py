"""A small real package for the tests of registry and runtime."""

from __future__ import annotations

from pathlib import Path

MANIFEST = """
name = "{name}"
version = "{version}"
title = "Counts what it is given"
runner = "python"
entry = "counting:run"
intended_use = "Tests only."
regulatory_status = "not a medical device"
manufacturer = "caregrid"
algorithm_family = ["123110", "DCM", "Artificial Intelligence"]
timeout_seconds = {timeout}

[[inputs]]
name = "any"
form = "files"
modality = ["CT"]

[[outputs]]
name = "count"
kind = "measurement"
concept = ["118565006", "SCT", "Volume"]
unit = ["ml", "UCUM", "ml"]

[[outputs]]
name = "finding"
kind = "finding"
concept = ["39607008", "SCT", "Lung"]

[[outputs]]
name = "lung"
kind = "segment"
concept = ["44029006", "SCT", "Left lung"]

[[outputs]]
name = "present"
kind = "evaluation"
concept = ["57297003", "SCT", "Hyperinflation of lung"]

[resources]
memory_mb = {memory}
cpus = 1
"""

CODE = """
from caregrid.domain.findings import Findings

calls = 0


def run(input):
    global calls
    calls += 1
    return Findings("counted", values={"calls": calls, "files": sum(len(s.files) for g in input.series.values() for s in g)})
"""


def make_package(
    folder: Path, code: str = CODE, name: str = "counting", version: str = "1.0.0", timeout: int = 30, memory: int = 1024
) -> Path:
    """Write a package into ``folder`` and return it."""
    (folder / "code").mkdir(parents=True, exist_ok=True)
    text = MANIFEST.format(name=name, version=version, timeout=timeout, memory=memory)
    (folder / "algorithm.toml").write_text(text)
    (folder / "README.md").write_text("# Counting\n")
    (folder / "code" / "counting.py").write_text(code)
    return folder
