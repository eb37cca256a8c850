"""Reads ``algorithm.toml`` into a Manifest. Every complaint names the file and the key. Imports nothing heavy: workers use it."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from caregrid.domain.algorithm import FORMS, RUNNERS, InputSpec, Manifest, OutputSpec, Resources
from caregrid.domain.codes import Code
from caregrid.errors import ManifestInvalid

FILE = "algorithm.toml"
OUTPUT_KINDS = ("measurement", "evaluation", "segment", "finding")
MAX_BYTES = 1 << 20

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\Z")
# semver.org's own expression, without the named groups
SEMVER = re.compile(
    r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
    r"(-((0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?"
    r"(\+([0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*))?\Z",
    re.ASCII,
)
PYTHON_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z", re.ASCII)
IMAGE = re.compile(r"[a-z0-9][a-zA-Z0-9./:_-]*@sha256:[0-9a-f]{64}\Z")
MODALITY = re.compile(r"[A-Z0-9_ ]{1,16}\Z")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the package in ``folder``; what it names must be there. Raises ManifestInvalid."""
    path = folder / FILE
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ManifestInvalid(file=FILE, reason=f"is larger than {MAX_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ManifestInvalid(file=FILE, reason=f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ManifestInvalid(file=FILE, reason="is not UTF-8 text") from error
    manifest = parse_manifest(text)
    _check_files(folder, manifest)
    return manifest


def parse_manifest(text: str) -> Manifest:
    """The manifest that ``text`` (TOML) describes; raises ManifestInvalid, never anything else."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise ManifestInvalid(file=FILE, reason=f"is not TOML: {error}") from error
    return manifest_from_json(raw)


def manifest_as_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain JSON data, the shape of algorithm.toml."""

    def plain(value: Any) -> Any:
        if isinstance(value, Code):
            return value.as_list()
        if isinstance(value, InputSpec | OutputSpec | Resources):
            return {key: plain(getattr(value, key)) for key in asdict(value) if getattr(value, key) is not None}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = {key: plain(getattr(manifest, key)) for key in Manifest.__dataclass_fields__}
    return {key: value for key, value in fields.items() if value is not None and value != ""}


def manifest_from_json(raw: dict[str, Any]) -> Manifest:
    """A manifest from the data of algorithm.toml (or of ``manifest_as_json``); raises ManifestInvalid."""
    table = _Table(raw, "")
    manifest = Manifest(
        name=table.text("name", pattern=NAME, says="lower-case letters, digits and single hyphens, beginning with a letter"),
        version=table.text("version", pattern=SEMVER, says="a semantic version such as 1.0.0"),
        title=table.text("title"),
        runner=table.choice("runner", RUNNERS),
        entry=table.text("entry"),
        intended_use=table.text("intended_use"),
        regulatory_status=table.text("regulatory_status"),
        manufacturer=table.text("manufacturer"),
        inputs=table.tables("inputs", _input),
        outputs=table.tables("outputs", _output),
        algorithm_family=table.code("algorithm_family"),
        procedure=table.code("procedure") if "procedure" in raw else None,
        resources=_resources(table.table("resources")),
        timeout_seconds=table.whole("timeout_seconds", 300, 1, 86400),
        parameters=_parameters(table.table("parameters")),
        environment=table.text("environment", pattern=NAME, says="an environment's name") if "environment" in raw else None,
        model_card=table.text("model_card", default="README.md"),
        digest=table.text("digest", default="", pattern=re.compile(r"[0-9a-f]{64}\Z|\Z"), says="a sha256 in hex"),
    )
    table.finish()
    _check_entry(manifest)
    _check_unique("inputs", [spec.name for spec in manifest.inputs])
    _check_unique("outputs", [spec.name for spec in manifest.outputs])
    return manifest


_CORRECTION = re.compile(r"(gantry-tilt|longest-run)\Z")


def _input(table: _Table) -> InputSpec:
    return InputSpec(
        name=table.text("name"),
        form=table.choice("form", FORMS),
        modality=table.texts("modality", MODALITY, "DICOM modalities such as CT"),
        where=_plain(table.path("where"), table.table("where").raw),
        minimum_instances=table.whole("minimum_instances", 1, 1, 1_000_000),
        many=table.truth("many", False),
        optional=table.truth("optional", False),
        corrections=table.texts("corrections", _CORRECTION, "gantry-tilt or longest-run", empty=True),
    )


def _output(table: _Table) -> OutputSpec:
    kind = table.choice("kind", OUTPUT_KINDS)
    if kind == "measurement" and "unit" not in table.raw:
        raise _invalid(table.path("unit"), "is missing; a measurement needs one")
    if kind != "measurement" and "unit" in table.raw:
        raise _invalid(table.path("unit"), f"is only for measurements, not for a {kind}")
    unit = table.code("unit") if kind == "measurement" else None
    return OutputSpec(name=table.text("name"), kind=kind, concept=table.code("concept"), unit=unit)


def _resources(table: _Table) -> Resources:
    made = Resources(
        memory_mb=table.whole("memory_mb", 4096, 16, 4_194_304),
        cpus=table.whole("cpus", 2, 1, 1024),
        gpu=table.truth("gpu", False),
    )
    table.finish()
    return made


def _parameters(table: _Table) -> dict[str, Any]:
    return dict(_plain("parameters", table.raw))


def _plain(where: str, value: Any, depth: int = 0) -> Any:
    """The value unchanged when JSON can keep it (TOML's dates, inf and nan it cannot)."""
    if depth > 20:
        raise _invalid(where, "is nested too deep")
    if isinstance(value, str) and not _sayable(value):
        raise _invalid(where, "must not hold control characters")
    if isinstance(value, dict):
        return {_plain(where, key): _plain(f"{where}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(where, item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise _invalid(where, "must be a finite number")
    if not isinstance(value, str | int | float | bool):
        raise _invalid(where, "must be text, numbers, true, false, lists or tables of them")
    return value


def _check_entry(manifest: Manifest) -> None:
    entry = manifest.entry
    if manifest.runner == "python" and not PYTHON_ENTRY.match(entry):
        raise _invalid("entry", "must be module:function for runner python")
    if manifest.runner == "onnx":
        _check_inside("entry", entry)
    if manifest.runner in ("container", "map") and not IMAGE.match(entry):
        if not entry.endswith(".tar"):
            raise _invalid("entry", "must be an image by digest (name@sha256:…) or an image .tar in the package")
        _check_inside("entry", entry)
    if manifest.environment and manifest.runner in ("container", "map"):
        raise _invalid("environment", f"is not for runner {manifest.runner}; an image brings its own")
    _check_inside("model_card", manifest.model_card)


def _check_inside(key: str, text: str) -> None:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or not path.parts:
        raise _invalid(key, "must be a file inside the package")


def _check_files(folder: Path, manifest: Manifest) -> None:
    wanted = {"model_card": manifest.model_card}
    if manifest.runner == "python":
        wanted["entry"] = "code/" + manifest.entry.partition(":")[0].replace(".", "/") + ".py"
    elif manifest.runner == "onnx":
        wanted["entry"] = manifest.entry
        if not (folder / "code" / "model.py").is_file():
            raise _invalid("entry", "needs code/model.py with preprocess and postprocess, which is not in the package")
    elif manifest.entry.endswith(".tar"):
        wanted["entry"] = manifest.entry
    for key, name in wanted.items():
        package = name.removesuffix(".py") + "/__init__.py"
        if not (folder / name).is_file() and not (key == "entry" and (folder / package).is_file()):
            raise _invalid(key, f"names {name}, which is not in the package")


def _check_unique(key: str, names: Collection[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise _invalid(key, f"has two called {name!r}")


def _invalid(key: str, reason: str) -> ManifestInvalid:
    return ManifestInvalid(file=FILE, reason=f"{key} {reason}")


class _Table:
    """A TOML table being read: remembers which keys were asked for, so that the rest can be refused."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            raise _invalid(where or "the file", "must be a table")
        self.raw: dict[str, Any] = raw
        self.where = where
        self.asked: set[str] = set()

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def take(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return self.raw.get(key, default)

    def text(self, key: str, default: str | None = None, pattern: re.Pattern[str] | None = None, says: str = "") -> str:
        value = self.take(key, default)
        if value is None:
            raise _invalid(self.path(key), "is missing")
        if not isinstance(value, str) or not (value.strip() or value == default) or len(value) > 10_000:
            raise _invalid(self.path(key), "must be text that is not empty")
        if not _sayable(value):
            raise _invalid(self.path(key), "must not hold control characters")
        if pattern and not pattern.match(value):
            raise _invalid(self.path(key), f"must be {says}")
        return value

    def texts(self, key: str, pattern: re.Pattern[str], says: str, empty: bool = False) -> tuple[str, ...]:
        value = self.take(key, [] if empty else None)
        if not isinstance(value, list) or not (value or empty):
            raise _invalid(self.path(key), f"must be a list of {says}")
        if not all(isinstance(item, str) and pattern.match(item) for item in value):
            raise _invalid(self.path(key), f"must be a list of {says}")
        return tuple(value)

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in choices:
            raise _invalid(self.path(key), f"must be one of {', '.join(choices)}{_hint(value, choices)}")
        return value

    def whole(self, key: str, default: int, lowest: int, highest: int) -> int:
        value = self.take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise _invalid(self.path(key), f"must be a whole number from {lowest} to {highest}")
        return value

    def truth(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise _invalid(self.path(key), "must be true or false")
        return value

    def code(self, key: str) -> Code:
        value = self.take(key)
        if value is None:
            raise _invalid(self.path(key), "is missing")
        if not isinstance(value, list) or len(value) != 3 or not all(_code_part(part) for part in value):
            raise _invalid(self.path(key), "must be a code: [value, scheme, meaning]")
        return Code(*value)

    def table(self, key: str) -> _Table:
        return _Table(self.take(key, {}), self.path(key))

    def tables(self, key: str, read: Callable[[_Table], Any]) -> tuple[Any, ...]:
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise _invalid(self.path(key), f"must be one or more tables, [[{key}]]")
        made = []
        for number, raw in enumerate(value, 1):
            table = _Table(raw, f"{key}[{number}]")
            made.append(read(table))
            table.finish()
        return tuple(made)

    def finish(self) -> None:
        """Refuse keys nobody asked for."""
        for key in self.raw:
            if key not in self.asked:
                raise _invalid(self.path(key), f"is not a known key{_hint(key, self.asked)}")


def _sayable(text: str) -> bool:
    """Whether every database and log can keep the text: no control characters but line ends and tabs, no lone surrogates."""
    return not any((ord(letter) < 32 and letter not in "\n\t") or 0xD800 <= ord(letter) < 0xE000 for letter in text)


def _code_part(part: Any) -> bool:
    return isinstance(part, str) and bool(part.strip()) and len(part) <= 200 and part.isprintable()


def _hint(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
