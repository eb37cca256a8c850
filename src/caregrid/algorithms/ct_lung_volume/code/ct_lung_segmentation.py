"""Finds the lungs on CT with thresholds and shapes alone; nothing is learned.

The work is done on a grid of about 1.5 mm, where the connected parts are found, and the border is taken from the full grid.
Arrays are (z, y, x) with z towards the head, y towards the back, x towards the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

#: Air-filled tissue lies below this (Hounsfield units); the usual threshold of quantitative CT.
TISSUE_HU = -500
#: Median of a part that may be lung: gas in bowel or trachea lies below, fat and noise above.
LUNG_MEDIAN_HU = (-950, -500)
#: Smallest cross-section of a lung's largest slice; sinuses and bowel loops are mostly smaller.
LUNG_AREA_MM2 = 2000.0
GRID_MM = 1.5
#: Vessels up to twice this width inside the lung are counted as lung.
CLOSING_MM = 5.0
TRACHEA_MM2 = (50.0, 800.0)
TRACHEA_HU = -850
#: How far apart the lungs may be eroded when they touch.
SPLIT_MM = 14.0

_CROSS = ndimage.generate_binary_structure(3, 1)
_IN_PLANE = _CROSS.copy()
_IN_PLANE[[0, 2]] = False

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Lungs:
    """left, right: masks of the full grid (z, y, x). partial: lung reaches an end of the scan. split: how they were parted."""

    left: Mask
    right: Mask
    partial: bool
    split: str


def find_lungs(hu: NDArray[Any], spacing: tuple[float, float, float]) -> Lungs:
    """Both lungs in ``hu`` (z, y, x), Hounsfield units; empty masks where there are none. spacing: mm along z, y, x."""
    steps = tuple(max(1, round(GRID_MM / size)) for size in spacing)
    coarse = _shrink(hu, steps)
    sizes = tuple(size * step for size, step in zip(spacing, steps, strict=True))
    body = _body(coarse, sizes)
    inside = ~body & ~_outside(body) & (coarse <= TISSUE_HU)
    trachea = _trachea(coarse, inside, sizes)
    candidates = _lung_parts(coarse, inside & ~trachea, sizes)
    left, right, split = _part_sides(candidates, _middle(body), sizes)
    masks = [_refine(hu, _close(side, sizes), trachea, steps) for side in (left, right)]
    masks[1] &= ~masks[0]
    both = masks[0] | masks[1]
    return Lungs(masks[0], masks[1], bool(both[0].any() or both[-1].any()), split)


def _shrink(hu: NDArray[Any], steps: tuple[int, ...]) -> NDArray[np.float32]:
    """Block means; the last incomplete block is filled up by repeating the edge."""
    grown = [-size % step for size, step in zip(hu.shape, steps, strict=True)]
    if any(grown):
        hu = np.pad(hu, [(0, more) for more in grown], mode="edge")
    total = np.zeros([size // step for size, step in zip(hu.shape, steps, strict=True)], np.float32)
    for offset in np.ndindex(*steps):
        total += hu[tuple(slice(start, None, step) for start, step in zip(offset, steps, strict=True))]
    return total / np.float32(np.prod(steps))


def _body(coarse: NDArray[np.float32], sizes: tuple[float, ...]) -> Mask:
    """The largest piece of tissue, its air left out; the table is another piece."""
    tissue = coarse > TISSUE_HU
    radius = max(1, round(3.0 / sizes[1]))
    opened = ndimage.binary_erosion(tissue, _IN_PLANE, iterations=radius)
    labels, count = ndimage.label(opened, _CROSS)
    if count == 0:
        return np.zeros_like(tissue)
    body = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return ndimage.binary_dilation(body, _IN_PLANE, iterations=radius) & tissue


def _outside(body: Mask) -> Mask:
    """What is connected, within its slice, to the slice's edge."""
    labels, count = ndimage.label(~body, _IN_PLANE)
    touching = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        touching[np.unique(edge)] = True
    touching[0] = False
    return touching[labels]


