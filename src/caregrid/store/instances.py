"""Received instances: kept as bytes on disk and rows in the index before anybody is told "success".

Order of a receipt: write to ``tmp/`` → fdatasync → rename → fsync of the folder → commit of the index. An object that was
promised is therefore never lost, and one that was not promised leaves at most a file in ``tmp/`` that ``sweep`` removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import sqlalchemy as sa
from pydicom.dataset import FileMetaDataset
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import IntakeError, MalformedObject, SopMismatch, StoreFull
from caregrid.store import audit
from caregrid.store.database import reading, writing
from caregrid.store.tables import instance, now, quarantine, rejection, series, study

IMPLEMENTATION_CLASS_UID = "2.25.300180474285829414929262398764329170981"
_TAGS = [
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "NumberOfFrames",
    "Rows", "Columns", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
    "StudyDescription", "ReferringPhysicianName", "Modality", "SeriesNumber", "SeriesDescription", "BodyPartExamined", "StationName",
]  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """An object understood: its header, its data set's bytes and its transfer syntax."""

    header: pydicom.Dataset
    whole: bytes
    data_offset: int
    transfer_syntax_uid: str

    @property
    def sha256(self) -> str:
        """Hash of the data set alone, so that the same object by DIMSE and by STOW compares equal."""
        return hashlib.sha256(memoryview(self.whole)[self.data_offset :]).hexdigest()


