"""Compares the adapter with hazen's own command line, number by number; prints both as JSON and how many differ.

    ENVIRONMENT/bin/python evaluate.py FOLDER [FOLDER ...]

Run it with the Python of the environment made from requirements.txt, caregrid's sources on PYTHONPATH. FOLDER: one series each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
sys.path.insert(0, str(PACKAGE / "code"))

import mr_phantom_names as names  # noqa: E402
import mr_phantom_quality  # noqa: E402


def main() -> None:
    """One entry per series and task: what the command line gives, what the adapter gives."""
    folders = [Path(name).resolve() for name in sys.argv[1:]]
    mr_phantom_quality.load(PACKAGE)
    report = {folder.name: compare(folder) for folder in folders}
    differing = [f"{folder} {task}" for folder, tasks in report.items() for task, pair in tasks.items() if pair[0] != pair[1]]
    json.dump({"differing": differing, "command line and adapter": report}, sys.stdout, indent=1)


def compare(folder: Path) -> dict[str, tuple[dict[str, float | None], dict[str, float | None]]]:
    """Task → (command line, adapter), each as name → number."""
    files = sorted(str(path) for path in folder.glob("*.dcm"))
    return {
        task: (_wanted(task, command_line(task, folder)), _wanted(task, mr_phantom_quality.measure(task, files)))
        for task in names.TASKS
    }


def command_line(task: str, folder: Path) -> Sequence[Mapping[str, Any]] | str:
    """hazen's own answer in JSON; its exit message where it gives none."""
    hazen = Path(sys.executable).with_name("hazen")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "result.json"
        command = [str(hazen), task, str(folder), "--format", "json", "--result", str(target)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, check=False)
        if done.returncode or not target.exists():
            return f"exit code {done.returncode}"
        measurements: list[Mapping[str, Any]] = json.loads(target.read_text())["measurements"]
    return measurements


def _wanted(task: str, answer: Sequence[Mapping[str, Any]] | str) -> dict[str, float | None]:
    if isinstance(answer, str):
        return {names.value_name(wanted.concept): None for wanted in names.WANTED[task]}
    return {names.value_name(wanted.concept): names.pick(answer, wanted) for wanted in names.WANTED[task]}


if __name__ == "__main__":
    main()
