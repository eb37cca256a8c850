"""Pixels as an algorithm is given them: volume, image and cine, with where each pixel lies in the patient.

Coordinates are DICOM's patient coordinates (LPS, millimetres; PS3.3 C.7.6.2.1.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Volume:
    """A regular grid of voxels.

    array: (slices, rows, columns), modality units (HU for CT) as int16 or float32.
    affine: (4, 4); maps the index (slice, row, column, 1) to patient LPS millimetres.
    sop_instance_uids: one per slice for single-frame series, one in all for a multi-frame object.
    frame_numbers: 1-based frame per slice in its SOP instance (all 1 for single-frame).
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    sop_instance_uids: tuple[str, ...]
    frame_numbers: tuple[int, ...]
    series_instance_uid: str
    frame_of_reference_uid: str
    corrections: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between slices, rows and columns."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(steps[0]), float(steps[1]), float(steps[2]))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0


@dataclass(frozen=True)
class Image:
    """One projection or single picture. array: (rows, columns) or (rows, columns, 3)."""

    array: NDArray[Any]
    sop_instance_uid: str
    frame_number: int = 1
    spacing: tuple[float, float] | None = None


@dataclass(frozen=True)
class Cine:
    """A run of frames in time. array: (frames, rows, columns) or (frames, rows, columns, 3), uint8.

    frame_seconds: time between frames, None when the object does not say.
    regions: ultrasound regions (PS3.3 C.8.5.5) as (x0, y0, x1, y1, delta_x_mm, delta_y_mm); deltas None without mm.
    """

    array: NDArray[np.uint8]
    sop_instance_uid: str
    frame_seconds: float | None = None
    regions: tuple[tuple[int, int, int, int, float | None, float | None], ...] = ()


@dataclass(frozen=True)
class SeriesInput:
    """One selected series, ready for an algorithm: its header as DICOM keyword → value, and its pixels in one form.

    Exactly one of volume, images, cines is filled, as the manifest's input asked (``form``); ``files`` is always there.
    """

    name: str
    form: str
    modality: str
    series_instance_uid: str
    attributes: Mapping[str, Any]
    files: tuple[Path, ...]
    volume: Volume | None = None
    images: tuple[Image, ...] = ()
    cines: tuple[Cine, ...] = ()


@dataclass(frozen=True)
class AlgorithmInput:
    """What an algorithm is handed: the named inputs of its manifest, its parameters, and its own folder."""

    series: Mapping[str, tuple[SeriesInput, ...]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    package: Path = Path(".")

    def one(self, name: str) -> SeriesInput:
        """The only series of input ``name``; KeyError or ValueError when there is none or more."""
        (series,) = self.series[name]
        return series
