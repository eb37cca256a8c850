"""Checks a result before it leaves: the checklist, the tables of the standard, and the validators on this machine.

Messages name tags and UIDs, never a value of the patient or study.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from caregrid.results import _check_carriers, _check_object, _check_seg, _check_sr, _tools
from caregrid.results._common import IDENTITY_TYPE_2, IDENTITY_TYPE_3
from caregrid.results._subject import Check, Subject

#: (level, line of the checklist, check). Level A holds the object back, level B is a warning.
CHECKS: tuple[tuple[str, str, Check], ...] = (
    *_check_object.CHECKS,
    *_check_seg.CHECKS,
    *_check_sr.CHECKS,
    *_check_carriers.CHECKS,
)

#: Asked of objects that an algorithm made itself too.
_OF_ANYONE = (
    _check_object.check_identity,
    _check_object.check_uids,
    _check_object.check_class,
    _check_object.check_character_set,
    _check_seg.geometry,
    _check_seg.pixels,
)

#: What the checks read of a source instance.
_NEEDED = (
    *IDENTITY_TYPE_2,
    *IDENTITY_TYPE_3,
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
)


@dataclass(frozen=True)
class Validation:
    """The outcome. errors hold the object back; warnings are kept with it. checked_by: what looked at it."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    checked_by: tuple[str, ...] = ("caregrid",)

    @property
    def ok(self) -> bool:
        """Whether the object may leave."""
        return not self.errors


def validate(
    result: Path | Dataset,
    sources: Sequence[Path | Dataset] = (),
    companions: Sequence[Dataset] = (),
    tools: bool = True,
    ours: bool = True,
) -> Validation:
    """Check one SEG, SR, SC or KOS object.

    sources: the instances the algorithm read (files as received), for what must be copied from them. companions: other
    results of the run, for what must agree between them. tools: also ask dcmtk and dciodvfy where they are installed.
    ours: False for an object that an algorithm made itself. Then whose it is, where it lies and whether it can be read are held
    against it; that it is not made as ours are is a warning.
    """
    raw = _bytes(result)
    try:
        dataset = dcmread(BytesIO(raw))
    except (InvalidDicomError, EOFError, ValueError, OSError):
        return Validation(errors=("6.1.9: not a readable DICOM file",))
    headers = tuple(source_header(item) for item in sources)
    subject = Subject(dataset, raw, headers, tuple(companions))
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(_tools.ask, subject.sop_class, result if isinstance(result, Path) else raw) if tools else None
        said: dict[str, list[str]] = {"A": [], "B": []}
        for level, line, check in CHECKS:
            said[level if ours or check in _OF_ANYONE else "B"] += [f"{line}: {fault}" for fault in check(subject)]
        opinions = asking.result() if asking else []
    for opinion in opinions:
        said["A" if ours or opinion.tool in _tools.READERS else "B"] += [f"{opinion.tool}: {fault}" for fault in opinion.errors]
        said["B"] += [f"{opinion.tool}: {remark}" for remark in opinion.warnings]
    return Validation(tuple(said["A"]), tuple(said["B"]), ("caregrid", *(opinion.tool for opinion in opinions)))


def source_header(source: Path | Dataset) -> Dataset:
    """What the checks need of a source."""
    if isinstance(source, Dataset):
        return source
    return dcmread(source, stop_before_pixels=True, specific_tags=list(_NEEDED))


def _bytes(result: Path | Dataset) -> bytes:
    if isinstance(result, Path):
        return result.read_bytes()
    buffer = BytesIO()
    result.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
