"""Finds the files in a slot. The only loading by name in caregrid."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names(slot: str) -> list[str]:
    """The plugs of a slot (``"results"``, ``"intake"``, ``"algorithms"`` …) by file name, sorted; private ones left out."""
    package = importlib.import_module(f"caregrid.{slot}")
    found = (info.name for info in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(slot: str, name: str) -> ModuleType:
    """The plug ``name`` of ``slot``; KeyError when the slot has none of that name."""
    if name not in names(slot):
        raise KeyError(f"slot {slot} has no {name}; it has: {', '.join(names(slot))}")
    return importlib.import_module(f"caregrid.{slot}.{name}")
