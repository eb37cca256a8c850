"""How findings cross from the sandbox: ``findings.json`` and ``arrays.npz`` in a folder.

The writing side runs with the algorithm. The reading side trusts nothing it finds: plain files only, sizes before content, no
pickle, and only what the manifest declares. Imports numpy and nothing else heavy.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from caregrid.domain.algorithm import Manifest
from caregrid.domain.codes import Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture, Segment
from caregrid.errors import AlgorithmBroken

FORMAT = "caregrid-findings/1"
JSON_NAME, ARRAYS_NAME = "findings.json", "arrays.npz"
MAX_JSON_BYTES = 32 << 20
MAX_ARRAYS_BYTES = 2 << 30
MAX_VOXELS = 1 << 31
MAX_PICTURE_SIDE = 8192
MAX_ITEMS = 10_000
UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*\Z", re.ASCII)


def write_findings(findings: Findings, folder: Path) -> None:
    """Write ``findings`` as findings.json and arrays.npz (masks packed eight to the byte) into ``folder``."""
    arrays: dict[str, NDArray[Any]] = {}
    segments = []
    for number, segment in enumerate(findings.segments):
        mask = np.asarray(segment.mask)
        if mask.dtype != np.bool_:
            raise ValueError(f"the mask of segment {number + 1} is {mask.dtype}, not bool")
        arrays[f"mask_{number}"] = np.packbits(mask)
        segments.append({**_segment_as_json(segment), "mask": f"mask_{number}", "shape": list(mask.shape)})
    pictures = []
    for number, picture in enumerate(findings.pictures):
        arrays[f"picture_{number}"] = np.ascontiguousarray(picture.array)
        entry = {"title": picture.title, "array": f"picture_{number}", "source_instances": list(picture.source_instances)}
        pictures.append(entry)
    content = {
        "format": FORMAT,
        "summary": findings.summary,
        "findings": [finding_as_json(finding) for finding in findings.findings],
        "segments": segments,
        "pictures": pictures,
        "used_instances": list(findings.used_instances),
        "values": {key: _scalar(value) for key, value in findings.values.items()},
        "warnings": list(findings.warnings),
    }
    if arrays:
        np.savez(folder / ARRAYS_NAME, **arrays)  # type: ignore[arg-type]
    (folder / JSON_NAME).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def finding_as_json(finding: Finding) -> dict[str, Any]:
    """A finding as plain JSON data; ``finding_from_json`` reads it back equal."""
    return {
        "tracking_id": finding.tracking_id,
        "concept": finding.concept.as_list(),
        "site": _code_as_json(finding.site),
        "laterality": _code_as_json(finding.laterality),
        "segment": finding.segment,
        "measurements": [
            {
                "concept": item.concept.as_list(),
                "value": _scalar(item.value),
                "unit": item.unit.as_list(),
                "qualifier": _code_as_json(item.qualifier),
            }
            for item in finding.measurements
        ],
        "evaluations": [{"concept": item.concept.as_list(), "value": item.value.as_list()} for item in finding.evaluations],
        "source_instances": list(finding.source_instances),
        "frames": [int(frame) for frame in finding.frames],
        "confidence": _scalar(finding.confidence),
    }


def finding_from_json(raw: Mapping[str, Any]) -> Finding:
    """A finding from the data of ``finding_as_json``; raises ValueError naming the key that does not fit."""
    return _finding(_Reader(raw, "finding"))


def read_findings(folder: Path, manifest: Manifest) -> Findings:
    """The findings left in ``folder``, checked against ``manifest``; raises AlgorithmBroken, never anything else."""
    try:
        content = _read_json(folder / JSON_NAME)
        with _Arrays(folder / ARRAYS_NAME) as arrays:
            findings = _findings(_Reader(content, ""), arrays)
        return _declared(findings, manifest)
    except Exception as error:  # the edge to untrusted data: zip, zlib, lzma and numpy's header parser each raise their own
        reason = str(error) if isinstance(error, _UnfitError) else f"{JSON_NAME} or {ARRAYS_NAME} cannot be read"
        raise AlgorithmBroken(name=manifest.name, version=manifest.version, reason=reason) from error


class _UnfitError(ValueError):
    """Something in the answer does not fit; the message names the place, not the content."""


# --- reading the files ---


def open_plain(path: Path, max_bytes: int) -> IO[bytes]:
    """Open a regular file of at most ``max_bytes``; ValueError for links, pipes, devices and anything larger.

    The folder was writable by the algorithm: following a link would read a file of the site's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _UnfitError(f"{path.name} is missing or not a plain file") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(descriptor)
        raise _UnfitError(f"{path.name} is not a plain file of at most {max_bytes} bytes")
    return os.fdopen(descriptor, "rb")


