"""What a run has made, kept on disk: the findings as the algorithm gave them and the DICOM objects, each written once.

Layout under the store: ``results/<run>/<task>/findings/`` and ``results/<run>/<task>/<SOP Instance UID>.dcm``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom import Dataset

from caregrid.domain.algorithm import Manifest
from caregrid.domain.findings import Finding, Findings
from caregrid.results import ResultContext, validate, write_results
from caregrid.runtime.exchange import read_findings, write_findings

_SAFE = re.compile(r"[^A-Za-z0-9_.-]")


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
        for number, path in enumerate(objects):
            shutil.copyfile(path, half / f"object-{number}.dcm")
        for file in half.iterdir():
            _sync(file)
        half.rename(folder / "findings")
        _sync(folder)

    def write(self, folder: Path, context: ResultContext, findings: Findings, formats: Sequence[str]) -> list[MadeResult]:
        """Write and validate the DICOM objects of a task; an object that is there already is left as it is."""
        own = [self._own_object(folder, path) for path in sorted((folder / "findings").glob("object-*.dcm"))]
        if own:
            return own
        return [self.keep(folder, kind, dataset) for kind, dataset in write_results(context, findings, formats)]

    def _own_object(self, folder: Path, path: Path) -> MadeResult:
        """An object that the algorithm made itself: judged like ours, and delivered as it is."""
        dataset = pydicom.dcmread(path)
        kind = {"SEG": "dicom_seg", "SR": "dicom_sr", "KO": "dicom_kos"}.get(str(dataset.Modality), "dicom_sc")
        return self.keep(folder, kind, dataset)

    def write_verified(self, folder: Path, context: ResultContext, findings: Findings) -> MadeResult:
        """The SR with the reviewer's verification."""
        made = [(kind, dataset) for kind, dataset in write_results(context, findings, ("dicom_sr",)) if kind == "dicom_sr"]
        ((kind, dataset),) = made
        return self.keep(folder, kind, dataset)

    def keep(self, folder: Path, kind: str, dataset: Dataset) -> MadeResult:
        """Put one object on disk (write, fsync, rename, fsync) and validate what lies there."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{dataset.SOPInstanceUID}.dcm"
        if not path.exists():
            half = path.with_suffix(".part")
            dataset.save_as(half, enforce_file_format=True)
            _sync(half)
            os.replace(half, path)
            _sync(folder)
        meta = pydicom.dcmread(path, stop_before_pixels=True)
        verdict = validate(path)
        return MadeResult(
            kind=kind,
            sop_instance_uid=str(meta.SOPInstanceUID),
            sop_class_uid=str(meta.SOPClassUID),
            series_instance_uid=str(meta.SeriesInstanceUID),
            transfer_syntax_uid=str(meta.file_meta.TransferSyntaxUID),
            path=str(path.relative_to(self.store)),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size=path.stat().st_size,
            errors=tuple(verdict.errors),
            warnings=tuple(verdict.warnings),
        )

    def corrected(self, findings: Findings, corrections: Mapping[str, Mapping[str, Any]]) -> Findings:
        """The findings with a clinician's values in place: tracking id → measurement's meaning → value."""
        changed = tuple(_correct(each, corrections.get(each.tracking_id, {})) for each in findings.findings)
        return dataclasses.replace(findings, findings=changed)


def _correct(finding: Finding, values: Mapping[str, Any]) -> Finding:
    measurements = tuple(
        dataclasses.replace(each, value=float(values[each.concept.meaning]), qualifier=None)
        if each.concept.meaning in values
        else each
        for each in finding.measurements
    )
    return dataclasses.replace(finding, measurements=measurements)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
