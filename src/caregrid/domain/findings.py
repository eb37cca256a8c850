"""What an algorithm says about a study. Results (SEG, SR, SC, FHIR …) are written from these and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from caregrid.domain.codes import Code


@dataclass(frozen=True)
class Measurement:
    """A number with a unit. value is None when it cannot be given; qualifier then says why (PS3.16 CID 42)."""

    concept: Code
    value: float | None
    unit: Code
    qualifier: Code | None = None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"measurement {self.concept.meaning} is not a finite number")


@dataclass(frozen=True)
class Evaluation:
    """A qualitative answer: a coded question and a coded answer."""

    concept: Code
    value: Code


@dataclass(frozen=True)
class Segment:
    """A labelled part of the source volume (or image).

    mask: bool, the shape of the source volume (slices, rows, columns), or (frames, rows, columns) for images and cines.
    category/type: as Segmented Property Category/Type Code (PS3.3 C.8.20.2).
    """

    label: str
    category: Code
    type: Code
    mask: NDArray[np.bool_]
    source_series: str
    site: Code | None = None


@dataclass(frozen=True)
class Finding:
    """One finding with a stable identity in the study.

    tracking_id: names the finding within the algorithm, e.g. "lung-left"; tracking UID is derived from it.
    concept: what it is (TID 1411 Finding); site: where. segment: label of the segment that shows it.
    source_instances: SOP Instance UIDs it was read from. evidence on frames: frames 1-based, for cines.
    confidence: 0..1, None when the algorithm gives none.
    """

    tracking_id: str
    concept: Code
    site: Code | None = None
    laterality: Code | None = None
    segment: str | None = None
    measurements: tuple[Measurement, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    source_instances: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    confidence: float | None = None


@dataclass(frozen=True)
class Picture:
    """A picture for people (secondary capture). array: (rows, columns, 3) uint8; made from source_instances."""

    title: str
    array: NDArray[np.uint8]
    source_instances: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """The whole answer of one algorithm on one study.

    summary: one plain-English sentence for worklists. used_instances: every SOP Instance UID that was read.
    values: flat name → number/text/bool that workflow conditions may ask (``result``).
    """

    summary: str
    findings: tuple[Finding, ...] = ()
    segments: tuple[Segment, ...] = ()
    pictures: tuple[Picture, ...] = ()
    used_instances: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
