"""Where a frame's attributes stand: at the top of a single-frame object, in the functional groups of a multi-frame one."""

from __future__ import annotations

from typing import Any

from pydicom.dataset import Dataset


def frame_count(dataset: Dataset) -> int:
    """NumberOfFrames; 1 where it is absent, empty or not a number."""
    if "NumberOfFrames" not in dataset:
        return 1
    try:
        return max(1, int(dataset.get("NumberOfFrames") or 1))
    except (TypeError, ValueError):
        return 1


def is_enhanced(dataset: Dataset) -> bool:
    """Whether the object describes its frames in functional groups (PS3.3 C.7.6.16)."""
    return "SharedFunctionalGroupsSequence" in dataset or "PerFrameFunctionalGroupsSequence" in dataset


def macro(dataset: Dataset, frame: int, keyword: str) -> Dataset | None:
    """The item of functional group ``keyword`` that holds for 1-based ``frame``: the frame's own before the shared one."""
    for groups in _groups(dataset, frame):
        items = groups.get(keyword)
        if items:
            item: Dataset = items[0]
            return item
    return None


def value(dataset: Dataset, frame: int, group: str, keyword: str) -> Any:
    """Attribute ``keyword`` for 1-based ``frame``: from functional group ``group``, else from the top of the data set."""
    item = macro(dataset, frame, group) if is_enhanced(dataset) else None
    if item is not None and item.get(keyword) not in (None, ""):
        return item.get(keyword)
    return dataset.get(keyword)


def _groups(dataset: Dataset, frame: int) -> list[Dataset]:
    found = []
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if frame <= len(per_frame):
        found.append(per_frame[frame - 1])
    found.extend((dataset.get("SharedFunctionalGroupsSequence") or [])[:1])
    return found
