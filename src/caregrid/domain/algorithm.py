"""The manifest of a model package (``algorithm.toml``): what it is, what it may read, what it gives, what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from caregrid.domain.codes import Code

#: How an input is handed over: a checked volume, single images, cines, or only the files.
FORMS = ("volume", "images", "cine", "files")

#: Ways to run; see caregrid.runtime.
RUNNERS = ("python", "onnx", "container", "map")


@dataclass(frozen=True)
class InputSpec:
    """One DICOM-typed input. where: conditions on the series, same language as in workflows (``series`` filters).

    corrections: faults of a volume that may be mended instead of refused (``gantry-tilt``, ``longest-run``).
    """

    name: str
    form: str
    modality: tuple[str, ...]
    where: dict[str, Any] = field(default_factory=dict)
    minimum_instances: int = 1
    many: bool = False
    optional: bool = False
    corrections: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutputSpec:
    """One declared output: a measurement, evaluation or segment, by coded concept (unit for measurements)."""

    name: str
    kind: str
    concept: Code
    unit: Code | None = None


@dataclass(frozen=True)
class Resources:
    """Hard limits for one study. memory_mb: address space / cgroup; cpus: threads; gpu: needs one."""

    memory_mb: int = 4096
    cpus: int = 2
    gpu: bool = False


@dataclass(frozen=True)
class Manifest:
    """algorithm.toml, validated. name: lower-case-with-hyphens; version: semantic version.

    entry: "module:function" in the package's ``code/`` folder (python), a model file (onnx), or an image (container, map).
    digest: sha256 over the package's files, filled in by the registry; it pins what a run started with.
    """

    name: str
    version: str
    title: str
    runner: str
    entry: str
    intended_use: str
    regulatory_status: str
    manufacturer: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    algorithm_family: Code
    procedure: Code | None = None
    resources: Resources = Resources()
    timeout_seconds: int = 300
    parameters: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None
    model_card: str = "README.md"
    digest: str = ""

    @property
    def reference(self) -> str:
        """Name and version as people write them: ``lung-volume 1.2.0``."""
        return f"{self.name} {self.version}"
