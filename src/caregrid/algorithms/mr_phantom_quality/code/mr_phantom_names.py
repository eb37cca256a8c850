"""hazen's measurements and the codes they get, and the limits they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caregrid.domain.codes import MILLIMETRE, NO_UNITS, PERCENT, Code

IMAGE_QUALITY = Code("111101", "DCM", "Image Quality")
WITHIN_LIMITS = Code("within-limits", "99CAREGRID", "Within the site's limits")
PHANTOM_RECOGNISED = Code("phantom-recognised", "99CAREGRID", "ACR large phantom recognised")
MEASUREMENT_FAILURE = Code("114006", "DCM", "Measurement failure")


@dataclass(frozen=True)
class Wanted:
    """One number out of a task: the measurement whose subtype (or description) begins so, and the code it gets."""

    subtype: str
    concept: Code
    unit: Code
    description: str = ""
    kind: str = "measured"


def _own(value: str, meaning: str) -> Code:
    return Code(value, "99CAREGRID", meaning)


#: Task → the options its command line passes when none is given.
TASKS: dict[str, dict[str, Any]] = {
    "acr_snr": {"subtract": None, "measured_slice_width": None},
    "acr_uniformity": {"verbose": False},
    "acr_ghosting": {"verbose": False},
    "acr_slice_position": {"verbose": False},
    "acr_slice_thickness": {"verbose": False},
    "acr_geometric_accuracy": {"verbose": False},
    "acr_spatial_resolution": {"verbose": False},
    "acr_low_contrast_object_detectability": {"verbose": False},
}

_DISTANCES = {
    "Slice 1 Horizontal distance": _own("slice-1-horizontal", "Slice 1 horizontal diameter"),
    "Slice 1 Vertical distance": _own("slice-1-vertical", "Slice 1 vertical diameter"),
    "Slice 5 Horizontal distance": _own("slice-5-horizontal", "Slice 5 horizontal diameter"),
    "Slice 5 Vertical distance": _own("slice-5-vertical", "Slice 5 vertical diameter"),
    "Slice 5 Diagonal SW distance": _own("slice-5-diagonal-sw", "Slice 5 south-west diagonal diameter"),
    "Slice 5 Diagonal SE distance": _own("slice-5-diagonal-se", "Slice 5 south-east diagonal diameter"),
}

WANTED: dict[str, tuple[Wanted, ...]] = {
    "acr_snr": (
        Wanted("smoothing", Code("111787", "DCM", "Signal to Noise Ratio"), NO_UNITS),
        Wanted("smoothing", _own("snr-normalised", "Signal to noise ratio, normalised"), NO_UNITS, kind="normalised"),
    ),
    "acr_uniformity": (Wanted("Integral uniformity", _own("integral-uniformity", "Percent integral uniformity"), PERCENT),),
    "acr_ghosting": (Wanted("signal ghosting", _own("signal-ghosting", "Percent signal ghosting"), PERCENT),),
    "acr_slice_position": (
        Wanted("length difference", _own("slice-1-position", "Slice 1 bar length difference"), MILLIMETRE, "Slice 1 "),
        Wanted("length difference", _own("slice-11-position", "Slice 11 bar length difference"), MILLIMETRE, "Slice 11 "),
    ),
    "acr_slice_thickness": (Wanted("slice width", Code("112225", "DCM", "Slice Thickness"), MILLIMETRE),),
    "acr_geometric_accuracy": tuple(Wanted(subtype, concept, MILLIMETRE) for subtype, concept in _DISTANCES.items()),
    "acr_spatial_resolution": (Wanted("Best", _own("spatial-resolution", "Smallest resolved hole spacing"), MILLIMETRE),),
    "acr_low_contrast_object_detectability": (
        Wanted("total", _own("low-contrast-spokes", "Low contrast spokes seen"), NO_UNITS),
    ),
}


def pick(answer: Sequence[Mapping[str, Any]], wanted: Wanted) -> float | None:
    """The number ``wanted`` among a task's measurements; None when it is not there or not a finite number."""
    for one in answer:
        fits = one["subtype"] == wanted.subtype and one["type"] == wanted.kind
        if fits and str(one["description"]).startswith(wanted.description):
            value = one["value"]
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
                return None
            return float(value)
    return None


#: Tasks held against limits.
JUDGED = (
    "acr_uniformity",
    "acr_ghosting",
    "acr_slice_position",
    "acr_slice_thickness",
    "acr_geometric_accuracy",
    "acr_spatial_resolution",
)


def within_limits(task: str, values: Sequence[float | None], limits: Mapping[str, Any], tesla: float) -> bool | None:
    """Whether all ``values`` of ``task`` keep ``limits``; None when the task has no limit or a value is missing."""
    if task not in JUDGED or any(value is None for value in values):
        return None
    numbers = [value for value in values if value is not None]
    if task == "acr_uniformity":
        return numbers[0] >= limits["uniformity_percent_3t" if tesla > 2.5 else "uniformity_percent"]
    if task == "acr_ghosting":
        return numbers[0] <= limits["ghosting_percent"]
    if task == "acr_slice_position":
        return all(abs(number) <= limits["slice_position_mm"] for number in numbers)
    if task == "acr_slice_thickness":
        return round(abs(numbers[0] - 5.0), 6) <= limits["slice_thickness_error_mm"]
    if task == "acr_geometric_accuracy":
        return all(round(abs(number - 190.0), 6) <= limits["diameter_error_mm"] for number in numbers)
    return numbers[0] <= limits["resolution_mm"]


def value_name(concept: Code) -> str:
    """The name under which workflow conditions find a measurement."""
    return {"111787": "snr", "112225": "slice_thickness_mm"}.get(concept.value, concept.value.replace("-", "_"))
