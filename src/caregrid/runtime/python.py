"""Runner ``python``, the part inside the sandbox: ``module:function`` out of the package's ``code`` folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from caregrid.domain.algorithm import Manifest
from caregrid.domain.images import AlgorithmInput

Entry = Callable[[AlgorithmInput], Any]


def load_entry(manifest: Manifest, package: Path) -> Entry:
    """The function that ``entry`` names; the module's ``load(package)``, if it has one, is called first."""
    name, _, function = manifest.entry.partition(":")
    module = import_code(package, name)
    entry = getattr(module, function)
    if not callable(entry):
        raise TypeError("the entry is not a function")
    if hasattr(module, "load"):
        module.load(package)
    return entry  # type: ignore[no-any-return]


def import_code(package: Path, name: str) -> ModuleType:
    """Import module ``name`` from the package's ``code`` folder."""
    sys.path.insert(0, str(package / "code"))
    return importlib.import_module(name)
