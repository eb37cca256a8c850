"""The index as DICOMweb sees it: received instances (first copies) and valid results of ours, as one set of studies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pydicom
import sqlalchemy as sa

from caregrid.store.tables import instance, result, series, study

#: ``result.kind`` → Modality of the objects of that kind.
MADE_MODALITIES = {"dicom_seg": "SEG", "dicom_sr": "SR", "dicom_sc": "OT", "dicom_kos": "KO"}


@dataclass(frozen=True)
class Attribute:
    """An attribute a search returns. vr: its VR, or MULTI for several CS values; column: where the index has it."""

    keyword: str
    tag: str
    vr: str
    matched: bool = True

    def as_json(self, value: Any) -> dict[str, Any]:
        """The element in DICOM JSON (PS3.18 F.2); without Value when empty."""
        if value is None or value == "":
            return {"vr": self.vr.replace("MULTI", "CS")}
        if self.vr == "MULTI":
            return {"vr": "CS", "Value": sorted({each for each in str(value).split("\\") if each})}
        if self.vr == "PN":
            groups = zip(("Alphabetic", "Ideographic", "Phonetic"), str(value).split("="), strict=False)
            return {"vr": "PN", "Value": [{name: text for name, text in groups if text}]}
        return {"vr": self.vr, "Value": [int(value) if self.vr in ("IS", "US") else str(value)]}


LEVELS: dict[str, tuple[Attribute, ...]] = {
    "study": (
        Attribute("StudyDate", "00080020", "DA"),
        Attribute("StudyTime", "00080030", "TM"),
        Attribute("AccessionNumber", "00080050", "SH"),
        Attribute("ModalitiesInStudy", "00080061", "MULTI"),
        Attribute("ReferringPhysicianName", "00080090", "PN"),
        Attribute("StudyDescription", "00081030", "LO"),
        Attribute("PatientName", "00100010", "PN"),
        Attribute("PatientID", "00100020", "LO"),
        Attribute("PatientBirthDate", "00100030", "DA"),
        Attribute("PatientSex", "00100040", "CS"),
        Attribute("StudyInstanceUID", "0020000D", "UI"),
        Attribute("StudyID", "00200010", "SH"),
        Attribute("NumberOfStudyRelatedSeries", "00201206", "IS", matched=False),
        Attribute("NumberOfStudyRelatedInstances", "00201208", "IS", matched=False),
    ),
    "series": (
        Attribute("Modality", "00080060", "CS"),
        Attribute("SeriesDescription", "0008103E", "LO"),
        Attribute("StationName", "00081010", "SH"),
        Attribute("BodyPartExamined", "00180015", "CS"),
        Attribute("SeriesInstanceUID", "0020000E", "UI"),
        Attribute("SeriesNumber", "00200011", "IS"),
        Attribute("NumberOfSeriesRelatedInstances", "00201209", "IS", matched=False),
        Attribute("StudyInstanceUID", "0020000D", "UI"),
    ),
    "instance": (
        Attribute("SOPClassUID", "00080016", "UI"),
        Attribute("SOPInstanceUID", "00080018", "UI"),
        Attribute("AvailableTransferSyntaxUID", "00083002", "UI", matched=False),
        Attribute("InstanceNumber", "00200013", "IS"),
        Attribute("NumberOfFrames", "00280008", "IS", matched=False),
        Attribute("Rows", "00280010", "US", matched=False),
        Attribute("Columns", "00280011", "US", matched=False),
        Attribute("SeriesInstanceUID", "0020000E", "UI"),
        Attribute("StudyInstanceUID", "0020000D", "UI"),
    ),
}

_ABOVE = {"study": ("study",), "series": ("series", "study"), "instance": ("instance", "series", "study")}


def matchable(level: str) -> list[Attribute]:
    """The attributes a search at ``level`` can match on: its own and those of the levels above."""
    return [attribute for name in _ABOVE[level] for attribute in LEVELS[name] if attribute.matched]


@dataclass(frozen=True)
class Kept:
    """An object that can be retrieved. path is relative to the store's folder."""

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    path: str


