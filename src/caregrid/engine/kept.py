"""What a run has made, kept on disk: the findings as the algorithm gave them and the DICOM objects, each written once.

Layout under the store: ``results/<run>/<task>/findings/`` and ``results/<run>/<task>/<SOP Instance UID>.dcm``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset

from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Finding, Findings
from caregrid.errors import ResultInvalid
from caregrid.results import Apart, ResultContext, Validation, each_result, read_header, validate, write_results
from caregrid.runtime.exchange import read_findings, write_findings
from caregrid.store.files import sync_path

_SAFE = re.compile(r"[^A-Za-z0-9_.-]")
_UID = re.compile(r"[0-9.]{1,64}")
_FINISHED = "finished.json"

#: Modality of an object that an algorithm made itself → the format it counts as.
_KINDS = {"SEG": "dicom_seg", "SR": "dicom_sr", "KO": "dicom_kos"}


@dataclass(frozen=True)
class MadeResult:
    """A DICOM object on disk. path is relative to the store's folder. errors hold it back."""

    kind: str
    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    path: str
    sha256: str
    size: int
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


class KeptResults:
    """Reads and writes the results folder of the store."""

    def __init__(self, store: Path) -> None:
        self.store = store

    def folder(self, run_id: str, task_id: str) -> Path:
        """The folder of one task of one run."""
        return self.store / "results" / _SAFE.sub("_", run_id) / _SAFE.sub("_", task_id)

    def findings(self, folder: Path, manifest: Manifest) -> Findings | None:
        """The kept findings; None when the algorithm has not finished there yet."""
        return read_findings(folder / "findings", manifest) if (folder / "findings").is_dir() else None

    def keep_findings(self, folder: Path, findings: Findings, objects: Sequence[Path] = ()) -> None:
        """Keep the findings whole or not at all. objects: DICOM files that the algorithm made itself (runner map)."""
        folder.mkdir(parents=True, exist_ok=True)
        half = folder / "findings.part"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        write_findings(findings, half)
        (half / _FINISHED).write_text(json.dumps({"finished_at": datetime.now(UTC).isoformat()}), encoding="utf-8")
        for number, path in enumerate(objects):
            shutil.copyfile(path, half / f"object-{number}.dcm")
        for file in half.iterdir():
            sync_path(file)
        half.rename(folder / "findings")
        sync_path(folder)

    def finished_at(self, folder: Path) -> datetime:
        """When the algorithm had finished: the creation time of its results, the same at every retry."""
        said = json.loads((folder / "findings" / _FINISHED).read_bytes())
        return datetime.fromisoformat(said["finished_at"])

    def write(
        self, folder: Path, context: ResultContext, findings: Findings, formats: Sequence[str], apart: Apart | None = None
    ) -> list[MadeResult]:
        """Write and validate the DICOM objects of a task; an object that is there already is left as it is.

        Each is put on disk and checked while the next is made; a SEG in the process ``apart`` where there is one.
        """
        own = sorted((folder / "findings").glob("object-*.dcm"))
        if own:
            return [self._own_object(folder, path, context) for path in own]
        sources = _sources(context)
        checked: list[Future[MadeResult]] = []
        companions: list[Dataset] = []
        with ThreadPoolExecutor(4) as pool:
            for kind, dataset in each_result(context, findings, formats):
                check = _check(sources, companions)
                if apart is not None and kind == "dicom_seg":
                    check = _check_apart(apart, context.source_files)
                path, half = self._half(folder, dataset)
                checked.append(pool.submit(self._kept, kind, path, half, check))
                companions.append(dataset)
            return [each.result() for each in checked]

    def _own_object(self, folder: Path, path: Path, context: ResultContext) -> MadeResult:
        """An object that the algorithm made itself: held against the study it must belong to, and delivered byte for byte."""
        dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        kind, uid = _KINDS.get(str(dataset.get("Modality", "")), "dicom_sc"), str(dataset.get("SOPInstanceUID", ""))
        if not _UID.fullmatch(uid):
            raise ResultInvalid(kind=kind, reason="the algorithm made an object without a SOP Instance UID")
        kept = folder / f"{uid}.dcm"
        half = None if kept.exists() else kept.with_suffix(".part")
        if half is not None:
            shutil.copyfile(path, half)
        return self._kept(kind, kept, half, lambda each: validate(each, _sources(context), ours=False))

    def write_verified(self, folder: Path, context: ResultContext, findings: Findings) -> MadeResult:
        """The SR with the reviewer's verification; it refers to the segments that the task made already."""
        segmentations = [each for each in map(read_header, sorted(folder.glob("*.dcm"))) if each.Modality == "SEG"]
        ((kind, dataset),) = write_results(context, findings, ("dicom_sr",), segmentations)
        path, half = self._half(folder, dataset)
        return self._kept(kind, path, half, _check(_sources(context), segmentations))

    def keep(self, folder: Path, kind: str, dataset: Dataset) -> MadeResult:
        """Put one object on disk and validate what lies there, by itself (a rejection note has no source that it was made of)."""
        path, half = self._half(folder, dataset)
        return self._kept(kind, path, half, validate)

    def _half(self, folder: Path, dataset: Dataset) -> tuple[Path, Path | None]:
        """The object's own path, and the file it was written to first; None when the object is there already."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{dataset.SOPInstanceUID}.dcm"
        if path.exists():
            return path, None
        half = path.with_suffix(".part")
        dataset.save_as(half, enforce_file_format=True)
        return path, half

    def _kept(self, kind: str, path: Path, half: Path | None, check: Callable[[Path], Validation]) -> MadeResult:
        """Make a half-written object whole (fsync, rename, fsync) and validate what lies on disk."""
        if half is not None:
            sync_path(half)
            os.replace(half, path)
            sync_path(path.parent)
        verdict = check(path)
        meta = pydicom.dcmread(path, stop_before_pixels=True)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return MadeResult(
            kind=kind,
            sop_instance_uid=str(meta.SOPInstanceUID),
            sop_class_uid=str(meta.SOPClassUID),
            series_instance_uid=str(meta.SeriesInstanceUID),
            transfer_syntax_uid=str(meta.file_meta.TransferSyntaxUID),
            path=str(path.relative_to(self.store)),
            sha256=sha256,
            size=path.stat().st_size,
            errors=tuple(verdict.errors),
            warnings=tuple(verdict.warnings),
        )

    def corrected(self, findings: Findings, corrections: Mapping[str, Mapping[str, Any]]) -> Findings:
        """The findings with a clinician's values in place: tracking id → measurement's meaning → value."""
        changed = tuple(_correct(each, corrections.get(each.tracking_id, {})) for each in findings.findings)
        return dataclasses.replace(findings, findings=changed)


def _sources(context: ResultContext) -> list[Path | Dataset]:
    """What a result is held against: whose it must be is read from the first source again, the rest was read already."""
    return [context.source_files[0], *context.headers[1:]]


def _check(sources: Sequence[Path | Dataset], companions: Sequence[Dataset]) -> Callable[[Path], Validation]:
    others = tuple(companions)
    return lambda path: validate(path, sources, others)


def _check_apart(apart: Apart, sources: Sequence[Path]) -> Callable[[Path], Validation]:
    return lambda path: apart.validate(path, sources)


def _correct(finding: Finding, values: Mapping[str, Any]) -> Finding:
    measurements = tuple(
        dataclasses.replace(each, value=float(values[each.concept.meaning]), qualifier=None)
        if each.concept.meaning in values
        else each
        for each in finding.measurements
    )
    return dataclasses.replace(finding, measurements=measurements)
