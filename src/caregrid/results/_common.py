"""What every result writer shares: the context of a result, deterministic UIDs, and what all objects must carry."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import highdicom as hd
from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.tag import Tag
from pydicom.uid import UID
from pydicom.valuerep import DA, DT, TM, PersonName

from caregrid.domain.algorithm import Manifest
from caregrid.domain.codes import Code
from caregrid.domain.findings import Findings
from caregrid.errors import ResultInvalid

MANUFACTURER = "caregrid"
MODEL_NAME = "caregrid"

_NAMESPACE = uuid.UUID("6b1f6f0e-6a3c-5f57-9a57-2f3f5c1f8f0d")

#: Copied from the source instance, empty when the source has none (type 2 in PS3.3 C.7.1.1 and C.7.2.1).
IDENTITY_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "StudyID",
    "AccessionNumber",
)
#: Copied only when the source has them.
IDENTITY_TYPE_3 = (
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "TypeOfPatientID",
    "OtherPatientIDsSequence",
    "PatientBirthTime",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "QualityControlSubject",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "StudyDescription",
    "IssuerOfAccessionNumberSequence",
    "ProcedureCodeSequence",
)
_KIND_DIGIT = {"dicom_seg": 1, "dicom_sr": 2, "dicom_sc": 3, "dicom_kos": 4}
TEXT_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})


@dataclass(frozen=True)
class Reviewer:
    """Who confirmed a result. name as DICOM writes it (Family^Given); at is aware; decision: accepted, corrected or rejected."""

    name: str
    organisation: str
    at: datetime
    decision: str


@dataclass(frozen=True)
class Predecessor:
    """An earlier result object that this run replaces."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str


@dataclass(frozen=True)
class Sent:
    """What the receiver said about one object. status: its own words (``0000``, ``B000``, ``A700`` …).

    transient: a refusal worth sending again later.
    """

    sop_instance_uid: str
    accepted: bool
    status: str
    transient: bool = False


def read_header(path: Path) -> Dataset:
    """All of a file but its pixels."""
    return dcmread(path, stop_before_pixels=True)


@dataclass(frozen=True)
class ResultContext:
    """Everything about a result that is not the finding itself.

    source_files: the instances the algorithm was given, as received. uid_seed: the same seed gives the same UIDs, so a
    retry of the same run writes the same objects; a new run must have a new seed. started_at: start of the analysis,
    aware. written_at: creation time of the objects, aware; None: now (hand it in to make a retry equal to the byte).
    read: gives the header of a source file, a fresh one each time, for who has read it already.
    """

    source_files: tuple[Path, ...]
    manifest: Manifest
    run_id: str
    task_id: str
    uid_seed: str
    started_at: datetime
    device_uid: str = ""
    device_serial: str = "1"
    institution: str = ""
    station_name: str = "CAREGRID"
    software_version: str = "0.1.0"
    supersedes: tuple[Predecessor, ...] = ()
    reviewed: Reviewer | None = None
    written_at: datetime | None = None
    read: Callable[[Path], Dataset] = read_header

    @cached_property
    def _loaded(self) -> tuple[Dataset, tuple[Dataset, ...]]:
        """Identity of the source study, and the headers with the identity blanked (see blank_identity)."""
        headers = tuple(self.read(path) for path in self.source_files)
        if not headers:
            raise ResultInvalid(kind="result", reason="no source instance was named")
        identity = copy_identity(headers[0])
        for header in headers:
            blank_identity(header)
        return identity, headers

    @property
    def identity(self) -> Dataset:
        """Patient and study attributes of the source, text decoded."""
        return self._loaded[0]

    @property
    def headers(self) -> tuple[Dataset, ...]:
        """Headers of the source instances without pixels and without identity, in the order of source_files."""
        return self._loaded[1]

    def used(self, findings: Findings) -> tuple[Dataset, ...]:
        """Headers of exactly the instances the algorithm read; ResultInvalid when it names one it was not given."""
        if not findings.used_instances:
            return self.headers
        by_uid = {str(header.SOPInstanceUID): header for header in self.headers}
        unknown = [uid for uid in findings.used_instances if uid not in by_uid]
        if unknown:
            raise ResultInvalid(kind="result", reason=f"instance {unknown[0]} was not given to the algorithm")
        return tuple(by_uid[uid] for uid in dict.fromkeys(findings.used_instances))

    def uid(self, *parts: object) -> str:
        """A UID of this run, the same at every retry."""
        return make_uid(self.uid_seed, *parts)

    @property
    def engine_uid(self) -> str:
        """Device UID of this engine."""
        return self.device_uid or make_uid("device", self.device_serial)

    @property
    def algorithm_uid(self) -> str:
        """Device UID of the algorithm: the same for the same version and package."""
        return make_uid("algorithm", self.manifest.name, self.manifest.version, self.manifest.digest)

    @property
    def zone(self) -> timezone:
        """Offset of every date and time in the results: the source's own when it says one, else this machine's at that time.

        One object has one offset (PS3.3 C.12.1.1.8), and the source's study date is in local time, not in UTC.
        """
        said = zone_from_text(str(self.identity.get("TimezoneOffsetFromUTC", "") or ""))
        return said or timezone(self.started_at.astimezone().utcoffset() or timedelta(0))