def find(connection: sa.Connection, study_uid: str, series_uid: str = "", instance_uid: str = "") -> list[Kept]:
    """The objects of a study, series or instance in the order of series and instance number; empty when there are none."""
    objects = _objects(study_uid, series_uid)
    query = sa.select(
        *(objects.c[name] for name in Kept.__dataclass_fields__),
    ).order_by(objects.c.series_instance_uid, objects.c.instance_number, objects.c.sop_instance_uid)
    if instance_uid:
        query = query.where(objects.c.sop_instance_uid == instance_uid)
    return [Kept(*row) for row in connection.execute(query)]


def _objects(study_uid: str = "", series_uid: str = "") -> sa.Subquery:
    """Received first copies, and valid results that did not also come in by a door; nothing that was withdrawn."""
    names = ("sop_instance_uid", "sop_class_uid", "series_instance_uid", "study_instance_uid", "transfer_syntax_uid", "path")
    numbers = ("instance_number", "number_of_frames", "rows", "columns")
    withdrawn = sa.exists().where(result.c.sop_instance_uid == instance.c.sop_instance_uid, result.c.state == "withdrawn")
    came_back = sa.exists().where(instance.c.sop_instance_uid == result.c.sop_instance_uid)
    received = sa.select(*(instance.c[name] for name in (*names, *numbers)), sa.literal("").label("kind")).where(
        instance.c.copy == 0, ~withdrawn
    )
    made = sa.select(
        *(result.c[name] for name in names), *(sa.cast(sa.null(), sa.Integer).label(name) for name in numbers), result.c.kind
    ).where(result.c.state == "valid", ~came_back)
    for uid, name in ((study_uid, "study_instance_uid"), (series_uid, "series_instance_uid")):
        if uid:
            received, made = received.where(instance.c[name] == uid), made.where(result.c[name] == uid)
    return sa.union_all(received, made).subquery("objects")


def _all_series(study_uid: str = "", series_uid: str = "") -> sa.Subquery:
    objects = _objects(study_uid, series_uid)
    counted = sa.select(
        objects.c.series_instance_uid,
        objects.c.study_instance_uid,
        sa.func.count().label("objects"),
        sa.func.max(objects.c.kind).label("kind"),
        sa.func.min(objects.c.path).label("path"),
    ).group_by(objects.c.series_instance_uid, objects.c.study_instance_uid)
    inner = counted.subquery("counted")
    modality = sa.case(MADE_MODALITIES, value=inner.c.kind, else_="")
    return (
        sa.select(
            inner,
            sa.func.coalesce(series.c.modality, modality).label("modality"),
            series.c.series_number,
            sa.func.coalesce(series.c.series_description, "").label("series_description"),
            sa.func.coalesce(series.c.body_part_examined, "").label("body_part_examined"),
            sa.func.coalesce(series.c.station_name, "").label("station_name"),
        )
        .select_from(inner.outerjoin(series, series.c.series_instance_uid == inner.c.series_instance_uid))
        .subquery("all_series")
    )


Columns = dict[str, sa.ColumnElement[Any]]


def statement(level: str, study_uid: str, series_uid: str) -> tuple[sa.Select[Any], Columns]:
    """The rows of ``level``, below a study or series where given, and the column of every attribute that can be matched.

    Rows carry ``kind`` and ``path`` for objects of ours, so that ``complete`` can fill in what the index does not hold.
    """
    columns = _study_columns()
    source: sa.FromClause = study
    order: list[sa.ColumnElement[Any]] = [study.c.study_date.desc(), study.c.study_time.desc(), study.c.study_instance_uid]
    extra: list[sa.ColumnElement[Any]] = []
    if level != "study":
        every = _all_series(study_uid, series_uid)
        columns |= _series_columns(every)
        source = source.join(every, every.c.study_instance_uid == study.c.study_instance_uid)
        order += [every.c.series_number, every.c.series_instance_uid]
        extra = [every.c.kind, every.c.path]
    if level == "instance":
        objects = _objects(study_uid, series_uid)
        columns |= _instance_columns(objects)
        source = source.join(objects, objects.c.series_instance_uid == every.c.series_instance_uid)
        order += [objects.c.instance_number, objects.c.sop_instance_uid]
        extra = [objects.c.kind, objects.c.path]
    chosen = [column.label(keyword) for keyword, column in columns.items()]
    query = sa.select(*chosen, *extra).select_from(source).order_by(*order)
    if study_uid:
        query = query.where(study.c.study_instance_uid == study_uid)
    return query, columns


