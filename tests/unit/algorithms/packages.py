"""Model packages of the slot, loaded and run in this process the way the sandbox does it."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pydicom
import pytest

from caregrid.domain.algorithm import Manifest
from caregrid.domain.images import AlgorithmInput
from caregrid.errors import RegistryError
from caregrid.registry.environments import create_environment, environments
from caregrid.registry.manifest import read_manifest
from caregrid.runtime import onnx, python
from tests.support.data import SHARED

SLOT = Path(importlib.import_module("caregrid.algorithms").__path__[0])

#: Module names that two packages may both use.
_COMMON = ("model",)


def package(name: str) -> Path:
    """The folder of an algorithm."""
    return SLOT / name


def code(name: str, module: str) -> ModuleType:
    """A module of a package's ``code`` folder."""
    folder = str(package(name) / "code")
    sys.path.insert(0, folder)
    try:
        for common in _COMMON:
            sys.modules.pop(common, None)
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)


def entry(name: str) -> tuple[Manifest, Callable[[AlgorithmInput], Any]]:
    """Manifest and callable of an algorithm that needs no environment of its own."""
    folder = package(name)
    manifest = read_manifest(folder)
    before = list(sys.path)
    try:
        for common in _COMMON:
            sys.modules.pop(common, None)
        load = onnx.load_entry if manifest.runner == "onnx" else python.load_entry
        return manifest, load(manifest, folder)
    finally:
        sys.path[:] = before


def sample(text: str) -> dict[str, list[Path]]:
    """Series UID → files of a sample study as SAMPLES names it; skips where the shared data are not on this machine."""
    where, _, pattern = text.partition(":")
    if where == "pydicom":
        files = [found for root in _pydicom_roots() for found in sorted(root.rglob(pattern))][:1]
        assert files, f"neither pydicom nor pydicom-data has {pattern}"
    else:
        files = sorted(SHARED.glob(pattern))
        if not files:
            pytest.skip(f"real data {pattern} is not on this machine")
    return by_series(files)


def by_series(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files by Series Instance UID."""
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(str(pydicom.dcmread(file, stop_before_pixels=True).SeriesInstanceUID), []).append(file)
    return found


def pydicom_file(name: str) -> Path:
    """A test file of pydicom or pydicom-data, never downloaded."""
    return next(found for root in _pydicom_roots() for found in root.rglob(name))


def _pydicom_roots() -> list[Path]:
    inside = next(str(file.locate()) for file in metadata.files("pydicom-data") or [] if file.name == "__init__.py")
    return [Path(inside).parent, Path(pydicom.__file__).parent / "data" / "test_files"]


@cache
def environment(name: str, requirements: Path) -> Path:
    """The folder of environments with ``name`` in it, made with pip once per machine; skips where pip cannot."""
    folder = Path(tempfile.gettempdir()) / "caregrid-test-environments"
    if name not in environments(folder):
        try:
            create_environment(folder / name, requirements)
        except RegistryError as error:
            pytest.skip(f"environment {name} cannot be made on this machine: {error.message}")
    return folder
