"""Technical quality of every cine of a study: frozen, too dark, too bright, unsharp; calibration; writing; the best frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ultrasound_cine_measures import Measures, Region, main_region, measure, writing_outside
from ultrasound_cine_picture import contact_sheet
from ultrasound_cine_thresholds import BRIGHT_SHARE, DARK_LEVEL, SHARP_LEVEL, STILL_SHARE

from caregrid.domain.codes import ABSENT, INDETERMINATE, MILLIMETRE, NO_UNITS, PERCENT, PRESENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture
from caregrid.domain.images import AlgorithmInput, Cine

IMAGE_QUALITY = Code("111101", "DCM", "Image Quality")
GOOD, POOR = Code("122741", "DCM", "Good image quality"), Code("122742", "DCM", "Poor image quality")
BEST_IN_SET = Code("113013", "DCM", "Best In Set")
MEASUREMENT_FAILURE = Code("114006", "DCM", "Measurement failure")


def _own(value: str, meaning: str) -> Code:
    return Code(value, "99CAREGRID", meaning)


FROZEN = _own("frozen", "Cine frozen")
TOO_DARK = _own("too-dark", "Too dark")
TOO_BRIGHT = _own("too-bright", "Too bright")
UNSHARP = _own("unsharp", "Unsharp")
CALIBRATED = _own("calibrated", "Calibrated in millimetres")
WRITING = _own("writing-outside", "Writing outside the image regions")
STILL_PERCENT = _own("still-percent", "Longest unchanged run of frames")
SATURATED_PERCENT = _own("saturated-percent", "Saturated share of the sector")
BRIGHTNESS_PERCENT = _own("brightness-p90", "90th percentile of brightness in the sector")
SHARPNESS = _own("sharpness", "Sharpness, one minus blur")
MOTION = _own("motion", "Median change between frames, grey levels")
SPACING = _own("pixel-spacing", "Size of a pixel")

#: Share of the picture outside the regions that writing covers at least.
WRITING_SHARE = 0.0005
NAMES = {"frozen": "frozen", "too-dark": "too dark", "too-bright": "too bright", "unsharp": "unsharp"}


def run(input: AlgorithmInput) -> Findings:
    """One finding a cine, one for the frames it stands still in, one for its best frame."""
    cines = [cine for series in input.series["cine"] for cine in series.cines]
    measured = [(cine, measure(cine.array, main_region(cine.regions))) for cine in cines]
    findings: list[Finding] = []
    for number, (cine, measures) in enumerate(measured, 1):
        findings += _findings(f"cine-{number}", cine, measures)
    pictures = tuple(
        Picture(f"Cine {number}: best frames", contact_sheet(cine, measures), (cine.sop_instance_uid,))
        for number, (cine, measures) in enumerate(measured, 1)
    )
    faults = [_faults(measures) for _cine, measures in measured]
    return Findings(
        summary=_summary(faults),
        findings=tuple(findings),
        pictures=pictures,
        used_instances=tuple(dict.fromkeys(cine.sop_instance_uid for cine in cines)),
        values=_values(measured, faults),
        warnings=_warnings(cines),
    )


def _judgements(measures: Measures) -> dict[Code, Code]:
    """Each fault: present, absent, or indeterminate where nothing could be measured."""
    if measures.dark is None or measures.bright is None or measures.sharp is None:
        return {FROZEN: INDETERMINATE, TOO_DARK: PRESENT, TOO_BRIGHT: INDETERMINATE, UNSHARP: INDETERMINATE}
    found = {
        FROZEN: measures.still_share > STILL_SHARE,
        TOO_DARK: measures.dark < DARK_LEVEL,
        TOO_BRIGHT: measures.bright > BRIGHT_SHARE,
        UNSHARP: measures.sharp < SHARP_LEVEL,
    }
    return {fault: PRESENT if yes else ABSENT for fault, yes in found.items()}


def _faults(measures: Measures) -> list[str]:
    return [NAMES[fault.value] for fault, answer in _judgements(measures).items() if answer == PRESENT]


def _findings(name: str, cine: Cine, measures: Measures) -> list[Finding]:
    source = (cine.sop_instance_uid,)
    judged = _judgements(measures)
    quality = POOR if PRESENT in judged.values() else GOOD
    evaluations = [Evaluation(IMAGE_QUALITY, quality), *(Evaluation(fault, answer) for fault, answer in judged.items())]
    found = [
        Finding(
            tracking_id=name,
            concept=IMAGE_QUALITY,
            measurements=_measurements(cine, measures),
            evaluations=(*evaluations, *_about_object(cine)),
            source_instances=source,
        )
    ]
    if judged[FROZEN] == PRESENT:
        first, last = measures.still
        found.append(Finding(f"{name}-frozen", FROZEN, source_instances=source, frames=tuple(range(first + 1, last + 2))))
    if measures.best:
        found.append(Finding(f"{name}-best-frame", BEST_IN_SET, source_instances=source, frames=(measures.best[0] + 1,)))
    return found


def _measurements(cine: Cine, measures: Measures) -> tuple[Measurement, ...]:
    region = main_region(cine.regions)
    spacing = region[5] if region is not None else None
    numbers: list[tuple[Code, float | None, Code]] = [
        (STILL_PERCENT, 100 * measures.still_share, PERCENT),
        (BRIGHTNESS_PERCENT, None if measures.dark is None else 100 * measures.dark, PERCENT),
        (SATURATED_PERCENT, None if measures.bright is None else 100 * measures.bright, PERCENT),
        (SHARPNESS, measures.sharp, NO_UNITS),
        (MOTION, float(np.median(measures.motion[1:])) if len(measures.motion) > 1 else None, NO_UNITS),
    ]
    if spacing is not None:
        numbers.append((SPACING, spacing, MILLIMETRE))
    return tuple(
        Measurement(concept, value, unit, MEASUREMENT_FAILURE if value is None else None) for concept, value, unit in numbers
    )


def _about_object(cine: Cine) -> tuple[Evaluation, ...]:
    """What the object says of itself: millimetres, and writing outside its regions (unknown where it names none)."""
    region: Region | None = main_region(cine.regions)
    calibrated = PRESENT if region is not None and region[4] is not None and region[5] is not None else ABSENT
    writing = INDETERMINATE
    if cine.regions:
        writing = PRESENT if writing_outside(cine.array, cine.regions) > WRITING_SHARE else ABSENT
    return (Evaluation(CALIBRATED, calibrated), Evaluation(WRITING, writing))


def _summary(faults: Sequence[Sequence[str]]) -> str:
    bad = [one for one in faults if one]
    count = f"{len(faults)} cine{'s' if len(faults) != 1 else ''}"
    if not bad:
        return f"{count}: no fault of quality found"
    named = sorted({fault for one in bad for fault in one})
    return f"{count}: {len(bad)} of poor quality ({', '.join(named)})"


def _values(measured: Sequence[tuple[Cine, Measures]], faults: Sequence[Sequence[str]]) -> dict[str, Any]:
    every = [fault for one in faults for fault in one]
    values: dict[str, Any] = {"cines": len(measured), "poor_cines": sum(1 for one in faults if one)}
    values |= {name.replace("-", "_"): every.count(text) for name, text in NAMES.items()}
    if measured and measured[0][1].best:
        values["best_frame"] = measured[0][1].best[0] + 1
    return values


def _warnings(cines: Sequence[Cine]) -> tuple[str, ...]:
    bare = sum(1 for cine in cines if not cine.regions)
    return (f"{bare} cine(s) name no ultrasound region: the whole picture was measured, writing included",) if bare else ()
