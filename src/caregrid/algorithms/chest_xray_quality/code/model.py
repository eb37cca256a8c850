"""Before and after the orientation network: pictures in, coded answers about the quality of each out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from chest_xray_measures import Exposure, exposure, grey, shrunk
from chest_xray_picture import as_received_and_upright
from chest_xray_thresholds import CLIPPED_BRIGHT_SHARE, CLIPPED_DARK_SHARE, FLAT_CONTRAST
from numpy.typing import NDArray

from caregrid.domain.codes import ABSENT, INDETERMINATE, PERCENT, PRESENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture
from caregrid.domain.images import AlgorithmInput, Image, SeriesInput

IMAGE_QUALITY = Code("111101", "DCM", "Image Quality")
GOOD, POOR = Code("122741", "DCM", "Good image quality"), Code("122742", "DCM", "Poor image quality")
DEGREE = Code("deg", "UCUM", "degree")
VALUE_INDETERMINATE = Code("114011", "DCM", "Value indeterminate")


def _own(value: str, meaning: str) -> Code:
    return Code(value, "99CAREGRID", meaning)


TURNED = _own("turned", "Turned")
MIRRORED = _own("mirrored", "Left and right exchanged")
NEGATIVE = _own("negative", "Shown as negative")
CLIPPED = _own("clipped", "Grey values clipped")
FLAT = _own("flat", "Contrast low")
TURN_ANGLE = _own("turn-angle", "Counter-clockwise turn from upright")
CONTRAST = _own("contrast", "Contrast of the middle half of grey values")
CLIPPED_PERCENT = _own("clipped-percent", "Share of clipped pixels")

NAMES = {TURNED: "turned", MIRRORED: "mirrored", NEGATIVE: "negative", CLIPPED: "clipped", FLAT: "flat"}
LATERAL_VIEWS = ("LL", "RL", "LATERAL", "LLO", "RLO")
PICTURES = 4


def preprocess(input: AlgorithmInput) -> dict[str, NDArray[np.float32]]:
    """``picture``: (images, 1, 64, 64), bone bright, grey values from 0 to 1."""
    return {"picture": np.stack([shrunk(_grey(series, image)) for series, image in _images(input)])[:, None]}


def postprocess(outputs: Mapping[str, NDArray[np.float32]], input: AlgorithmInput) -> Findings:
    """One finding an image. outputs: ``turn`` (images, 8) and ``negative`` (images, 1), probabilities."""
    findings, pictures = [], []
    certain = float(input.parameters.get("certain", 0.8))
    for number, (series, image) in enumerate(_images(input), 1):
        turn, negative = outputs["turn"][number - 1], float(outputs["negative"][number - 1, 0])
        picture = _grey(series, image)
        finding = _finding(number, series, image, _answers(turn, negative, certain, series), turn, exposure(picture))
        findings.append(finding)
        if number <= PICTURES:
            shown = as_received_and_upright(picture, _suggested(finding, turn), _answer(finding, NEGATIVE) == PRESENT)
            pictures.append(Picture(f"Image {number}: as received, and upright", shown, (image.sop_instance_uid,)))
    return Findings(
        summary=_summary(findings),
        findings=tuple(findings),
        pictures=tuple(pictures),
        used_instances=tuple(dict.fromkeys(image.sop_instance_uid for _series, image in _images(input))),
        values=_values(findings),
        warnings=_warnings(input),
    )


def _images(input: AlgorithmInput) -> Iterator[tuple[SeriesInput, Image]]:
    for series in input.series["image"]:
        for image in series.images:
            yield series, image


def _grey(series: SeriesInput, image: Image) -> NDArray[np.float32]:
    return grey(image.array, series.attributes.get("PhotometricInterpretation") == "MONOCHROME1")


def _answers(turn: NDArray[np.float32], negative: float, certain: float, series: SeriesInput) -> dict[Code, Code]:
    """Turned, mirrored, negative: present or absent when the network is certain; a lateral view it was never shown."""
    if str(series.attributes.get("ViewPosition") or "").upper() in LATERAL_VIEWS:
        return dict.fromkeys((TURNED, MIRRORED, NEGATIVE), INDETERMINATE)
    shares = {TURNED: 1 - float(turn[0] + turn[4]), MIRRORED: float(turn[4:].sum()), NEGATIVE: negative}
    return {fault: _sure(share, certain) for fault, share in shares.items()}


def _sure(share: float, certain: float) -> Code:
    if share >= certain:
        return PRESENT
    return ABSENT if share <= 1 - certain else INDETERMINATE


def _finding(
    number: int,
    series: SeriesInput,
    image: Image,
    answers: dict[Code, Code],
    turn: NDArray[np.float32],
    exposed: Exposure,
) -> Finding:
    clipped = exposed.dark > CLIPPED_DARK_SHARE or exposed.bright > CLIPPED_BRIGHT_SHARE
    answers = answers | {
        CLIPPED: PRESENT if clipped else ABSENT,
        FLAT: PRESENT if exposed.contrast < FLAT_CONTRAST else ABSENT,
    }
    quality = POOR if PRESENT in answers.values() else GOOD
    known = answers[TURNED] != INDETERMINATE
    angle = 90.0 * int(np.argmax(turn[:4] + turn[4:])) if known else None
    return Finding(
        tracking_id=f"image-{number}",
        concept=IMAGE_QUALITY,
        measurements=(
            Measurement(TURN_ANGLE, angle, DEGREE, None if known else VALUE_INDETERMINATE),
            Measurement(CONTRAST, 100 * exposed.contrast, PERCENT),
            Measurement(CLIPPED_PERCENT, 100 * (exposed.dark + exposed.bright), PERCENT),
        ),
        evaluations=(Evaluation(IMAGE_QUALITY, quality), *(Evaluation(fault, answer) for fault, answer in answers.items())),
        source_instances=(image.sop_instance_uid,),
        confidence=float(min(1.0, turn.max())) if known else None,
    )


def _answer(finding: Finding, fault: Code) -> Code:
    return next(one.value for one in finding.evaluations if one.concept == fault)


def _suggested(finding: Finding, turn: NDArray[np.float32]) -> int:
    """The turn (0..7) to undo in the picture; 0 where the network is not certain."""
    certain = all(_answer(finding, fault) != INDETERMINATE for fault in (TURNED, MIRRORED))
    return int(np.argmax(turn)) if certain else 0


def _faults(finding: Finding) -> list[str]:
    return [name for fault, name in NAMES.items() if _answer(finding, fault) == PRESENT]


def _summary(findings: list[Finding]) -> str:
    bad = [one for one in map(_faults, findings) if one]
    count = f"{len(findings)} image{'s' if len(findings) != 1 else ''}"
    if not bad:
        return f"{count}: no fault of quality found"
    return f"{count}: {len(bad)} of poor quality ({', '.join(sorted({fault for one in bad for fault in one}))})"


def _values(findings: list[Finding]) -> dict[str, Any]:
    every = [fault for finding in findings for fault in _faults(finding)]
    values: dict[str, Any] = {"images": len(findings), "poor_images": sum(1 for finding in findings if _faults(finding))}
    return values | {name: every.count(name) for name in NAMES.values()}


def _warnings(input: AlgorithmInput) -> tuple[str, ...]:
    parts = {str(series.attributes.get("BodyPartExamined") or "").upper() for series in input.series["image"]}
    if parts <= {"CHEST", "THORAX"}:
        return ()
    return ("The header does not say that this is a chest: the answers about orientation mean nothing on other body parts",)