def make_uid(seed: str, *parts: object) -> str:
    """A UID under 2.25 (PS3.5 B.2) that depends only on seed and parts; at most 44 characters."""
    text = "\x1f".join([seed, *(str(part) for part in parts)])
    return f"2.25.{uuid.uuid5(_NAMESPACE, text).int}"


def tracking_uid(study_instance_uid: str, algorithm: str, tracking_id: str) -> str:
    """Tracking UID of a finding: the same for every run of any version of the algorithm on the study."""
    return make_uid("tracking", study_instance_uid, algorithm, tracking_id)


def zone_from_text(text: str) -> timezone | None:
    """``+0100`` as a timezone; None when it is not one (PS3.3 C.12.1.1.8)."""
    if len(text) != 5 or text[0] not in "+-" or not text[1:].isdigit():
        return None
    minutes = int(text[1:3]) * 60 + int(text[3:])
    return timezone(timedelta(minutes=minutes if text[0] == "+" else -minutes))


def coded(code: Code) -> hd.sr.CodedConcept:
    """A domain code as highdicom takes it; the meaning cut to the 64 characters of LO."""
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning[:64])


def copy_identity(header: Dataset) -> Dataset:
    """Patient and study attributes of ``header``, with text decoded so that it can be written in another character set."""
    identity = Dataset()
    identity.StudyInstanceUID = header.StudyInstanceUID
    for keyword in IDENTITY_TYPE_2:
        setattr(identity, keyword, "")
    for keyword in (*IDENTITY_TYPE_2, *IDENTITY_TYPE_3, "TimezoneOffsetFromUTC"):
        if keyword in header:
            identity[keyword] = _decoded(header[keyword])
    return identity


def _decoded(element: DataElement) -> DataElement:
    """A copy whose text is plain str: a PersonName read from a file keeps bytes in the source's character set."""
    if element.VR == "SQ":
        items = []
        for item in element.value:
            copied = Dataset()
            for inner in item:
                copied[inner.tag] = _decoded(inner)
            items.append(copied)
        return DataElement(element.tag, "SQ", items)
    value = element.value
    if element.VR == "PN" and value is not None:
        value = PersonName(str(value)) if isinstance(value, PersonName) else [PersonName(str(name)) for name in value]
    copied_element = DataElement(element.tag, element.VR, "" if value is None else value, validation_mode=0)
    return copied_element


def blank_identity(header: Dataset) -> None:
    """Empty the identity of a header: highdicom refuses odd values real sources hold, so it is put on afterwards.

    A pixel spacing of nothing, as some X-rays carry, is taken off too: it would be copied as if it were one.
    """
    for keyword in IDENTITY_TYPE_2:
        header.pop(keyword, None)  # the element itself may be shared with another data set
        setattr(header, keyword, None if keyword in ("StudyDate", "StudyTime") else "")
    for keyword in IDENTITY_TYPE_3:
        if keyword in header and keyword != "ProcedureCodeSequence":
            del header[keyword]
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        if keyword in header and not all(float(value or 0) > 0 for value in header[keyword].value or [0]):
            del header[keyword]


def series_number(context: ResultContext, kind: str) -> int:
    """Series Number of a kind of result of an algorithm: numeric, stable, and not one the source study has."""
    taken = {str(header.get("SeriesNumber", "")) for header in context.headers}
    base = zlib.crc32(context.manifest.name.encode()) % 8000
    number = 10000 + base * 10 + _KIND_DIGIT.get(kind, 9)
    while str(number) in taken:
        number += 10
    return number


def series_arguments(context: ResultContext, kind: str, instance: int = 1, part: object = "") -> dict[str, Any]:
    """The arguments every highdicom object takes for its series, instance and equipment."""
    started = context.started_at.astimezone(context.zone)
    return {
        "series_instance_uid": context.uid(kind, "series"),
        "series_number": series_number(context, kind),
        "sop_instance_uid": context.uid(kind, "instance", part or instance),
        "instance_number": instance,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": context.software_version,
        "device_serial_number": context.device_serial,
        "series_description": series_description(context.manifest),
        "content_date": started.date(),
        "content_time": started.timetz().replace(tzinfo=None),
        "specific_character_set": "ISO_IR 192",  # highdicom does not take some that sources have; see put_character_set
    }


def series_description(manifest: Manifest) -> str:
    """``AI``, algorithm and version in at most 64 characters."""
    version = f" {manifest.version}"[:20]
    return f"AI {manifest.title}"[: 64 - len(version)].rstrip() + version


