"""Runner ``map``: a MONAI Application Package, run as its own manifests (app.json, pkg.json) say, with plain podman.

The DICOM objects it writes are its answer; they are kept as files. Layout: the MONAI Application Package specification.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Findings
from caregrid.errors import AlgorithmBroken, ManifestInvalid
from caregrid.runtime import _podman
from caregrid.runtime._spool import Spool
from caregrid.runtime._warm import Answer
from caregrid.runtime.container import MIN_MEMORY_MB, Containers, podman_errors, run_box
from caregrid.runtime.exchange import open_plain

PLACES = ("/etc/holoscan", "/etc/monai")
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILES = 20_000
_PATH = re.compile(r"/[\w.-]+(/[\w.-]+)*/?\Z", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)
_SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True)
class MapManifest:
    """What a MAP says about itself: paths inside, command, environment, limits (0: none said)."""

    place: str
    command: str
    work: str
    input: str
    output: str
    environment: Mapping[str, str]
    seconds: float
    memory_mb: int
    shared_memory_mb: int
    cpus: int


class Maps:
    """Runs MAP images."""

    def __init__(self, containers: Containers) -> None:
        self.containers = containers
        self._read: dict[str, MapManifest] = {}

    def run(
        self,
        manifest: Manifest,
        package: Path,
        files_by_series: Mapping[str, Sequence[Path]],
        seconds: float,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """One study. Answer.files: the DICOM objects it wrote, kept until the runtime is closed or told to forget them."""
        image = self.containers.image(manifest, package)
        with podman_errors(manifest):
            said = self._manifest(image)
            settings = _podman.image_settings(image)
        with self.containers.spool() as spool:
            spool.put(files_by_series, readable_by_all=True)
            box = self._box(manifest, said, settings, image, seconds, spool)
            took = run_box(manifest, box, spool, stop)
            kept, others = _collect(spool.outgoing, self.containers.home.folder / "kept" / uuid.uuid4().hex, manifest)
        count = len(kept)
        summary = f"{manifest.title}: {count} DICOM object{'' if count == 1 else 's'} made"
        warnings = (f"{others} files that are not DICOM were left out",) if others else ()
        return Answer(Findings(summary, values={"files": count}, warnings=warnings), algorithm_seconds=took, files=kept)

    def _manifest(self, image: str) -> MapManifest:
        if image not in self._read:
            self._read[image] = read_map_manifest(image)
        return self._read[image]

    def _box(
        self, manifest: Manifest, said: MapManifest, settings: dict[str, Any], image: str, seconds: float, spool: Spool
    ) -> _podman.Box:
        user = str(settings.get("User") or "")
        started = settings.get("Entrypoint") or settings.get("Cmd")
        return _podman.Box(
            image=image,
            label=self.containers.label,
            mounts=[(spool.incoming, said.input, False), (spool.outgoing, said.output, True)],
            memory_mb=max(MIN_MEMORY_MB, min(manifest.resources.memory_mb, said.memory_mb or manifest.resources.memory_mb)),
            cpus=min(manifest.resources.cpus, said.cpus or manifest.resources.cpus),
            seconds=min(seconds, said.seconds or seconds),
            gpu=manifest.resources.gpu,
            shared_memory_mb=said.shared_memory_mb or 64,
            user="" if user.partition(":")[0] in ("", "0", "root") else user,
            folder=said.work,
            environment=_environment(said),
            command=() if started else tuple(shlex.split(said.command)),
        )


def read_map_manifest(image: str) -> MapManifest:
    """app.json and pkg.json of an image of this machine; ManifestInvalid when it is no MAP."""
    names = ("app.json", "pkg.json")
    with tempfile.TemporaryDirectory(prefix="caregrid-map-") as folder:
        found = _podman.read_files(image, [f"{place}/{name}" for place in PLACES for name in names], Path(folder))
        for place in PLACES:
            if f"{place}/app.json" in found:
                read = [_read_json(found.get(f"{place}/{name}"), f"{place}/{name}") for name in names]
                return parse_map_manifest(read[0], read[1], place)
    raise ManifestInvalid(file="/etc/holoscan/app.json", reason="is not in the image; it is no MONAI Application Package")


def parse_map_manifest(app: dict[str, Any], package: dict[str, Any], place: str = PLACES[0]) -> MapManifest:
    """The two manifests as one; ManifestInvalid names the key that does not fit."""
    file = f"{place}/app.json"
    work = _path(app.get("workingDirectory") or f"/var/{PurePosixPath(place).name}", "/", file, "workingDirectory")
    resources = package.get("resources") or {}
    environment = app.get("environment") or {}
    if not isinstance(resources, dict) or not isinstance(environment, dict):
        raise ManifestInvalid(file=file, reason="resources and environment must be objects")
    if not all(_VARIABLE.match(str(key)) and isinstance(value, str) for key, value in environment.items()):
        raise ManifestInvalid(file=file, reason="environment must be names with texts")
    return MapManifest(
        place=place,
        command=_command(app.get("command"), file),
        work=work,
        input=_folder(app.get("input"), work, "input", file),
        output=_folder(app.get("output"), work, "output", file),
        environment={str(key): value for key, value in environment.items()},
        seconds=_number(app.get("timeout"), file, "timeout"),
        memory_mb=_megabytes(resources.get("memory"), f"{place}/pkg.json", "resources.memory"),
        shared_memory_mb=_megabytes(resources.get("sharedMemory"), f"{place}/pkg.json", "resources.sharedMemory"),
        cpus=int(_number(resources.get("cpu"), f"{place}/pkg.json", "resources.cpu")),
    )


def _environment(said: MapManifest) -> dict[str, str]:
    paths = {
        "INPUT_PATH": said.input,
        "OUTPUT_PATH": said.output,
        "WORKDIR": said.work,
        "APP_MANIFEST_PATH": f"{said.place}/app.json",
        "PKG_MANIFEST_PATH": f"{said.place}/pkg.json",
    }
    both = {f"{prefix}_{name}": value for prefix in ("HOLOSCAN", "MONAI") for name, value in paths.items()}
    return {**said.environment, **both}


def _command(value: Any, file: str) -> str:
    """app.json's command: a text, or a JSON list in a text, as the two generations of the packager write it."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return shlex.join(value)
    if not isinstance(value, str) or not value.strip():
        raise ManifestInvalid(file=file, reason="command is missing")
    if value.lstrip().startswith("["):
        try:
            return _command(json.loads(value), file)
        except (ValueError, RecursionError) as error:
            raise ManifestInvalid(file=file, reason="command is not readable") from error
    return value