def _trachea(coarse: NDArray[np.float32], inside: Mask, sizes: tuple[float, ...]) -> Mask:
    """The windpipe, followed from the topmost slice that shows one down to where it opens into a lung."""
    found = np.zeros_like(inside)
    smallest, largest = (limit / (sizes[1] * sizes[2]) for limit in TRACHEA_MM2)
    previous: Mask | None = None
    for index in range(len(inside) - 1, -1, -1):
        labels, count = ndimage.label(inside[index])
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        parts = [part for part in range(1, count + 1) if smallest <= areas[part] <= largest]
        if previous is None:
            parts = [part for part in parts if _like_trachea(labels == part, coarse[index])]
        else:
            parts = [part for part in parts if (previous & (labels == part)).any() and areas[part] < 2.5 * previous.sum()]
        if not parts:
            if previous is not None:
                break
            continue
        previous = np.isin(labels, parts[:1])
        found[index] = previous
    return ndimage.binary_dilation(found, _IN_PLANE) & inside


def _like_trachea(part: Mask, hu: NDArray[np.float32]) -> bool:
    """Nearly pure air, compact, near the middle of the picture."""
    rows, columns = np.nonzero(part)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    central = abs(columns.mean() / part.shape[1] - 0.5) < 0.15
    return bool(central and part.sum() > 0.55 * box and hu[part].mean() < TRACHEA_HU)


def _lung_parts(coarse: NDArray[np.float32], air: Mask, sizes: tuple[float, ...]) -> Mask:
    """The connected parts that are large enough, and dense enough, to be lung."""
    labels, count = ndimage.label(air, _CROSS)
    volumes = np.bincount(labels.ravel(), minlength=count + 1)
    volumes[0] = 0
    kept = np.zeros(count + 1, bool)
    area = sizes[1] * sizes[2]
    boxes = ndimage.find_objects(labels)
    for part in np.argsort(volumes)[::-1][:12]:
        if volumes[part] == 0:
            break
        where = boxes[part - 1]
        here = labels[where] == part
        widest = here.sum(axis=(1, 2)).max() * area
        median = float(np.median(coarse[where][here]))
        kept[part] = widest >= LUNG_AREA_MM2 and LUNG_MEDIAN_HU[0] <= median <= LUNG_MEDIAN_HU[1]
    return kept[labels]


def _part_sides(lungs: Mask, middle: float, sizes: tuple[float, ...]) -> tuple[Mask, Mask, str]:
    """Left and right lung: as connected parts, else eroded until they part, else cut at the middle."""
    if not lungs.any():
        return lungs, lungs.copy(), "none"
    step = max(1, round(3.0 / sizes[2]))
    for rounds in range(0, 1 + round(SPLIT_MM / (sizes[2] * step))):
        seeds = lungs if rounds == 0 else ndimage.binary_erosion(lungs, _IN_PLANE, iterations=rounds * step)
        sides = _seed_sides(seeds, middle)
        if sides is not None:
            return (*_grow(lungs, *sides), "connected parts" if rounds == 0 else "eroded apart")
    columns = np.arange(lungs.shape[2]) >= middle
    return lungs & columns, lungs & ~columns, "cut at the middle"


def _middle(body: Mask) -> float:
    """Column half-way between the outermost columns of the body; the middle of the picture without one."""
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    return float(columns[0] + columns[-1] + 1) / 2 if len(columns) else body.shape[2] / 2


