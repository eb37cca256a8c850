"""The ACR phantom measured by hazen (Guy's and St Thomas', Apache-2.0): its tasks are called as they are, their numbers coded.

Runs in an environment of its own (requirements.txt): hazen pins libraries that the rest does not want.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mr_phantom_names as names
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset

from caregrid.domain.codes import ABSENT, INDETERMINATE, PRESENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture
from caregrid.domain.images import AlgorithmInput

#: What one task gave: hazen's measurements as (name, type, subtype, description, value), or the class of its error.
Answer = list[Mapping[str, Any]] | str

PANEL = 192


def load(package: Path) -> None:
    """Import hazen once; it opens a log file in the working folder, so that must be one it may write to."""
    os.chdir(tempfile.mkdtemp())
    importlib.import_module("hazenlib.orchestration")
    # Its log repeats header values; the least it can be set to is what its own option --log critical does.
    logging.getLogger("hazenlib").setLevel(logging.CRITICAL)
    logging.getLogger().setLevel(logging.CRITICAL)


def run(input: AlgorithmInput) -> Findings:
    """Every hazen task on the series; a task that fails becomes a measurement that says it could not be made."""
    series = input.one("phantom")
    files = sorted(str(path) for path in series.files)
    headers = [dcmread(path, stop_before_pixels=True) for path in files]
    used = tuple(str(header.SOPInstanceUID) for header in headers)
    answers = {task: measure(task, files) for task in names.TASKS}
    findings = tuple(_finding(task, answers[task], input.parameters, headers[0], used) for task in names.TASKS)
    phantom = _recognised(findings)
    failed = [one.tracking_id for one in findings if any(number.value is None for number in one.measurements)]
    values = _values(findings) | {"phantom_recognised": phantom == PRESENT, "tasks_failed": len(failed)}
    first = Finding(
        "phantom", names.IMAGE_QUALITY, evaluations=(Evaluation(names.PHANTOM_RECOGNISED, phantom),), source_instances=used
    )
    return Findings(
        summary=_summary(findings, phantom, failed),
        findings=(first, *findings),
        pictures=(Picture("Phantom", _contact_sheet(files), used),),
        used_instances=used,
        values=values,
        warnings=_warnings(phantom, failed, answers),
    )


def measure(task: str, files: Sequence[str]) -> Answer:
    """What hazen's ``task`` gives on ``files``: the same call its command line makes."""
    orchestration = importlib.import_module("hazenlib.orchestration")
    with tempfile.TemporaryDirectory() as reports, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = orchestration.init_task(task, list(files), False, reports, **names.TASKS[task]).run()
        except Exception as error:  # hazen's tasks raise whatever their libraries raise when a phantom is not as they expect
            return type(error).__name__
    return [
        {"name": one.name, "type": one.type, "subtype": one.subtype, "description": one.description, "value": one.value}
        for one in result.measurements
    ]


def _finding(task: str, answer: Answer, limits: Mapping[str, Any], header: Dataset, used: tuple[str, ...]) -> Finding:
    """A task's measurements, coded, and whether they keep the site's limits."""
    measurements = []
    evaluations = []
    for wanted in names.WANTED[task]:
        value = None if isinstance(answer, str) else names.pick(answer, wanted)
        qualifier = names.MEASUREMENT_FAILURE if value is None else None
        measurements.append(Measurement(wanted.concept, value, wanted.unit, qualifier))
    judged = names.within_limits(
        task, [one.value for one in measurements], limits, float(header.get("MagneticFieldStrength") or 0)
    )
    if judged is not None:
        evaluations.append(Evaluation(names.WITHIN_LIMITS, {True: PRESENT, False: ABSENT}[judged]))
    elif task in names.JUDGED:
        evaluations.append(Evaluation(names.WITHIN_LIMITS, INDETERMINATE))
    return Finding(
        tracking_id=task.removeprefix("acr_").replace("_", "-"),
        concept=names.IMAGE_QUALITY,
        measurements=tuple(measurements),
        evaluations=tuple(evaluations),
        source_instances=used,
    )


def _recognised(findings: Sequence[Finding]) -> Code:
    """Whether what was measured is as wide as the ACR large phantom (190 mm); hazen itself measures anything round."""
    lengths = [
        one.value
        for finding in findings
        if finding.tracking_id == "geometric-accuracy"
        for one in finding.measurements
        if one.value is not None
    ]
    if not lengths:
        return INDETERMINATE
    return PRESENT if all(171 <= length <= 209 for length in lengths) else ABSENT


def _values(findings: Sequence[Finding]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for finding in findings:
        for one in finding.measurements:
            if one.value is not None:
                found[names.value_name(one.concept)] = one.value
        for answer in finding.evaluations:
            if answer.value != INDETERMINATE:
                found[f"{finding.tracking_id.replace('-', '_')}_within_limits"] = answer.value == PRESENT
    return found


def _summary(findings: Sequence[Finding], phantom: Code, failed: Sequence[str]) -> str:
    if phantom != PRESENT:
        return "This does not measure like the ACR large phantom; the figures mean little"
    outside = [one.tracking_id for one in findings if Evaluation(names.WITHIN_LIMITS, ABSENT) in one.evaluations]
    text = (
        "ACR phantom: outside the limits in " + ", ".join(outside)
        if outside
        else "ACR phantom: all measured tests within the limits"
    )
    return text + (f"; {len(failed)} test(s) could not be measured" if failed else "")


def _warnings(phantom: Code, failed: Sequence[str], answers: Mapping[str, Answer]) -> tuple[str, ...]:
    strange = () if phantom == PRESENT else ("The object is not as wide as the ACR large phantom (190 mm)",)
    missing = (f"Not everything of {', '.join(failed)} could be measured",) if failed else ()
    raised = tuple(f"hazen {task} ended with {answer}" for task, answer in answers.items() if isinstance(answer, str))
    return (*strange, *missing, *raised)


def _contact_sheet(files: Sequence[str]) -> NDArray[np.uint8]:
    """The slices side by side, four in a row, each in its own grey scale; decoding is hazen's environment's."""
    slices = sorted((dcmread(path) for path in files), key=lambda header: int(header.get("InstanceNumber") or 0))
    panels = [_panel(one.pixel_array) for one in slices[:12]]
    panels += [np.zeros((PANEL, PANEL), np.uint8)] * (-len(panels) % 4)
    rows = [np.hstack(panels[start : start + 4]) for start in range(0, len(panels), 4)]
    return np.repeat(np.vstack(rows)[..., None], 3, axis=2)


def _panel(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    frame = pixels.astype(np.float32).reshape(-1, *pixels.shape[-2:])[0]
    top = float(np.percentile(frame, 99.5)) or 1.0
    grey = Image.fromarray(np.clip(frame / top * 255, 0, 255).astype(np.uint8))
    return np.asarray(grey.resize((PANEL, PANEL), Image.Resampling.BILINEAR))
