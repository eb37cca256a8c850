"""A real echocardiogram, as it is and spoilt."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from caregrid.domain.codes import ABSENT, INDETERMINATE, PRESENT, Code
from caregrid.domain.findings import Findings
from caregrid.domain.images import AlgorithmInput, Cine, SeriesInput
from caregrid.runtime.inputs import prepare
from tests.unit.algorithms import packages

us = packages.code("ultrasound_cine_quality", "ultrasound_cine_quality")

FRAMES = 40


@cache
def echo() -> Cine:
    """The first frames of pydicom-data's cine (480 x 640, colour)."""
    files = packages.by_series([packages.pydicom_file("color3d_jpeg_baseline.dcm")])
    (series,) = prepare(packages.entry("ultrasound_cine_quality")[0].inputs, files, {}, packages.SLOT).series["cine"]
    (cine,) = series.cines
    return Cine(cine.array[:FRAMES], cine.sop_instance_uid, cine.frame_seconds, cine.regions)


def answer(array: NDArray[np.uint8], regions: tuple[us.Region, ...] | None = None) -> Findings:
    cine = Cine(array, "1.2.3", 0.03, echo().regions if regions is None else regions)
    return us.run(AlgorithmInput({"cine": (SeriesInput("cine", "cine", "US", "1.2", {}, (), cines=(cine,)),)}))


def said(findings: Findings, about: Code) -> Code:
    return next(one.value for one in findings.findings[0].evaluations if one.concept == about)


def test_a_good_cine_has_no_fault_and_a_best_frame() -> None:
    findings = answer(echo().array)
    assert [said(findings, fault) for fault in (us.FROZEN, us.TOO_DARK, us.TOO_BRIGHT, us.UNSHARP)] == [ABSENT] * 4
    assert said(findings, us.IMAGE_QUALITY) == us.GOOD
    best = findings.findings[-1]
    assert best.tracking_id == "cine-1-best-frame"
    assert 1 <= best.frames[0] <= FRAMES


def test_a_freeze_is_found_with_its_frames() -> None:
    array = echo().array.copy()
    array[10:30] = array[10]
    findings = answer(array)
    assert said(findings, us.FROZEN) == PRESENT
    assert {one.tracking_id: one for one in findings.findings}["cine-1-frozen"].frames == tuple(range(11, 31))
    assert said(findings, us.IMAGE_QUALITY) == us.POOR


@pytest.mark.parametrize("fault", ["dark", "bright", "blurred"])
def test_a_spoilt_cine_is_called_by_its_fault(fault: str) -> None:
    array = echo().array.astype(np.float32)
    if fault == "blurred":
        array = np.stack([ndimage.gaussian_filter(frame, (4, 4, 0)) for frame in array])
    else:
        array *= {"dark": 0.3, "bright": 8}[fault]
    findings = answer(np.clip(array, 0, 255).astype(np.uint8))
    wanted = {"dark": us.TOO_DARK, "bright": us.TOO_BRIGHT, "blurred": us.UNSHARP}[fault]
    assert said(findings, wanted) == PRESENT


def test_best_frame_is_not_a_blurred_one() -> None:
    array = echo().array.copy()
    for frame in range(FRAMES - 1):
        array[frame] = ndimage.gaussian_filter(array[frame], (4, 4, 0))
    assert answer(array).values["best_frame"] == FRAMES


def test_calibration_and_writing_are_told_from_the_regions() -> None:
    (region,) = echo().regions
    with_text = answer(echo().array)
    assert said(with_text, us.CALIBRATED) == PRESENT
    # The machine writes its settings beside the sector.
    assert said(with_text, us.WRITING) == PRESENT
    clean = echo().array.copy()
    x0, y0, x1, y1 = region[:4]
    outside = np.ones(clean.shape[1:3], bool)
    outside[y0 : y1 + 1, x0 : x1 + 1] = False
    clean[:, outside] = 0
    assert said(answer(clean), us.WRITING) == ABSENT
    bare = answer(echo().array, ())
    assert said(bare, us.CALIBRATED) == ABSENT
    assert said(bare, us.WRITING) == INDETERMINATE
    assert bare.warnings


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 5, 900), (2, 64, 64, 3), (1, 64, 64)])
def test_a_cine_of_one_value_is_answered(level: int, shape: tuple[int, ...]) -> None:
    findings = answer(np.full(shape, level, np.uint8), ())
    assert said(findings, us.IMAGE_QUALITY) == us.POOR
    if level == 0:
        assert said(findings, us.UNSHARP) == INDETERMINATE
        assert all(one.value is not None or one.qualifier is not None for one in findings.findings[0].measurements)


def test_regions_that_lie_outside_the_picture_do_no_harm() -> None:
    findings = answer(echo().array[:4], ((5000, 5000, 6000, 6000, 0.1, 0.1), (10, 10, 5, 5, None, None)))
    assert said(findings, us.TOO_DARK) in (PRESENT, ABSENT)
