"""Lungs of a made-up chest whose volumes are known, and of a real one whose masks others made."""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from caregrid.domain.codes import ABSENT, PRESENT
from caregrid.domain.findings import Findings
from caregrid.domain.images import AlgorithmInput, SeriesInput, Volume
from caregrid.runtime.volumes import read_volume
from tests.support.data import shared
from tests.unit.algorithms import packages

ct = packages.code("ct_lung_volume", "ct_lung_volume")

SPACING = (3.0, 2.0, 2.0)
Ball = tuple[tuple[float, float, float], tuple[float, float, float]]
#: Centres and half axes in mm, (z, y, x) about the middle; x towards the patient's left.
LEFT: Ball = ((0, 0, 75), (85, 60, 45))
RIGHT: Ball = ((0, 0, -75), (85, 65, 50))


def ball(shape: tuple[int, ...], spacing: tuple[float, float, float], where: Ball) -> NDArray[np.bool_]:
    centre, half = where
    axes = [(np.arange(size) - (size - 1) / 2) * step for size, step in zip(shape, spacing, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    parts = [((axis - middle) / length) ** 2 for axis, middle, length in zip((z, y, x), centre, half, strict=True)]
    return np.asarray(sum(parts) <= 1)


def ml(where: Ball) -> float:
    return 4 / 3 * np.pi * float(np.prod(where[1])) / 1000


def chest(lungs: tuple[Ball, ...] = (LEFT, RIGHT), shape: tuple[int, int, int] = (70, 160, 200)) -> NDArray[np.int16]:
    """A cylinder of tissue on a table, with lungs of -850 HU and a vessel in each."""
    hu = np.full(shape, -1000, np.int16)
    hu[:, ball(shape, SPACING, ((0, 0, 0), (1e6, 120, 170)))[0]] = 40
    hu[:, -8:-5] = 100
    for lung in lungs:
        hu[ball(shape, SPACING, lung)] = -850
        hu[ball(shape, SPACING, (lung[0], (60, 3, 3)))] = 40
    return hu


def answer(hu: NDArray[Any], affine: NDArray[np.float64] | None = None, **attributes: Any) -> Findings:
    if affine is None:
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = *SPACING, 1
    uids = tuple(f"1.2.{number}" for number in range(len(hu)))
    volume = Volume(hu, affine, uids, (1,) * len(hu), "1.2", "1.3")
    return ct.run(AlgorithmInput({"ct": (SeriesInput("ct", "volume", "CT", "1.2", attributes, (), volume=volume),)}))


def test_volumes_of_a_known_chest_are_right() -> None:
    values = answer(chest()).values
    assert values["left_lung_volume_ml"] == pytest.approx(ml(LEFT), rel=0.02)
    assert values["right_lung_volume_ml"] == pytest.approx(ml(RIGHT), rel=0.02)
    assert values["coverage"] == "complete"
    # The vessel is part of the lung and of its density.
    assert -850 < values["lung_density_hu"] < -830


def test_volume_follows_the_size_of_a_voxel() -> None:
    hu = chest()
    affine = np.diag([0.0, 0, 0, 1])
    affine[2, 0], affine[1, 1], affine[0, 2] = (size * 1.1 for size in SPACING)
    assert answer(hu, affine).values["lung_volume_ml"] == pytest.approx(1.1**3 * answer(hu).values["lung_volume_ml"], rel=0.02)


def test_left_and_right_follow_the_patient_not_the_array() -> None:
    hu = chest()
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = SPACING[0], SPACING[1], -SPACING[2], 1
    straight, turned = answer(hu), answer(hu, affine)
    assert turned.values["left_lung_volume_ml"] == pytest.approx(straight.values["right_lung_volume_ml"], rel=0.01)
    mask = {segment.label: segment.mask for segment in turned.segments}["Left lung"]
    assert np.argwhere(mask)[:, 2].mean() < hu.shape[2] / 2


def test_a_coronal_volume_gives_the_same_and_masks_of_its_own_shape() -> None:
    hu = chest()
    affine = np.zeros((4, 4))
    affine[1, 0], affine[2, 1], affine[0, 2], affine[3, 3] = SPACING[1], SPACING[0], SPACING[2], 1
    coronal = answer(np.ascontiguousarray(hu.transpose(1, 0, 2)), affine)
    assert coronal.values["lung_volume_ml"] == answer(hu).values["lung_volume_ml"]
    assert {segment.mask.shape for segment in coronal.segments} == {(160, 70, 200)}


def test_part_of_the_lungs_is_called_a_part() -> None:
    findings = answer(chest()[20:50])
    assert findings.values["coverage"] == "partial"
    assert any("first or last slice" in warning for warning in findings.warnings)
    lungs = findings.findings[0]
    assert {one.qualifier for one in lungs.measurements} == {ct.INDETERMINATE_VALUE}
    assert {one.value for one in lungs.evaluations if one.concept == ct.INCOMPLETE} == {PRESENT}


def test_lungs_that_touch_are_parted() -> None:
    hu = chest()
    hu[30:40, 78:82, 80:120] = -850
    findings = answer(hu)
    assert findings.values["sides_parted_by"] == "eroded apart"
    assert findings.values["left_lung_volume_ml"] == pytest.approx(ml(LEFT), rel=0.03)
    assert findings.values["right_lung_volume_ml"] == pytest.approx(ml(RIGHT), rel=0.03)


def test_one_lung_is_one_lung() -> None:
    findings = answer(chest((LEFT,)))
    assert [segment.label for segment in findings.segments] == ["Left lung"]
    assert findings.values["right_lung_volume_ml"] == 0
    assert "Only one lung was found" in findings.warnings


def test_windpipe_is_not_lung() -> None:
    hu = chest()
    hu[ball(hu.shape, SPACING, ((70, 0, 0), (60, 9, 9)))] = -1000
    assert answer(hu).values["lung_volume_ml"] == pytest.approx(ml(LEFT) + ml(RIGHT), rel=0.02)


def test_gas_and_small_air_spaces_are_not_lung() -> None:
    hu = chest(())
    hu[ball(hu.shape, SPACING, ((0, 0, 0), (60, 60, 60)))] = -1000
    hu[ball(hu.shape, SPACING, ((0, 0, 120), (20, 20, 20)))] = -850
    findings = answer(hu)
    assert findings.values == {"lung_found": False, "lung_volume_ml": 0.0, "coverage": "none"}
    assert findings.segments == ()
    assert {one.value for one in findings.findings[0].evaluations} == {ABSENT}


@pytest.mark.parametrize("level", [-3000, -1000, 0, 3000])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 512, 512), (5, 3, 700)])
def test_a_volume_of_one_value_has_no_lung(level: int, shape: tuple[int, int, int]) -> None:
    assert answer(np.full(shape, level, np.int16)).values["lung_found"] is False


