"""The X-ray as received beside what it would be upright."""

from __future__ import annotations

import numpy as np
from chest_xray_measures import spread
from numpy.typing import NDArray
from PIL import Image

PANEL = 384


def as_received_and_upright(picture: NDArray[np.float32], turn: int, negative: bool) -> NDArray[np.uint8]:
    """(rows, columns, 3) uint8. turn: 0..7 as in training (mirrored when 4 or more, then turned), to be undone on the right."""
    upright = np.rot90(picture, -(turn % 4))
    upright = upright[:, ::-1] if turn >= 4 else upright
    pair = [_panel(picture), _panel(upright.max() - upright if negative else upright)]
    return np.repeat(np.hstack(pair)[..., None], 3, axis=2)


def _panel(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    small = Image.fromarray((255 * spread(picture)).astype(np.uint8))
    small.thumbnail((PANEL, PANEL))
    square = Image.new("L", (PANEL, PANEL))
    square.paste(small, ((PANEL - small.width) // 2, (PANEL - small.height) // 2))
    return np.asarray(square)