class InstanceStore:
    """The folder of received files and their index. Safe for several threads and processes at once."""

    def __init__(self, engine: sa.Engine, folder: Path, free_bytes_floor: int = 500 << 20) -> None:
        self.engine, self.folder, self.floor = engine, folder, free_bytes_floor
        for name in ("tmp", "instances", "quarantine", "results"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def receive(self, incoming: Incoming) -> Receipt:
        """Keep an object. Raises MalformedObject or SopMismatch (it is in quarantine then) or StoreFull (nothing is kept)."""
        if shutil.disk_usage(self.folder).free < self.floor:
            raise StoreFull()
        try:
            read = _understand(incoming)
        except IntakeError as error:
            self._quarantine(incoming, error)
            raise
        try:
            return self._keep(incoming.source, read)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull() from error
            raise

    def path(self, row_or_relative: str) -> Path:
        """The file of an instance row's ``path``."""
        return self.folder / row_or_relative

    def sweep(self) -> int:
        """Remove what an interrupted receipt left in ``tmp/``; returns how many files."""
        left = [file for file in (self.folder / "tmp").iterdir() if file.is_file()]
        for file in left:
            file.unlink()
        return len(left)

    def _keep(self, source: Source, read: _Read) -> Receipt:
        header, sha = read.header, read.sha256
        uid, study_uid = str(header.SOPInstanceUID), str(header.StudyInstanceUID)
        with reading(self.engine) as connection:
            known = connection.execute(sa.select(instance.c.sha256).where(instance.c.sop_instance_uid == uid)).scalars().all()
        if sha in known:
            return Receipt("duplicate", str(header.SOPClassUID), uid, study_uid)
        relative = f"instances/{sha[:2]}/{uid}-{sha[:16]}.dcm"
        self._write(relative, read.whole)
        with writing(self.engine) as connection:
            copies = connection.execute(
                sa.select(instance.c.copy, instance.c.sha256).where(instance.c.sop_instance_uid == uid)
            ).all()
            if any(row.sha256 == sha for row in copies):
                return Receipt("duplicate", str(header.SOPClassUID), uid, study_uid)
            _index(connection, source, read, sha, relative, len(copies))
        return Receipt("conflict" if copies else "stored", str(header.SOPClassUID), uid, study_uid)

    def _write(self, relative: str, content: bytes) -> None:
        final = self.folder / relative
        final.parent.mkdir(exist_ok=True)
        half = self.folder / "tmp" / secrets.token_hex(16)
        handle = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fdatasync(handle)
        except OSError:
            half.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        os.rename(half, final)
        _sync_folder(final.parent)
        _sync_folder(final.parent.parent)

    def _quarantine(self, incoming: Incoming, error: IntakeError) -> None:
        content = b"".join(incoming.chunks)
        sha = hashlib.sha256(content).hexdigest()
        relative = f"quarantine/{sha}.bin"
        self._write(relative, content)
        source = incoming.source
        with writing(self.engine) as connection:
            connection.execute(
                quarantine.insert().values(
                    received_at=now(),
                    protocol=source.protocol,
                    calling_ae=source.calling_ae,
                    called_ae=source.called_ae,
                    address=source.address,
                    sop_instance_uid=incoming.sop_instance_uid,
                    reason=error.message,
                    error=type(error).__name__,
                    sha256=sha,
                    size=len(content),
                    path=relative,
                )
            )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _understand(incoming: Incoming) -> _Read:
    content = b"".join(incoming.chunks)
    meta_length = 0
    if not incoming.part10:
        meta = _file_meta(incoming)
        content, meta_length = meta + content, len(meta)
    try:
        file = BytesIO(content)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
        whole = pydicom.dcmread(BytesIO(content), defer_size=1024)
    except Exception as error:  # pydicom raises many kinds on hostile input; all of them mean the same to a sender
        raise MalformedObject(reason=f"{type(error).__name__} while reading it") from error
    if incoming.part10:
        meta_length = 128 + 4 + 12 + int(header.file_meta.get("FileMetaInformationGroupLength", 0) or 0)
    del whole
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not UID(str(header.get(keyword, ""))).is_valid or not header.get(keyword):
            raise MalformedObject(reason=f"{keyword} is missing or not a UID")
    if incoming.sop_instance_uid and incoming.sop_instance_uid != header.SOPInstanceUID:
        raise SopMismatch(reason="SOP Instance UID differs")
    if incoming.sop_class_uid and incoming.sop_class_uid != header.SOPClassUID:
        raise SopMismatch(reason="SOP Class UID differs")
    return _Read(header, content, meta_length, str(header.file_meta.TransferSyntaxUID))


def _file_meta(incoming: Incoming) -> bytes:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = incoming.sop_class_uid
    meta.MediaStorageSOPInstanceUID = incoming.sop_instance_uid
    meta.TransferSyntaxUID = incoming.transfer_syntax_uid
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    out = BytesIO()
    out.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(out, meta)  # type: ignore[arg-type]
    return out.getvalue()


def _int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _index(connection: sa.Connection, source: Source, read: _Read, sha: str, path: str, copy: int) -> None:
    header, moment = read.header, now()
    uid, study_uid, series_uid = str(header.SOPInstanceUID), str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
    sender = {"protocol": source.protocol, "calling_ae": source.calling_ae, "called_ae": source.called_ae, "address": source.address}
    connection.execute(
        instance.insert().values(
            sop_instance_uid=uid,
            copy=copy,
            study_instance_uid=study_uid,
            series_instance_uid=series_uid,
            sop_class_uid=str(header.SOPClassUID),
            transfer_syntax_uid=read.transfer_syntax_uid,
            instance_number=_int(header.get("InstanceNumber")),
            number_of_frames=_int(header.get("NumberOfFrames")),
            rows=_int(header.get("Rows")),
            columns=_int(header.get("Columns")),
            sha256=sha,
            size=len(read.whole),
            path=path,
            received_at=moment,
            **sender,
        )
    )
    new_series = 0
    if copy == 0:
        changed = connection.execute(
            series.update()
            .where(series.c.series_instance_uid == series_uid)
            .values(number_of_instances=series.c.number_of_instances + 1)
        )
        if changed.rowcount == 0:
            new_series = 1
            connection.execute(
                series.insert().values(
                    series_instance_uid=series_uid,
                    study_instance_uid=study_uid,
                    modality=str(header.get("Modality", "")),
                    series_number=_int(header.get("SeriesNumber")),
                    series_description=str(header.get("SeriesDescription", "")),
                    body_part_examined=str(header.get("BodyPartExamined", "")),
                    station_name=str(header.get("StationName", "")),
                    number_of_instances=1,
                    first_received_at=moment,
                )
            )
    _touch_study(connection, header, sender, moment, new_series, copy)


def _touch_study(
    connection: sa.Connection, header: pydicom.Dataset, sender: dict[str, str], moment: str, new_series: int, copy: int
) -> None:
    study_uid, modality = str(header.StudyInstanceUID), str(header.get("Modality", ""))
    row = connection.execute(sa.select(study).where(study.c.study_instance_uid == study_uid)).mappings().first()
    if row is None:
        connection.execute(
            study.insert().values(
                study_instance_uid=study_uid,
                state="receiving",
                patient_id=str(header.get("PatientID", "")),
                patient_name=str(header.get("PatientName", "")),
                patient_birth_date=str(header.get("PatientBirthDate", "")),
                patient_sex=str(header.get("PatientSex", "")),
                accession_number=str(header.get("AccessionNumber", "")),
                study_id=str(header.get("StudyID", "")),
                study_date=str(header.get("StudyDate", "")),
                study_time=str(header.get("StudyTime", "")),
                study_description=str(header.get("StudyDescription", "")),
                referring_physician_name=str(header.get("ReferringPhysicianName", "")),
                modalities=modality,
                number_of_series=1,
                number_of_instances=1,
                first_received_at=moment,
                last_received_at=moment,
                **sender,
            )
        )
        return
    modalities = sorted({*row["modalities"].split("\\"), modality} - {""})
    connection.execute(
        study.update()
        .where(study.c.study_instance_uid == study_uid)
        .values(
            modalities="\\".join(modalities),
            number_of_series=study.c.number_of_series + new_series,
            number_of_instances=study.c.number_of_instances + int(copy == 0),
            last_received_at=moment,
            late_instances=study.c.late_instances + int(row["state"] not in ("receiving", "held")),
            conflicts=study.c.conflicts + int(copy > 0),
        )
    )
    if copy:
        audit.append(
            connection,
            who="caregrid",
            what="conflicting instance kept",
            subject=f"study:{study_uid}",
            why="the same SOP Instance UID came with other bytes",
            detail={"object": str(header.SOPInstanceUID), "copy": copy},
        )


def record_rejection(engine: sa.Engine, source: Source, what: str, reason: str) -> None:
    """Note an association or request that was turned away: who, what, why."""
    with writing(engine) as connection:
        connection.execute(
            rejection.insert().values(
                at=now(),
                protocol=source.protocol,
                calling_ae=source.calling_ae,
                called_ae=source.called_ae,
                address=source.address,
                what=what,
                reason=reason,
            )
        )
