"""A scanner: fresh studies from a real slice, and a sender that keeps on until the receiver has said success."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from pynetdicom import AE


@lru_cache(maxsize=1)
def _slice() -> pydicom.Dataset:
    return pydicom.dcmread(get_testdata_file("CT_small.dcm"))


def new_study(instances: int = 1, **changes: object) -> list[pydicom.Dataset]:
    """A study of one series with fresh UIDs, its slices 5 mm apart. changes: keyword → value in every instance."""
    study_uid, series_uid, frame = generate_uid(), generate_uid(), generate_uid()
    made = []
    for number in range(instances):
        each = copy.deepcopy(_slice())
        each.StudyInstanceUID, each.SeriesInstanceUID, each.FrameOfReferenceUID = study_uid, series_uid, frame
        each.SOPInstanceUID = each.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        each.InstanceNumber = number + 1
        each.ImagePositionPatient = [-158.1, -179.0, -75.0 + 5.0 * number]
        for keyword, value in changes.items():
            setattr(each, keyword, value)
        made.append(each)
    return made


@dataclass
class Scanner:
    """Sends to one receiver. ``acknowledged``: SOP Instance UIDs answered with 0000."""

    port: int
    calling: str = "CT1"
    called: str = "CAREGRID"
    host: str = "127.0.0.1"
    acknowledged: set[str] = field(default_factory=set)
    refused: list[tuple[str, int]] = field(default_factory=list)
    repeats: int = 0

    def send(self, datasets: Sequence[pydicom.Dataset]) -> list[int]:
        """Send once, in one association; the status of each, -1 where there was no answer."""
        ae = AE(self.calling)
        ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = 15
        for sop_class, syntax in {(each.SOPClassUID, each.file_meta.TransferSyntaxUID) for each in datasets}:
            ae.add_requested_context(sop_class, syntax)
        association = ae.associate(self.host, self.port, ae_title=self.called)
        if not association.is_established:
            return [-1] * len(datasets)
        statuses = [self._one(association, each) for each in datasets]
        if association.is_established:
            association.release()
        return statuses

    def _one(self, association: object, dataset: pydicom.Dataset) -> int:
        try:
            answer = association.send_c_store(dataset)  # type: ignore[attr-defined]
        except (RuntimeError, ValueError):
            return -1
        status = int(answer.Status) if "Status" in answer else -1
        if status == 0:
            self.acknowledged.add(str(dataset.SOPInstanceUID))
        elif status > 0:
            self.refused.append((str(dataset.SOPInstanceUID), status))
        return status

    def insist(self, datasets: Sequence[pydicom.Dataset], seconds: float = 120) -> None:
        """Send, and send again what was not acknowledged, as a modality does."""
        deadline = time.monotonic() + seconds
        left = list(datasets)
        while left:
            left = [each for each, status in zip(left, self.send(left), strict=True) if status != 0]
            if left:
                self.repeats += 1
                assert time.monotonic() < deadline, f"{len(left)} objects were never acknowledged"
                time.sleep(0.2)


def send_all(scanners: Iterable[tuple[Scanner, Sequence[Sequence[pydicom.Dataset]]]], pause: float = 0.0) -> None:
    """Several scanners at once, each sending its studies one after the other."""

    def work(scanner: Scanner, studies: Sequence[Sequence[pydicom.Dataset]]) -> None:
        for study in studies:
            try:
                scanner.insist(study)
            except AssertionError as error:
                problems.append(str(error))
                return
            time.sleep(pause)

    problems: list[str] = []
    threads = [threading.Thread(target=work, args=each) for each in scanners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
