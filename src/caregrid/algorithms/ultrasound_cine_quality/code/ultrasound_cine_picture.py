"""A contact sheet: the four best frames, and motion, sharpness and brightness over time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from ultrasound_cine_measures import Measures

from caregrid.domain.images import Cine

PANEL, CURVES = 320, 90
COLOURS = {"motion": (255, 190, 60), "sharpness": (90, 200, 255), "brightness": (160, 160, 160)}


def contact_sheet(cine: Cine, measures: Measures) -> NDArray[np.uint8]:
    """(rows, columns, 3) uint8: frame numbers are written on the frames, 1-based as in DICOM."""
    frames = (measures.best or tuple(range(len(cine.array))))[:4]
    sheet = Image.new("RGB", (2 * PANEL, 2 * PANEL + CURVES))
    for place, frame in enumerate(frames):
        picture = Image.fromarray(np.ascontiguousarray(cine.array[frame])).convert("RGB")
        picture.thumbnail((PANEL, PANEL))
        corner = (PANEL * (place % 2), PANEL * (place // 2))
        sheet.paste(picture, corner)
        ImageDraw.Draw(sheet).text((corner[0] + 4, corner[1] + 4), f"frame {frame + 1}", fill=(255, 255, 0))
    draw = ImageDraw.Draw(sheet)
    for place, (name, colour) in enumerate(COLOURS.items()):
        draw.line(_curve(getattr(measures, name)), fill=colour)
        draw.text((4 + 90 * place, 2 * PANEL + 2), name, fill=colour)
    return np.asarray(sheet)


def _curve(values: NDArray[Any]) -> list[tuple[float, float]]:
    """Points of a curve from 0 to its own maximum across the strip below the frames."""
    top = float(values.max()) if len(values) and values.max() > 0 else 1.0
    width = max(1, len(values) - 1)
    bottom, height = 2 * PANEL + CURVES - 4, CURVES - 20
    return [(2 * PANEL * index / width, bottom - height * float(value) / top) for index, value in enumerate(values)]