def _read_json(path: Path) -> Any:
    def refuse(_text: str) -> Any:
        raise _UnfitError(f"{JSON_NAME} holds a number that is not finite")

    with open_plain(path, MAX_JSON_BYTES) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        return json.loads(text, parse_constant=refuse)
    except _UnfitError:
        raise
    except (ValueError, RecursionError) as error:
        raise _UnfitError(f"{JSON_NAME} is not JSON") from error


class _Arrays:
    """The arrays of an .npz file that nobody vouches for: each header is read and its size checked before any memory is taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None
        self.zip: zipfile.ZipFile | None = None
        self.left = MAX_ARRAYS_BYTES

    def __enter__(self) -> _Arrays:
        if self.path.is_symlink() or self.path.exists():
            self.file = open_plain(self.path, MAX_ARRAYS_BYTES)
            self.zip = zipfile.ZipFile(self.file)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.zip:
            self.zip.close()
        if self.file:
            self.file.close()

    def get(self, name: str, where: str) -> NDArray[Any]:
        member = f"{name}.npy"
        if self.zip is None or member not in self.zip.namelist():
            raise _UnfitError(f"{where} names an array that is not in {ARRAYS_NAME}")
        with self.zip.open(member) as stream:
            shape, dtype, fortran = _npy_header(stream, where)
            count = math.prod(shape)
            self.left -= count * dtype.itemsize
            if self.left < 0 or count > MAX_VOXELS:
                raise _UnfitError(f"{where} is too large")
            content = stream.read(count * dtype.itemsize + 1)
        if len(content) != count * dtype.itemsize:
            raise _UnfitError(f"{where} is not as long as its header says")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise _UnfitError(f"{where} is in an unknown .npy version")
    shape, fortran, dtype = read(stream)
    if dtype not in (np.dtype(np.bool_), np.dtype(np.uint8)):
        raise _UnfitError(f"{where} must be bool or uint8")
    if len(shape) > 4 or any(side < 0 for side in shape):
        raise _UnfitError(f"{where} has an impossible shape")
    return shape, dtype, fortran


# --- reading the content ---


class _Reader:
    """A JSON object being read strictly: right types, no unknown keys, and errors that say where."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, Mapping):
            raise _UnfitError(f"{where or JSON_NAME} must be an object")
        self.raw, self.where, self.asked = raw, where, set[str]()

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def take(self, key: str) -> Any:
        self.asked.add(key)
        return self.raw.get(key)

    def text(self, key: str, longest: int = 1024) -> str:
        return _text(self.take(key), self.path(key), longest)

    def maybe_text(self, key: str, longest: int = 1024) -> str | None:
        return None if self.take(key) is None else self.text(key, longest)

    def number(self, key: str) -> float | None:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _UnfitError(f"{self.path(key)} must be a number")
        return _finite(value, self.path(key))

    def code(self, key: str) -> Code:
        value = self.take(key)
        if not isinstance(value, list) or len(value) != 3:
            raise _UnfitError(f"{self.path(key)} must be a code: [value, scheme, meaning]")
        parts = [_text(part, self.path(key), 200) for part in value]
        if not all(part.strip() for part in parts):
            raise _UnfitError(f"{self.path(key)} must be a code: [value, scheme, meaning]")
        return Code(*parts)

    def maybe_code(self, key: str) -> Code | None:
        return None if self.take(key) is None else self.code(key)

    def many(self, key: str, read: Callable[[_Reader], Any]) -> tuple[Any, ...]:
        made = []
        for number, raw in enumerate(self._list(key), 1):
            reader = _Reader(raw, f"{self.path(key)}[{number}]")
            made.append(read(reader))
            reader.finish()
        return tuple(made)

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(_text(item, self.path(key), 1024) for item in self._list(key))

    def uids(self, key: str) -> tuple[str, ...]:
        return tuple(_uid(item, self.path(key)) for item in self._list(key, 1_000_000))

    def frames(self, key: str) -> tuple[int, ...]:
        value = self._list(key, 100_000)
        if not all(isinstance(item, int) and not isinstance(item, bool) and 1 <= item < 1 << 31 for item in value):
            raise _UnfitError(f"{self.path(key)} must be frame numbers from 1")
        return tuple(value)

    def _list(self, key: str, most: int = MAX_ITEMS) -> list[Any]:
        value = self.take(key)
        value = [] if value is None else value
        if not isinstance(value, list) or len(value) > most:
            raise _UnfitError(f"{self.path(key)} must be a list of at most {most}")
        return value

    def finish(self) -> None:
        unknown = sorted(str(key) for key in self.raw if key not in self.asked)
        if unknown:
            raise _UnfitError(f"{self.where or JSON_NAME} has {len(unknown)} unknown key(s)")


