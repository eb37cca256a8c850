"""Volume and density of the lungs on a CT volume, with the two lungs as segments."""

from __future__ import annotations

from typing import Any

import numpy as np
from ct_lung_picture import overlay
from ct_lung_segmentation import Lungs, Mask, find_lungs
from numpy.typing import NDArray

from caregrid.domain.codes import ABSENT, HOUNSFIELD, MILLILITRE, PERCENT, PRESENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture, Segment
from caregrid.domain.images import AlgorithmInput, SeriesInput, Volume

LUNG = Code("39607008", "SCT", "Lung")
LEFT, RIGHT = Code("7771000", "SCT", "Left"), Code("24028007", "SCT", "Right")
BOTH = Code("51440002", "SCT", "Right and left")
LEFT_LUNG, RIGHT_LUNG = Code("44029006", "SCT", "Left lung"), Code("3341006", "SCT", "Right lung")
ANATOMICAL_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
PRESENCE = Code("705057003", "SCT", "Presence")
INCOMPLETE = Code("130576", "DCM", "Anatomy coverage incomplete")
VOLUME = Code("118565006", "SCT", "Volume")
DENSITY = Code("112181", "DCM", "Mean Attenuation Coefficient")
LOW_ATTENUATION = Code("low-attenuation-area-950", "99CAREGRID", "Low attenuation area below -950 HU")
INDETERMINATE_VALUE = Code("114011", "DCM", "Value indeterminate")

LOW_ATTENUATION_HU = -950
#: Above this slice spacing thin walls are averaged with air, and the share of low attenuation means little.
THIN_MM = 1.5


def run(input: AlgorithmInput) -> Findings:
    """Measure both lungs; a CT without lungs is answered with "absent", not with an error."""
    series = input.one("ct")
    volume = series.volume
    if volume is None:
        raise ValueError("input ct was not prepared as a volume")
    upright, back = _upright(volume)
    lungs = find_lungs(upright, _upright_spacing(volume))
    if not (lungs.left.any() or lungs.right.any()):
        return _no_lungs(volume)
    return _findings(series, volume, upright, lungs, back)


def _upright(volume: Volume) -> tuple[NDArray[Any], Any]:
    """The volume as a view (z, y, x) towards head, back and left; and the way back for masks made on it."""
    order, flips = _axes(volume)
    view = np.transpose(volume.array, order)[flips]

    def back(mask: Mask) -> Mask:
        return np.ascontiguousarray(np.transpose(mask[flips], np.argsort(order)))

    return view, back


def _axes(volume: Volume) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """Which array axis runs mostly along z, y and x, and which of them must be turned round."""
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    order: list[int] = []
    for world in (2, 1, 0):
        left_over = [axis for axis in range(3) if axis not in order]
        order.append(max(left_over, key=lambda axis: abs(directions[world, axis])))
    turned = (directions[world, axis] < 0 for world, axis in zip((2, 1, 0), order, strict=True))
    return tuple(order), tuple(slice(None, None, -1) if turn else slice(None) for turn in turned)


def _upright_spacing(volume: Volume) -> tuple[float, float, float]:
    order, _flips = _axes(volume)
    z, y, x = (volume.spacing[axis] for axis in order)
    return (z, y, x)


def _findings(series: SeriesInput, volume: Volume, hu: NDArray[Any], lungs: Lungs, back: Any) -> Findings:
    both = lungs.left | lungs.right
    qualifier = INDETERMINATE_VALUE if lungs.partial else None
    sides = (("lung-left", lungs.left, LEFT, "Left lung"), ("lung-right", lungs.right, RIGHT, "Right lung"))
    found = [(name, mask, side, label) for name, mask, side, label in sides if mask.any()]
    findings = [_lung(name, mask, side, label, volume, hu, qualifier) for name, mask, side, label in found]
    if len(found) == 2:
        findings.insert(0, _lung("lungs", both, BOTH, None, volume, hu, qualifier))
    types = {"lung-left": LEFT_LUNG, "lung-right": RIGHT_LUNG}
    segments = tuple(
        Segment(label, ANATOMICAL_STRUCTURE, types[name], back(mask), volume.series_instance_uid)
        for name, mask, _side, label in found
    )
    picture = Picture("Lungs", overlay(hu, lungs.left, lungs.right, _upright_spacing(volume)), _some_instances(volume))
    values = _values(lungs, both, hu, volume)
    return Findings(
        summary=_summary(values),
        findings=tuple(findings),
        segments=segments,
        pictures=(picture,),
        used_instances=_instances(volume),
        values=values,
        warnings=_warnings(series, volume, lungs),
    )


