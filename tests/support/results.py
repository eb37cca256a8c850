"""Makes source series, findings and result contexts for tests of result formats, destinations and validation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from caregrid.domain.algorithm import Manifest, OutputSpec
from caregrid.domain.codes import MILLILITRE, PRESENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture, Segment
from caregrid.results import ResultContext

STRUCTURE = Code("123037004", "SCT", "Anatomical Structure")
LUNG = Code("39607008", "SCT", "Lung")
LEFT = Code("7771000", "SCT", "Left")
VOLUME = Code("118565006", "SCT", "Volume")
NODULE = Code("27925004", "SCT", "Nodule")
PRESENCE = Code("705057003", "SCT", "Presence")
AI = Code("123110", "DCM", "Artificial Intelligence")
STARTED = datetime(2026, 3, 4, 10, 30, 15, 250000, tzinfo=UTC)
WRITTEN = datetime(2026, 3, 4, 10, 31, 0, tzinfo=UTC)


def manifest(**changes: Any) -> Manifest:
    """A manifest of an algorithm that looks for lungs and nodules."""
    values: dict[str, Any] = {
        "name": "lung-volume",
        "version": "1.2.0",
        "title": "Lung volume",
        "runner": "python",
        "entry": "algorithm:run",
        "intended_use": "Research only: measures the air in the lungs",
        "regulatory_status": "not a medical device",
        "manufacturer": "caregrid project",
        "inputs": (),
        "outputs": (
            OutputSpec("lung", "segment", LUNG),
            OutputSpec("volume", "measurement", VOLUME, MILLILITRE),
            OutputSpec("nodule", "evaluation", NODULE),
        ),
        "algorithm_family": AI,
        "parameters": {"threshold": -500},
        "digest": "0" * 64,
    }
    return Manifest(**{**values, **changes})


def context(files: Sequence[Path], **changes: Any) -> ResultContext:
    """The context of one run; the same arguments give the same UIDs."""
    values: dict[str, Any] = {
        "source_files": tuple(files),
        "manifest": manifest(),
        "run_id": "run-1",
        "task_id": "measure",
        "uid_seed": "run-1/measure",
        "started_at": STARTED,
        "written_at": WRITTEN,
        "device_serial": "site-1",
        "institution": "Test Hospital",
        "station_name": "CAREGRID",
        "software_version": "0.1.0",
    }
    return ResultContext(**{**values, **changes})


AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def ct_series(
    folder: Path,
    slices: int = 6,
    step: float = 2.0,
    orientation: Sequence[float] = AXIAL,
    backwards: bool = False,
    changes: dict[str, Any] | None = None,
) -> list[Path]:
    """A series made of pydicom's real CT slice (128×128), moved along the normal by ``step`` mm; files in file-name order.

    backwards: the first file is the last along the normal. changes: keyword → value on every instance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = dcmread(str(get_testdata_file("CT_small.dcm")))
    del header.TimezoneOffsetFromUTC
    header.PixelSpacing = [0.7, 0.9]
    header.ImageOrientationPatient = [f"{value:.10g}" for value in orientation]
    header.SeriesInstanceUID, header.StudyInstanceUID = generate_uid(), generate_uid()
    header.FrameOfReferenceUID = generate_uid()
    for keyword, value in (changes or {}).items():
        setattr(header, keyword, value)
    normal = np.cross(orientation[:3], orientation[3:])
    start = np.array([-40.0, -55.0, 120.0])
    paths = []
    for number in range(slices):
        place = slices - 1 - number if backwards else number
        header.ImagePositionPatient = [f"{value:.8g}" for value in start + normal * step * place]
        header.InstanceNumber = number + 1
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        paths.append(folder / f"{number:04}.dcm")
        header.save_as(paths[-1])
    return paths


def headers(paths: Sequence[Path]) -> list[Dataset]:
    """The headers of the files."""
    return [dcmread(path, stop_before_pixels=True) for path in paths]


def findings(paths: Sequence[Path], mask: np.ndarray | None = None) -> Findings:
    """A lung with a volume, a nodule without a segment, and a picture, on the series of ``paths``."""
    read = headers(paths)
    frames = sum(int(header.get("NumberOfFrames", 1) or 1) for header in read)
    if mask is None:
        mask = np.zeros((frames, int(read[0].Rows), int(read[0].Columns)), bool)
        mask[frames // 3 : frames // 3 + 2, 20:60, 30:50] = True
    first = str(read[0].SOPInstanceUID)
    lung = Finding(
        "lung-left",
        LUNG,
        site=LUNG,
        laterality=LEFT,
        segment="Left lung",
        measurements=(Measurement(VOLUME, 2345.678, MILLILITRE),),
        source_instances=tuple(str(header.SOPInstanceUID) for header in read),
    )
    nodule = Finding(
        "nodule-1",
        NODULE,
        site=LUNG,
        measurements=(Measurement(VOLUME, None, MILLILITRE),),
        evaluations=(Evaluation(PRESENCE, PRESENT),),
        source_instances=(first,),
        confidence=0.87,
    )
    colours = np.random.default_rng(7).integers(0, 255, (120, 200, 3)).astype(np.uint8)
    return Findings(
        summary="Left lung 2346 ml",
        findings=(lung, nodule),
        segments=(Segment("Left lung", STRUCTURE, LUNG, mask, str(read[0].SeriesInstanceUID), LUNG),),
        pictures=(Picture("Lungs, middle slice", colours, (first,)),),
        used_instances=tuple(str(header.SOPInstanceUID) for header in read),
    )
