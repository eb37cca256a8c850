"""Studies made of data sets in memory, for what judges studies without reading files."""

from __future__ import annotations

from pathlib import Path

from pydicom import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from caregrid.domain.study import InstanceRef, SeriesRef, Source, StudyRef
from caregrid.engine.attributes import attribute, read
from caregrid.engine.conditions import Headers

SOURCE = Source("dimse", "CT1", "CAREGRID", "10.0.0.5")


def header(**attributes: object) -> Dataset:
    """A data set with these attributes."""
    made = Dataset()
    for keyword, value in attributes.items():
        setattr(made, keyword, value)
    return made


def study_of(*series: list[Dataset], source: Source = SOURCE) -> tuple[StudyRef, Headers]:
    """A study of series, each a list of headers in instance order; and what gives an instance's header."""
    headers: dict[str, Dataset] = {}
    refs = []
    for number, instances in enumerate(series, 1):
        made = []
        for position, each in enumerate(instances, 1):
            uid = f"1.2.3.{number}.{position}"
            headers[uid] = each
            made.append(InstanceRef(uid, CTImageStorage, f"1.2.3.{number}", ExplicitVRLittleEndian, Path(f"{uid}.dcm")))
        modality = "".join(read(instances[0], attribute("Modality")).values[:1]) if instances else ""
        refs.append(SeriesRef(f"1.2.3.{number}", modality, "", tuple(made)))
    return StudyRef("1.2.3", 0, source, tuple(refs)), lambda ref: headers[ref.sop_instance_uid]