def algorithm_identification(manifest: Manifest) -> hd.AlgorithmIdentificationSequence:
    """Algorithm Identification Macro (PS3.3 10.16): family, name, version, parameters."""
    return hd.AlgorithmIdentificationSequence(
        name=manifest.name[:64],
        family=coded(manifest.algorithm_family),
        version=manifest.version[:64],
        source=manifest.manufacturer[:64],
        parameters={str(key): str(value) for key, value in manifest.parameters.items()} or None,
    )


def contribution(context: ResultContext) -> Dataset:
    """The algorithm as contributing equipment (PS3.3 C.12.1.1.5), with its Device UID."""
    item = hd.ContributingEquipment(
        manufacturer=context.manifest.manufacturer[:64],
        purpose_of_reference=codes.DCM.ProcessingEquipment,
        manufacturer_model_name=context.manifest.name[:64],
        software_versions=context.manifest.version[:64],
        contribution_datetime=DT(context.started_at.astimezone(context.zone)),
        contribution_description=f"AI result: {context.manifest.intended_use}"[:1024],
    )
    item.DeviceUID = context.algorithm_uid
    return item


def finish(dataset: Dataset, context: ResultContext) -> Dataset:
    """Put on what every result carries: identity of the source, engine, algorithm, times, character set. Returns ``dataset``."""
    put_identity(dataset, context.identity)
    dataset.StationName = context.station_name[:16]
    if context.institution:
        dataset.InstitutionName = context.institution[:64]
    dataset.ContributingEquipmentSequence = [*_other_equipment(dataset, context), contribution(context)]
    _put_times(dataset, context)
    _fix_dimension_uids(dataset, context)
    dataset.file_meta.ImplementationClassUID = UID(make_uid("implementation"))
    dataset.file_meta.ImplementationVersionName = "CAREGRID"
    put_character_set(dataset)
    return dataset


def _other_equipment(dataset: Dataset, context: ResultContext) -> list[Dataset]:
    """What highdicom added: the scanner, and itself, which it dates by its own clock."""
    items = [item for item in dataset.get("ContributingEquipmentSequence", []) if "DeviceUID" not in item]
    for item in items:
        if item.PurposeOfReferenceCodeSequence[0].CodeValue != codes.DCM.AcquisitionEquipment.value:
            item.ContributionDateTime = DT(_written(context))
    return items


def put_identity(dataset: Dataset, identity: Dataset) -> None:
    """Make patient and study attributes exactly those of ``identity``."""
    for keyword in IDENTITY_TYPE_3:
        if keyword in dataset:
            del dataset[keyword]
    for element in identity:
        dataset[element.tag] = deepcopy(element)


def put_laterality(dataset: Dataset, sources: Sequence[Dataset]) -> None:
    """The side the source says; empty when it says none (type 2C, PS3.3 C.7.3.1)."""
    said = {str(header.get("Laterality", "") or "") for header in sources}
    dataset.Laterality = said.pop() if len(said) == 1 else ""


def _put_times(dataset: Dataset, context: ResultContext) -> None:
    started = context.started_at.astimezone(context.zone)
    written = _written(context)
    dataset.SeriesDate, dataset.SeriesTime = DA(started.date()), TM(started.time())
    dataset.ContentDate, dataset.ContentTime = dataset.SeriesDate, dataset.SeriesTime
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = DA(written.date()), TM(written.time())
    dataset.TimezoneOffsetFromUTC = started.strftime("%z")[:5]


def _written(context: ResultContext) -> datetime:
    return (context.written_at or datetime.now(context.zone)).astimezone(context.zone)


def _fix_dimension_uids(dataset: Dataset, context: ResultContext) -> None:
    """highdicom draws the Dimension Organization UID at random; a retry must write the same object."""
    fixed = context.uid("dimension", dataset.SOPInstanceUID)
    for sequence in ("DimensionOrganizationSequence", "DimensionIndexSequence"):
        for item in dataset.get(sequence, []):
            if "DimensionOrganizationUID" in item:
                item.DimensionOrganizationUID = fixed


def put_character_set(dataset: Dataset) -> None:
    """Declare UTF-8 when any text needs it, nothing when all is ASCII (PS3.3 C.12.1.1.2)."""
    if all(text.isascii() for text in texts(dataset)):
        dataset.pop(Tag("SpecificCharacterSet"), None)
    else:
        dataset.SpecificCharacterSet = "ISO_IR 192"


def texts(dataset: Dataset, skip: Collection[str] = ("PerFrameFunctionalGroupsSequence",)) -> Iterator[str]:
    """Every text value that a character set governs, in items too; per-frame groups hold none of ours and are left out."""
    for element in dataset:
        if element.VR == "SQ":
            if element.keyword not in skip:
                for item in element.value:
                    yield from texts(item, skip)
        elif element.VR in TEXT_VRS and element.value is not None:
            values = (
                element.value if isinstance(element.value, Sequence) and not isinstance(element.value, str) else [element.value]
            )
            yield from (str(value) for value in values)