def _folder(value: Any, work: str, key: str, file: str) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    return _path(path or key, work, file, key)


def _path(value: Any, base: str, file: str, key: str) -> str:
    path = str(PurePosixPath(base) / value) if isinstance(value, str) else ""
    if not _PATH.match(path) or ".." in PurePosixPath(path).parts:
        raise ManifestInvalid(file=file, reason=f"{key} must be a path inside the image")
    return path


def _number(value: Any, file: str, key: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e7:
        raise ManifestInvalid(file=file, reason=f"{key} must be a number")
    return float(value)


def _megabytes(value: Any, file: str, key: str) -> int:
    """A size as the manifests write it (``"4Gi"``, ``"1024Mi"``) in MB, rounded up."""
    match = re.match(r"(\d{1,9}(?:\.\d{1,3})?)\s*([KMG]i?)?B?\Z", str(value), re.IGNORECASE) if value is not None else None
    if value is None:
        return 0
    if match is None:
        raise ManifestInvalid(file=file, reason=f"{key} must be a size such as 4Gi")
    return -int(-float(match[1]) * _SIZES[(match[2] or "").lower()] // (1 << 20))


def _read_json(path: Path | None, name: str) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with open_plain(path, MAX_MANIFEST_BYTES) as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(file=name, reason="is not JSON") from error
    if not isinstance(content, dict):
        raise ManifestInvalid(file=name, reason="must be an object")
    return content


def _collect(folder: Path, target: Path, manifest: Manifest) -> tuple[tuple[Path, ...], int]:
    """Move the DICOM files below ``folder`` to ``target``; how many other files there were. Links are never followed."""
    target.mkdir(parents=True)
    kept: list[Path] = []
    others = 0
    for where, _folders, names in os.walk(folder):
        for name in sorted(names):
            path = Path(where, name)
            if len(kept) + others >= MAX_FILES:
                raise AlgorithmBroken(
                    name=manifest.name, version=manifest.version, reason=f"it wrote more than {MAX_FILES} files"
                )
            if not _is_dicom(path):
                others += 1
                continue
            kept.append(target / f"{len(kept)}.dcm")
            shutil.move(path, kept[-1])
            kept[-1].chmod(0o600)
    return tuple(kept), others


def _is_dicom(path: Path) -> bool:
    """A plain file with DICOM's mark (PS3.10 section 7.1)."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with open_plain(path, 1 << 40) as file:
        return file.read(132)[128:] == b"DICM"
