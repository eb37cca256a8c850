"""What comes in: where an object came from, what the store answered, and a study as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Who sent an object, by which door. protocol: dimse, dicomweb, folder. address: IP, or the folder."""

    protocol: str
    calling_ae: str
    called_ae: str
    address: str


@dataclass(frozen=True)
class Incoming:
    """One received DICOM object, not yet kept.

    chunks: the bytes in order. With ``part10`` they are a whole file (preamble, file meta, data set); otherwise the
    data set alone, encoded in transfer_syntax_uid, as DIMSE carries it. The announced UIDs may be empty for part10.
    """

    source: Source
    chunks: Sequence[bytes | bytearray | memoryview]
    part10: bool = False
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    transfer_syntax_uid: str = ""


#: stored: new. duplicate: the same bytes were here. conflict: same SOP Instance UID, other bytes; both are kept.
RECEIPTS = ("stored", "duplicate", "conflict")


@dataclass(frozen=True)
class Receipt:
    """The store's promise: the object is on disk, synced and indexed. status is one of RECEIPTS."""

    status: str
    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str


@dataclass(frozen=True)
class InstanceRef:
    """An instance as the engine hands it on: identity and the file as received."""

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    path: Path


@dataclass(frozen=True)
class SeriesRef:
    """A series of a study with its instances, ordered by instance number."""

    series_instance_uid: str
    modality: str
    description: str
    instances: tuple[InstanceRef, ...]


@dataclass(frozen=True)
class StudyRef:
    """A study as workflows judge it and algorithms read it. generation rises when late instances reopen it."""

    study_instance_uid: str
    generation: int
    source: Source
    series: tuple[SeriesRef, ...]