def _study_columns() -> Columns:
    made = (
        sa.select(result)
        .where(
            result.c.study_instance_uid == study.c.study_instance_uid,
            result.c.state == "valid",
            ~sa.exists().where(instance.c.sop_instance_uid == result.c.sop_instance_uid),
        )
        .correlate(study)
    )
    rows = made.subquery("made")
    series_count = sa.select(sa.func.count(sa.distinct(rows.c.series_instance_uid))).scalar_subquery()
    object_count = sa.select(sa.func.count()).select_from(rows).scalar_subquery()
    modalities: sa.ColumnElement[str] = study.c.modalities
    for kind, modality in MADE_MODALITIES.items():
        there = sa.exists().where(
            result.c.study_instance_uid == study.c.study_instance_uid, result.c.kind == kind, result.c.state == "valid"
        )
        modalities = modalities.concat(sa.case((there, f"\\{modality}"), else_=""))
    return {
        "StudyDate": study.c.study_date,
        "StudyTime": study.c.study_time,
        "AccessionNumber": study.c.accession_number,
        "ModalitiesInStudy": modalities,
        "ReferringPhysicianName": study.c.referring_physician_name,
        "StudyDescription": study.c.study_description,
        "PatientName": study.c.patient_name,
        "PatientID": study.c.patient_id,
        "PatientBirthDate": study.c.patient_birth_date,
        "PatientSex": study.c.patient_sex,
        "StudyInstanceUID": study.c.study_instance_uid,
        "StudyID": study.c.study_id,
        "NumberOfStudyRelatedSeries": study.c.number_of_series + series_count,
        "NumberOfStudyRelatedInstances": study.c.number_of_instances + object_count,
    }


def _series_columns(every: sa.Subquery) -> Columns:
    return {
        "Modality": every.c.modality,
        "SeriesDescription": every.c.series_description,
        "StationName": every.c.station_name,
        "BodyPartExamined": every.c.body_part_examined,
        "SeriesInstanceUID": every.c.series_instance_uid,
        "SeriesNumber": every.c.series_number,
        "NumberOfSeriesRelatedInstances": every.c.objects,
    }


def _instance_columns(objects: sa.Subquery) -> Columns:
    return {
        "SOPClassUID": objects.c.sop_class_uid,
        "SOPInstanceUID": objects.c.sop_instance_uid,
        "AvailableTransferSyntaxUID": objects.c.transfer_syntax_uid,
        "InstanceNumber": objects.c.instance_number,
        "NumberOfFrames": objects.c.number_of_frames,
        "Rows": objects.c.rows,
        "Columns": objects.c.columns,
    }


def complete(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row with what the index does not hold of an object of ours, read from its file."""
    if not row.get("kind"):
        return row
    header = dict(_header(folder / row["path"]))
    return {**row, **{keyword: value for keyword, value in header.items() if row.get(keyword) in (None, "")}}


@lru_cache(maxsize=4096)
def _header(path: Path) -> tuple[tuple[str, Any], ...]:
    """Results are written once and never changed, so what their headers say is kept."""
    keywords = ["SeriesNumber", "SeriesDescription", "BodyPartExamined", "InstanceNumber", "NumberOfFrames", "Rows", "Columns"]
    dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(keywords))
    return tuple((keyword, dataset[keyword].value) for keyword in keywords if keyword in dataset)


def address(level: str, row: dict[str, Any], root: str) -> str:
    """Where a row's object, series or study is retrieved from."""
    where = f"{root}/studies/{row['StudyInstanceUID']}"
    if level != "study":
        where += f"/series/{row['SeriesInstanceUID']}"
    return where + (f"/instances/{row['SOPInstanceUID']}" if level == "instance" else "")