def _seed_sides(seeds: Mask, middle: float) -> tuple[Mask, Mask] | None:
    """Seeds of the left and right lung when no large part lies on both sides of the middle; None while one does."""
    labels, count = ndimage.label(seeds, _CROSS)
    if count == 0:
        return None
    total = np.bincount(labels.ravel(), minlength=count + 1)
    left_of = np.bincount(labels[:, :, int(np.ceil(middle)) :].ravel(), minlength=count + 1)
    share = left_of / np.maximum(total, 1)
    large = total > 0.1 * total[1:].sum()
    large[0] = False
    # Both lungs in one part lie about half on each side; a single lung reaches over the middle by less.
    if (large & (share > 0.3) & (share < 0.7)).any():
        return None
    is_left = share >= 0.5
    is_left[0] = False
    is_right = ~is_left
    is_right[0] = False
    return is_left[labels], is_right[labels]


def _grow(lungs: Mask, left: Mask, right: Mask) -> tuple[Mask, Mask]:
    """Give what erosion took away to the nearer side."""
    if not (lungs & ~(left | right)).any():
        return left, right
    if not left.any() or not right.any():
        return (lungs, np.zeros_like(lungs)) if left.any() else (np.zeros_like(lungs), lungs)
    # Every second voxel says which side is nearer; exactly where the two meet is a matter of a millimetre or two.
    away = [ndimage.distance_transform_edt(~side[::2, ::2, ::2]) for side in (left, right)]
    nearer_left = _enlarge(away[0] < away[1], (2, 2, 2), lungs.shape)
    return lungs & nearer_left, lungs & ~nearer_left


def _close(lung: Mask, sizes: tuple[float, ...]) -> Mask:
    """Vessels and small dense spots inside the lung become lung: closing by a ball, then holes slice by slice."""
    boxes = ndimage.find_objects(lung.astype(np.uint8))
    if not boxes:
        return lung
    pad = [int(np.ceil(CLOSING_MM / size)) + 1 for size in sizes]
    here = np.pad(lung[boxes[0]], [(more, more) for more in pad], mode="constant")
    # The scan's first and last slice are no border of the lung: closing must not eat into them.
    here[: pad[0]], here[-pad[0] :] = here[pad[0]], here[-pad[0] - 1]
    closed = _around(~_around(here, sizes), sizes)
    closed = ~closed | here
    closed |= ~_outside(closed)
    result = lung.copy()
    result[boxes[0]] |= closed[tuple(slice(more, -more) for more in pad)]
    return result


def _around(mask: Mask, sizes: tuple[float, ...]) -> Mask:
    """Everything within CLOSING_MM of ``mask``, in steps of a voxel; along z only as far as whole slices reach."""
    across, along = round(CLOSING_MM / sizes[1]), int(CLOSING_MM / sizes[0])
    both = min(across, along)
    if both:
        mask = ndimage.binary_dilation(mask, _CROSS, iterations=both)
    if across > both:
        mask = ndimage.binary_dilation(mask, _IN_PLANE, iterations=across - both)
    return mask


def _refine(hu: NDArray[Any], coarse: Mask, trachea: Mask, steps: tuple[int, ...]) -> Mask:
    """The coarse mask on the full grid, its border moved to where the full grid crosses the threshold."""
    result = np.zeros(hu.shape, bool)
    boxes = ndimage.find_objects(ndimage.binary_dilation(coarse, _CROSS).astype(np.uint8))
    if not boxes:
        return result
    where = boxes[0]
    coarse, trachea = coarse[where], trachea[where]
    sure = ndimage.binary_erosion(coarse, _CROSS, border_value=1)
    maybe = ndimage.binary_dilation(coarse, _CROSS) & ~trachea
    full = tuple(slice(part.start * step, part.stop * step) for part, step in zip(where, steps, strict=True))
    target = result[full]
    air = hu[full] < TISSUE_HU
    target[...] = _enlarge(sure, steps, target.shape) | (_enlarge(maybe, steps, target.shape) & air)
    return result


def _enlarge(mask: Mask, steps: tuple[int, ...], shape: tuple[int, ...]) -> Mask:
    for axis, step in enumerate(steps):
        mask = np.repeat(mask, step, axis=axis) if step > 1 else mask
    return mask[tuple(slice(size) for size in shape)]
