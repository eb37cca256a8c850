"""The picture as the network sees it, and exposure figures. Used alike in training, evaluation and at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Side of the picture the network is given.
SIDE = 64
#: Share of pixels left out at both ends when grey values are spread, so that markers and collimator edges do not count.
TRIM = 1.0


@dataclass(frozen=True)
class Exposure:
    """contrast: spread of the middle half of the grey values. dark, bright: share at the lowest and highest grey. All 0..1."""

    contrast: float
    dark: float
    bright: float


def grey(array: NDArray[Any], lowest_is_white: bool) -> NDArray[np.float32]:
    """(rows, columns) with bone bright; colour pictures are averaged. lowest_is_white: PhotometricInterpretation MONOCHROME1."""
    picture = array.astype(np.float32)
    if picture.ndim == 3:
        picture = picture[..., :3].mean(axis=2)
    return picture.max() - picture if lowest_is_white else picture


def spread(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey values from 0 to 1 between the outermost percents; a picture of one value becomes all 0."""
    low, high = np.percentile(picture, (TRIM, 100 - TRIM))
    if high <= low:
        return np.zeros_like(picture)
    result: NDArray[np.float32] = np.clip((picture - low) / np.float32(high - low), 0, 1).astype(np.float32)
    return result


def shrunk(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """(64, 64) in 0..1, whatever the proportions were."""
    small = Image.fromarray(spread(picture)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def exposure(picture: NDArray[np.float32]) -> Exposure:
    """Exposure of the middle of the picture, where the chest is, against the whole range of grey values that occur."""
    rows, columns = picture.shape
    middle = picture[rows // 8 : rows - rows // 8, columns // 8 : columns - columns // 8]
    low, high = float(picture.min()), float(picture.max())
    if high <= low or middle.size == 0:
        return Exposure(0.0, 1.0, 0.0)
    quarter, three = np.percentile(middle, (25, 75))
    edge = 0.01 * (high - low)
    return Exposure(
        contrast=float(three - quarter) / (high - low),
        dark=float((middle <= low + edge).mean()),
        bright=float((middle >= high - edge).mean()),
    )
