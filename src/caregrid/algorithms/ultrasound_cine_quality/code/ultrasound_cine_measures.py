"""Numbers that say how good an ultrasound cine is, and the frame that shows most. No thresholds here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Longest side the frames are shrunk to before anything is measured, so that figures of different machines compare.
SIDE = 320
#: A pixel that was never brighter than this in the whole cine is outside the sector.
LIVE_LEVEL = 12
SATURATED = 250
#: Side of the blocks over which motion is measured: single-pixel noise of recompression is no motion.
BLOCK = 8
#: Two frames are the same picture when their blocks differ by less than this, in grey levels.
STILL_LEVEL = 0.25
#: Writing on screen is brighter than this; the black around it stays far below, recompressed or not.
WRITING_LEVEL = 60

Region = tuple[int, int, int, int, float | None, float | None]


@dataclass(frozen=True)
class Measures:
    """What was measured on one cine; all None or empty arrays when it shows nothing at all.

    motion: (frames,) mean change against the frame before, grey levels (0 for the first). sharpness, brightness: (frames,) 0..1.
    dark: 90th percentile of brightness inside the sector, 0..1. bright: share of the sector that is saturated, 0..1.
    sharp: median of sharpness. still: longest run of unchanged frames as (first, last), 0-based; still_share: its share of all.
    best: frames from best to worst.
    """

    live_share: float
    motion: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    brightness: NDArray[np.float64]
    dark: float | None
    bright: float | None
    sharp: float | None
    still: tuple[int, int]
    still_share: float
    best: tuple[int, ...]


def measure(frames: NDArray[np.uint8], region: Region | None) -> Measures:
    """All measures of ``frames`` (frames, rows, columns[, 3]) inside ``region`` (whole picture when None)."""
    grey = np.stack([_shrunk(frame, region) for frame in frames])
    live = _sector(grey)
    motion = _motion(grey, live)
    still = _longest_still(motion)
    share = (still[1] - still[0] + 1) / len(grey) if still[1] > still[0] else 0.0
    if not live.any():
        none = np.zeros(len(grey))
        return Measures(0.0, motion, none, none, None, None, None, still, share, ())
    inside = grey[:, live]
    sharpness = np.array([_sharpness(frame, live) for frame in grey])
    brightness = inside.mean(axis=1) / 255.0
    return Measures(
        live_share=float(live.mean()),
        motion=motion,
        sharpness=sharpness,
        brightness=brightness,
        dark=float(np.percentile(inside, 90)) / 255.0,
        bright=float((inside >= SATURATED).mean()),
        sharp=float(np.median(sharpness)),
        still=still,
        still_share=share,
        best=_best_first(motion, sharpness, brightness),
    )


def main_region(regions: Sequence[Region]) -> Region | None:
    """The largest region, one measured in millimetres before one that is not; None when the object names none."""
    sound = [one for one in regions if one[2] > one[0] and one[3] > one[1]]
    return max(sound, key=lambda one: (one[4] is not None, (one[2] - one[0]) * (one[3] - one[1])), default=None)


def writing_outside(frames: NDArray[np.uint8], regions: Sequence[Region]) -> float:
    """Share of the picture outside all regions that is bright and never changes: writing, logos, scales."""
    first, last = _grey(frames[0]), _grey(frames[-1])
    outside = np.ones(first.shape, bool)
    for x0, y0, x1, y1, _dx, _dy in regions:
        outside[y0 : y1 + 1, x0 : x1 + 1] = False
    bright = (first > WRITING_LEVEL) & (np.abs(first - last) < 16)
    return float((bright & outside).sum() / max(1, outside.sum()))


def _grey(frame: NDArray[Any]) -> NDArray[np.float32]:
    if frame.ndim == 2:
        return frame.astype(np.float32)
    return frame[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _shrunk(frame: NDArray[np.uint8], region: Region | None) -> NDArray[np.float32]:
    """The region of one frame in grey, blocks averaged until its longest side is at most about SIDE."""
    if region is not None:
        x0, y0, x1, y1 = region[:4]
        cut = frame[max(0, y0) : y1 + 1, max(0, x0) : x1 + 1]
        frame = cut if cut.size else frame
    grey = _grey(frame)
    step = max(1, round(max(grey.shape) / SIDE))
    return _blocks(grey, step)


def _blocks(grey: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    rows, columns = (max(1, size // step) for size in grey.shape[-2:])
    cut = grey[..., : rows * step, : columns * step]
    if cut.shape[-2] < step or cut.shape[-1] < step:
        return grey
    shape = (*grey.shape[:-2], rows, step, columns, step)
    mean: NDArray[np.float32] = cut.reshape(shape).mean(axis=(-3, -1), dtype=np.float32)
    return mean


def _sector(grey: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the machine draws: pixels that were bright at least once, closed to a whole."""
    seen = grey.max(axis=0) > LIVE_LEVEL
    return ndimage.binary_closing(seen, iterations=3) | seen


def _motion(grey: NDArray[np.float32], live: NDArray[np.bool_]) -> NDArray[np.float64]:
    small = _blocks(grey, BLOCK)
    area = _blocks(live.astype(np.float32), BLOCK) > 0.5
    if small.shape[1:] != area.shape or not area.any():
        return np.zeros(len(grey))
    change = np.abs(np.diff(small[:, area], axis=0)).mean(axis=1)
    return np.concatenate([[0.0], change])


def _longest_still(motion: NDArray[np.float64]) -> tuple[int, int]:
    """First and last frame of the longest run in which nothing changes; (0, 0) when there is none."""
    longest = (0, 0)
    start = 0
    for frame in range(1, len(motion)):
        if motion[frame] >= STILL_LEVEL:
            start = frame
        elif frame - start > longest[1] - longest[0]:
            longest = (start, frame)
    return longest


def _sharpness(frame: NDArray[np.float32], live: NDArray[np.bool_]) -> float:
    """One minus the blur of Crete et al. 2007: how much of the variation between neighbours a strong blur takes away."""
    lost, whole = [], []
    for axis in (0, 1):
        blurred = ndimage.uniform_filter1d(frame, 9, axis=axis)
        before, after = (np.abs(np.diff(one, axis=axis)) for one in (frame, blurred))
        inside = live[1:] & live[:-1] if axis == 0 else live[:, 1:] & live[:, :-1]
        whole.append(float(before[inside].sum()))
        lost.append(float(np.maximum(0.0, before - after)[inside].sum()))
    return min(share / total if total else 0.0 for share, total in zip(lost, whole, strict=True))


def _best_first(motion: NDArray[np.float64], sharpness: NDArray[np.float64], brightness: NDArray[np.float64]) -> tuple[int, ...]:
    """Frames by sharpness, less what moves, less what is darker or brighter than the cine usually is."""
    usual = np.median(brightness)
    score = _spread(sharpness) - 0.5 * _spread(motion) - 0.5 * _spread(np.abs(brightness - usual))
    return tuple(int(frame) for frame in np.argsort(-score, kind="stable"))


def _spread(values: NDArray[np.float64]) -> NDArray[np.float64]:
    width = float(values.std())
    return (values - values.mean()) / width if width > 0 else np.zeros_like(values)