def _lung(
    name: str, mask: Mask, side: Code, label: str | None, volume: Volume, hu: NDArray[Any], qualifier: Code | None
) -> Finding:
    ml, density, low = _measure(mask, hu, volume)
    return Finding(
        tracking_id=name,
        concept=LUNG,
        site=LUNG,
        laterality=side,
        segment=label,
        measurements=(
            Measurement(VOLUME, ml, MILLILITRE, qualifier),
            Measurement(DENSITY, density, HOUNSFIELD, qualifier),
            Measurement(LOW_ATTENUATION, low, PERCENT, qualifier),
        ),
        evaluations=(Evaluation(PRESENCE, PRESENT), Evaluation(INCOMPLETE, PRESENT if qualifier else ABSENT)),
        source_instances=_instances(volume),
    )


def _measure(mask: Mask, hu: NDArray[Any], volume: Volume) -> tuple[float, float, float]:
    """Millilitres, mean HU, percent below -950 HU."""
    inside = hu[mask]
    return (
        inside.size * volume.voxel_ml,
        float(inside.mean(dtype=np.float64)),
        100.0 * float(np.count_nonzero(inside < LOW_ATTENUATION_HU)) / inside.size,
    )


def _values(lungs: Lungs, both: Mask, hu: NDArray[Any], volume: Volume) -> dict[str, Any]:
    ml, density, low = _measure(both, hu, volume)
    return {
        "lung_found": True,
        "lung_volume_ml": round(ml, 1),
        "left_lung_volume_ml": round(float(np.count_nonzero(lungs.left) * volume.voxel_ml), 1),
        "right_lung_volume_ml": round(float(np.count_nonzero(lungs.right) * volume.voxel_ml), 1),
        "lung_density_hu": round(density, 1),
        "low_attenuation_percent": round(low, 2),
        "coverage": "partial" if lungs.partial else "complete",
        "sides_parted_by": lungs.split,
    }


def _summary(values: dict[str, Any]) -> str:
    what = "Lung volume in the scanned part only" if values["coverage"] == "partial" else "Lung volume"
    return (
        f"{what} {values['lung_volume_ml']:.0f} ml (left {values['left_lung_volume_ml']:.0f}, "
        f"right {values['right_lung_volume_ml']:.0f}), mean {values['lung_density_hu']:.0f} HU, "
        f"{values['low_attenuation_percent']:.1f} % below -950 HU"
    )


def _warnings(series: SeriesInput, volume: Volume, lungs: Lungs) -> tuple[str, ...]:
    found = []
    if lungs.partial:
        found.append("Lung reaches the first or last slice: the volume is that of the scanned part, not of the whole lungs")
    if not (lungs.left.any() and lungs.right.any()):
        found.append("Only one lung was found")
    if lungs.split == "cut at the middle":
        found.append("The lungs could not be told apart by shape and were cut at the middle")
    if max(volume.spacing) > THIN_MM:
        found.append("Slices are thicker than 1.5 mm: the share below -950 HU is not comparable with thin-slice figures")
    if series.attributes.get("ContrastBolusAgent"):
        found.append("Contrast medium was given: density is higher than without")
    return tuple(found)


def _no_lungs(volume: Volume) -> Findings:
    finding = Finding(
        tracking_id="lungs",
        concept=LUNG,
        site=LUNG,
        evaluations=(Evaluation(PRESENCE, ABSENT),),
        source_instances=_instances(volume),
    )
    values = {"lung_found": False, "lung_volume_ml": 0.0, "coverage": "none"}
    return Findings("No lung found on this CT", (finding,), used_instances=_instances(volume), values=values)


def _instances(volume: Volume) -> tuple[str, ...]:
    return tuple(dict.fromkeys(volume.sop_instance_uids))


def _some_instances(volume: Volume) -> tuple[str, ...]:
    """A picture made of all slices names the first, middle and last: enough to find its way back."""
    every = _instances(volume)
    return tuple(dict.fromkeys((every[0], every[len(every) // 2], every[-1])))