def _findings(reader: _Reader, arrays: _Arrays) -> Findings:
    if reader.take("format") != FORMAT:
        raise _UnfitError(f"format must be {FORMAT}")
    findings = Findings(
        summary=reader.text("summary"),
        findings=reader.many("findings", _finding),
        segments=reader.many("segments", lambda item: _segment(item, arrays)),
        pictures=reader.many("pictures", lambda item: _picture(item, arrays)),
        used_instances=reader.uids("used_instances"),
        values=_values(reader.take("values")),
        warnings=reader.texts("warnings"),
    )
    reader.finish()
    return findings


def _finding(reader: _Reader) -> Finding:
    confidence = reader.number("confidence")
    if confidence is not None and not 0 <= confidence <= 1:
        raise _UnfitError(f"{reader.path('confidence')} must be from 0 to 1")
    tracking_id = reader.text("tracking_id", 64)
    if not tracking_id.strip():
        raise _UnfitError(f"{reader.path('tracking_id')} must not be empty")
    made = Finding(
        tracking_id=tracking_id,
        concept=reader.code("concept"),
        site=reader.maybe_code("site"),
        laterality=reader.maybe_code("laterality"),
        segment=reader.maybe_text("segment", 64),
        measurements=reader.many("measurements", _measurement),
        evaluations=reader.many("evaluations", lambda item: Evaluation(item.code("concept"), item.code("value"))),
        source_instances=reader.uids("source_instances"),
        frames=reader.frames("frames"),
        confidence=confidence,
    )
    reader.finish()
    return made


def _measurement(reader: _Reader) -> Measurement:
    value, qualifier = reader.number("value"), reader.maybe_code("qualifier")
    if value is None and qualifier is None:
        raise _UnfitError(f"{reader.where} has neither a value nor a qualifier that says why not")
    return Measurement(reader.code("concept"), value, reader.code("unit"), qualifier)


def _segment(reader: _Reader, arrays: _Arrays) -> Segment:
    mask = arrays.get(reader.text("mask", 64), reader.path("mask"))
    shape = reader.take("shape")
    if shape is not None:
        mask = _unpacked(mask, shape, reader.path("shape"))
    if mask.ndim != 3 or 0 in mask.shape:
        raise _UnfitError(f"{reader.path('mask')} must have three dimensions")
    if mask.dtype != np.bool_:
        if mask.max() > 1:
            raise _UnfitError(f"{reader.path('mask')} must hold 0 and 1 only")
        mask = mask.astype(np.bool_)
    return Segment(
        label=reader.text("label", 64),
        category=reader.code("category"),
        type=reader.code("type"),
        mask=mask,
        source_series=_uid(reader.take("source_series"), reader.path("source_series")),
        site=reader.maybe_code("site"),
    )


def _unpacked(packed: NDArray[Any], shape: Any, where: str) -> NDArray[np.bool_]:
    if not isinstance(shape, list) or len(shape) != 3:
        raise _UnfitError(f"{where} must be three whole numbers")
    if not all(isinstance(side, int) and not isinstance(side, bool) and 0 < side < 1 << 20 for side in shape):
        raise _UnfitError(f"{where} must be three whole numbers")
    count = math.prod(shape)
    if packed.dtype != np.uint8 or packed.ndim != 1 or count > MAX_VOXELS or len(packed) != (count + 7) // 8:
        raise _UnfitError(f"{where} does not fit its mask")
    return np.unpackbits(packed, count=count).view(np.bool_).reshape(shape)