def test_a_thin_slab_through_the_lungs_is_measured() -> None:
    findings = answer(chest()[34:36])
    assert findings.values["lung_found"]
    assert findings.values["coverage"] == "partial"


def test_low_attenuation_is_the_share_below_950() -> None:
    hu = chest((LEFT,))
    holes = ball(hu.shape, SPACING, (LEFT[0], (30, 30, 30)))
    hu[holes] = -980
    share = 100 * holes.sum() / (ml(LEFT) * 1000 / np.prod(SPACING))
    assert answer(hu).values["low_attenuation_percent"] == pytest.approx(share, rel=0.05)


def test_contrast_medium_and_thick_slices_are_warned_of() -> None:
    warnings = " ".join(answer(chest(), ContrastBolusAgent="yes").warnings)
    assert "Contrast medium" in warnings
    assert "thicker than 1.5 mm" in warnings


def test_a_real_chest_agrees_with_masks_made_by_others() -> None:
    """The lobes of TotalSegmentator, merged; the first slice stands alone before a gap and is left out."""
    folder = shared("ct-chest")
    volume = read_volume(sorted(folder.glob("*.dcm"))[1:])
    series = SeriesInput("ct", "volume", "CT", volume.series_instance_uid, {}, (), volume=volume)
    found = {segment.label: segment.mask for segment in ct.run(AlgorithmInput({"ct": (series,)})).segments}
    for side in ("left", "right"):
        lobes = [np.asanyarray(nibabel.load(path).dataobj) > 0 for path in folder.glob(f"masks/lung_*_{side}.nii.gz")]
        truth = np.transpose(np.any(lobes, axis=0), (2, 1, 0))[1:, ::-1]
        mine = found[f"{side.capitalize()} lung"]
        assert 2 * (mine & truth).sum() / (mine.sum() + truth.sum()) > 0.98
