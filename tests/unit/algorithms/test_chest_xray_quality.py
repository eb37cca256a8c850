"""A real chest X-ray, upright and handled wrongly."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from caregrid.domain.codes import ABSENT, INDETERMINATE, PRESENT, Code
from caregrid.domain.findings import Findings
from caregrid.domain.images import AlgorithmInput, Image, SeriesInput
from caregrid.runtime.inputs import prepare
from tests.unit.algorithms import packages

model = packages.code("chest_xray_quality", "model")


@cache
def loaded() -> Any:
    return packages.entry("chest_xray_quality")


@cache
def chest() -> SeriesInput:
    """pydicom-data's chest X-ray (1955 x 1841, MONOCHROME1)."""
    files = packages.by_series([packages.pydicom_file("RG1_UNCR.dcm")])
    (series,) = prepare(loaded()[0].inputs, files, {}, packages.SLOT).series["image"]
    return series


def answer(array: NDArray[Any], **attributes: Any) -> Findings:
    manifest, run = loaded()
    known = {**chest().attributes, **attributes}
    series = SeriesInput("image", "images", "CR", "1.2", known, (), images=(Image(array, "1.2.3"),))
    return run(AlgorithmInput({"image": (series,)}, manifest.parameters, packages.SLOT))  # type: ignore[no-any-return]


def said(findings: Findings, about: Code) -> str:
    """The answer by its meaning: the model's module is loaded once here and once by the runner, so compare values."""
    return next(one.value.meaning for one in findings.findings[0].evaluations if one.concept.value == about.value)


def angle(findings: Findings) -> float | None:
    return next(one.value for one in findings.findings[0].measurements if one.concept.value == "turn-angle")


def picture() -> NDArray[Any]:
    return chest().images[0].array


def test_an_upright_chest_has_no_fault() -> None:
    findings = answer(picture())
    assert [said(findings, one) for one in (model.TURNED, model.NEGATIVE)] == [ABSENT.meaning] * 2
    # Mirror images are the network's weak side (see the card): it need not be certain, but it must not cry wolf here.
    assert said(findings, model.MIRRORED) != PRESENT.meaning
    assert findings.values["poor_images"] == 0
    assert angle(findings) == 0
    assert findings.findings[0].confidence is not None


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_chest_is_found_with_its_angle(turns: int) -> None:
    findings = answer(np.rot90(picture(), turns))
    assert said(findings, model.TURNED) == PRESENT.meaning
    assert angle(findings) == 90 * turns
    assert findings.values["turned"] == 1


def test_a_mirrored_chest_is_not_called_right() -> None:
    assert said(answer(picture()[:, ::-1]), model.MIRRORED) != ABSENT.meaning


def test_the_wrong_photometric_interpretation_shows_as_a_negative() -> None:
    findings = answer(picture(), PhotometricInterpretation="MONOCHROME2")
    assert said(findings, model.NEGATIVE) == PRESENT.meaning
    assert said(findings, model.IMAGE_QUALITY) == "Poor image quality"


def test_clipped_and_flat_pictures_are_found() -> None:
    values = picture().astype(np.float32)
    low, high = np.percentile(values, (1, 99))
    clipped = np.clip(values, low, low + 0.5 * (high - low))
    assert said(answer(clipped), model.CLIPPED) == PRESENT.meaning
    flat = values.mean() + 0.1 * (values - values.mean())
    flat[0, 0], flat[0, 1] = values.min(), values.max()
    assert said(answer(flat), model.FLAT) == PRESENT.meaning


def test_a_lateral_view_is_not_judged_by_its_orientation() -> None:
    findings = answer(picture(), ViewPosition="LL")
    assert said(findings, model.TURNED) == INDETERMINATE.meaning
    assert angle(findings) is None


def test_a_part_that_is_not_a_chest_is_warned_of() -> None:
    assert answer(picture(), BodyPartExamined="HAND").warnings
    assert not answer(picture()).warnings


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (64, 64), (64, 64, 3)])
@pytest.mark.parametrize("level", [0, 4095])
def test_a_picture_of_one_value_is_answered(shape: tuple[int, ...], level: int) -> None:
    findings = answer(np.full(shape, level, np.uint16))
    assert said(findings, model.FLAT) == PRESENT.meaning
    assert findings.pictures[0].array.dtype == np.uint8


def test_the_network_is_small_and_takes_any_number_of_pictures() -> None:
    assert (packages.package("chest_xray_quality") / "model.onnx").stat().st_size < 1_000_000
    manifest, run = loaded()
    images = tuple(Image(np.rot90(picture(), turns), f"1.2.{turns}") for turns in range(3))
    series = SeriesInput("image", "images", "CR", "1.2", chest().attributes, (), images=images)
    findings = run(AlgorithmInput({"image": (series,)}, manifest.parameters, packages.SLOT))
    assert [one.tracking_id for one in findings.findings] == ["image-1", "image-2", "image-3"]
    assert findings.values["turned"] == 2
