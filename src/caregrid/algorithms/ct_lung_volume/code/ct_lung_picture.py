"""A picture of the lungs found: three axial slices above a coronal one, left lung and right lung tinted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WINDOW_HU = (-1350.0, 150.0)
PANEL = 320
LEFT_TINT, RIGHT_TINT = (0, 150, 255), (255, 150, 0)

Mask = NDArray[np.bool_]


def overlay(hu: NDArray[Any], left: Mask, right: Mask, spacing: tuple[float, float, float]) -> NDArray[np.uint8]:
    """(rows, columns, 3) uint8 in radiological convention: the patient's right is on the left. Arrays (z, y, x)."""
    slices = np.flatnonzero((left | right).any(axis=(1, 2)))
    shown = [slices[int(part * (len(slices) - 1))] for part in (0.8, 0.5, 0.2)]
    axial = [_panel(hu[index], left[index], right[index], spacing[1:]) for index in shown]
    rows = np.flatnonzero((left | right).any(axis=(0, 2)))
    row = rows[len(rows) // 2]
    coronal = _panel(hu[::-1, row], left[::-1, row], right[::-1, row], (spacing[0], spacing[2]))
    return np.vstack([np.hstack(axial[:2]), np.hstack([axial[2], coronal])])


def _panel(hu: NDArray[Any], left: Mask, right: Mask, spacing: tuple[float, ...]) -> NDArray[np.uint8]:
    """One slice with its masks, in true proportions, in the middle of a black square."""
    low, high = WINDOW_HU
    grey = np.clip((hu.astype(np.float32) - low) / (high - low) * 255.0, 0, 255)
    colour = np.repeat(grey[..., None], 3, axis=2)
    for mask, tint in ((left, LEFT_TINT), (right, RIGHT_TINT)):
        colour[mask] = 0.65 * colour[mask] + 0.35 * np.array(tint)
    height, width = hu.shape[0] * spacing[0], hu.shape[1] * spacing[1]
    scale = PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(colour.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
    square = np.zeros((PANEL, PANEL, 3), np.uint8)
    top, start = (PANEL - size[1]) // 2, (PANEL - size[0]) // 2
    square[top : top + size[1], start : start + size[0]] = small
    return square