def _picture(reader: _Reader, arrays: _Arrays) -> Picture:
    array = arrays.get(reader.text("array", 64), reader.path("array"))
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not min(array.shape[:2]) > 0:
        raise _UnfitError(f"{reader.path('array')} must be uint8 (rows, columns, 3)")
    if max(array.shape) > MAX_PICTURE_SIDE:
        raise _UnfitError(f"{reader.path('array')} must have at most {MAX_PICTURE_SIDE} pixels a side")
    return Picture(reader.text("title", 64), array, reader.uids("source_instances"))


def _values(raw: Any) -> dict[str, Any]:
    raw = {} if raw is None else raw
    if not isinstance(raw, dict) or len(raw) > MAX_ITEMS:
        raise _UnfitError("values must be an object")
    made: dict[str, Any] = {}
    for key, value in raw.items():
        name = _text(key, "values", 200)
        if isinstance(value, str):
            made[name] = _text(value, f"values.{name}", 1024)
        elif isinstance(value, bool | int) and abs(value) < 1 << 63:
            made[name] = value
        elif isinstance(value, float):
            made[name] = _finite(value, f"values.{name}")
        else:
            raise _UnfitError("values must be numbers, text, true or false")
    return made


# --- against the manifest ---


def _declared(findings: Findings, manifest: Manifest) -> Findings:
    """``findings`` unchanged, when everything in it was declared and hangs together."""
    units = {_key(spec.concept): spec.unit for spec in manifest.outputs if spec.kind == "measurement"}
    known = {kind: {_key(spec.concept) for spec in manifest.outputs if spec.kind == kind} for kind in _KINDS}
    labels = [segment.label for segment in findings.segments]
    _once(labels, "segment label")
    _once([finding.tracking_id for finding in findings.findings], "tracking_id")
    for number, finding in enumerate(findings.findings, 1):
        where = f"findings[{number}]"
        _known(finding.concept, known["finding"], f"{where}.concept")
        if finding.segment is not None and finding.segment not in labels:
            raise _UnfitError(f"{where}.segment names a segment that is not in the answer")
        for measurement in finding.measurements:
            _known(measurement.concept, known["measurement"], f"{where}.measurements")
            unit = units[_key(measurement.concept)]
            if unit is None or _key(unit) != _key(measurement.unit):
                raise _UnfitError(f"{where}.measurements has a unit that the manifest does not declare for it")
        for evaluation in finding.evaluations:
            _known(evaluation.concept, known["evaluation"], f"{where}.evaluations")
    for number, segment in enumerate(findings.segments, 1):
        _known(segment.type, known["segment"], f"segments[{number}].type")
    _one_shape_per_series(findings)
    return findings


_KINDS = ("finding", "measurement", "evaluation", "segment")


def _key(code: Code) -> tuple[str, str]:
    return (code.value, code.scheme)


def _known(code: Code, declared: set[tuple[str, str]], where: str) -> None:
    if _key(code) not in declared:
        raise _UnfitError(f"{where} holds a concept that the manifest does not declare")


def _once(names: list[str], what: str) -> None:
    if len(set(names)) != len(names):
        raise _UnfitError(f"a {what} is there twice")


def _one_shape_per_series(findings: Findings) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for segment in findings.segments:
        if shapes.setdefault(segment.source_series, segment.mask.shape) != segment.mask.shape:
            raise _UnfitError("masks of one series have different shapes")


# --- small things ---


def _segment_as_json(segment: Segment) -> dict[str, Any]:
    return {
        "label": segment.label,
        "category": segment.category.as_list(),
        "type": segment.type.as_list(),
        "site": _code_as_json(segment.site),
        "source_series": segment.source_series,
    }


def _code_as_json(code: Code | None) -> list[str] | None:
    return code.as_list() if code else None


def _scalar(value: Any) -> Any:
    """numpy's numbers as Python's, so that JSON can keep them."""
    return value.item() if isinstance(value, np.generic) else value


def _text(value: Any, where: str, longest: int) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise _UnfitError(f"{where} must be text of at most {longest} characters")
    if any((ord(letter) < 32 and letter not in "\n\t") or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise _UnfitError(f"{where} must not hold control characters")
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError as error:
        raise _UnfitError(f"{where} must be a finite number") from error
    if not math.isfinite(number):
        raise _UnfitError(f"{where} must be a finite number")
    return number


def _uid(value: Any, where: str) -> str:
    text = _text(value, where, 64)
    if not UID.match(text):
        raise _UnfitError(f"{where} must be a DICOM UID")
    return text
