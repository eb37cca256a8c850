"""Measures ct-lung-volume against masks made by others, and how steady it is; prints the figures of the model card as JSON.

    python evaluate.py DATA_FOLDER

DATA_FOLDER holds ct-chest (DICOM and masks/*.nii.gz) and, as CT without lungs, ct-head-tilt and ct-liver-seg.
Nothing was chosen on these data: every number in the code is from the literature or from anatomy.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread

from caregrid.domain.findings import Findings
from caregrid.domain.images import AlgorithmInput, SeriesInput, Volume
from caregrid.runtime.volumes import read_volume

sys.path.insert(0, str(Path(__file__).parents[1] / "code"))
from ct_lung_volume import run

LOBES = {
    "Left lung": ("lung_lower_lobe_left", "lung_upper_lobe_left"),
    "Right lung": ("lung_lower_lobe_right", "lung_middle_lobe_right", "lung_upper_lobe_right"),
}


def main() -> None:
    """Print everything that the model card quotes."""
    data = Path(sys.argv[1])
    # The series has a gap after its first slice, so the reader is given the 19 slices that follow it.
    files = sorted((data / "ct-chest").glob("*.dcm"))[1:]
    volume = read_volume(files)
    report = {
        "agreement": agreement(volume, data / "ct-chest" / "masks"),
        "steadiness": steadiness(volume),
        "without_lungs": without_lungs(data),
        "cost_324_slices": cost(volume),
    }
    json.dump(report, sys.stdout, indent=1)


def measure(volume: Volume) -> Findings:
    """The algorithm's answer on ``volume``."""
    return run(AlgorithmInput({"ct": (SeriesInput("ct", "volume", "CT", volume.series_instance_uid, {}, (), volume=volume),)}))


def agreement(volume: Volume, masks: Path) -> dict[str, Any]:
    """Dice, volumes and median distance of the surfaces against the lobes of TotalSegmentator, merged."""
    found = {segment.label: segment.mask for segment in measure(volume).segments}
    report = {}
    for label, lobes in LOBES.items():
        truth = np.any([lobe_mask(masks / f"{lobe}.nii.gz") for lobe in lobes], axis=0)[1:]
        mine = found[label]
        report[label] = {
            "dice": round(2 * float((mine & truth).sum()) / float(mine.sum() + truth.sum()), 4),
            "ml": round(float(mine.sum()) * volume.voxel_ml, 1),
            "reference_ml": round(float(truth.sum()) * volume.voxel_ml, 1),
        }
    return report


def lobe_mask(path: Path) -> NDArray[np.bool_]:
    """A NIfTI mask as (slices, rows, columns) of the DICOM series: x as it is, y turned round."""
    stored = np.asanyarray(nibabel.load(path).dataobj) > 0  # type: ignore[attr-defined]
    return np.transpose(stored, (2, 1, 0))[:, ::-1]


def steadiness(volume: Volume) -> dict[str, float]:
    """Change of the total volume, in percent, when the same lungs are scanned worse or lie otherwise in the array."""
    noise = np.random.default_rng(1).normal(0, 40, volume.array.shape)
    half = volume.affine.copy()
    half[:3, 1:3] *= 2
    thick = volume.affine.copy()
    thick[:3, 0] *= 4
    turned = volume.affine.copy()
    turned[:3, 2] *= -1
    pairs = volume.array[:16].astype(np.float32).reshape(4, 4, *volume.array.shape[1:]).mean(axis=1)
    cases = {
        "noise of 40 HU added": (volume.array + noise, volume.affine, volume.array),
        "every second row and column": (volume.array[:, ::2, ::2], half, volume.array),
        "slices of 3.2 mm": (pairs, thick, volume.array[:16]),
        "stored mirrored": (volume.array[:, :, ::-1], turned, volume.array),
    }
    report = {}
    for name, (array, affine, same_part) in cases.items():
        before = measure(_with(volume, same_part, volume.affine)).values["lung_volume_ml"]
        after = measure(_with(volume, array, affine)).values["lung_volume_ml"]
        report[name] = round(100 * (after / before - 1), 2)
    return report


def _with(volume: Volume, array: NDArray[Any], affine: NDArray[np.float64]) -> Volume:
    count = len(array)
    uids = tuple(f"1.2.3.{number}" for number in range(count))
    return dataclasses.replace(volume, array=array, affine=affine, sop_instance_uids=uids, frame_numbers=(1,) * count)


def without_lungs(data: Path) -> dict[str, str]:
    """What it says on CT that shows no lung or only its base; stacked as they are, since only the answer yes or no matters."""
    report = {}
    for name in ("ct-head-tilt", "ct-liver-seg"):
        slices = [header for path in sorted((data / name).glob("*.dcm")) if (header := dcmread(path)).Modality == "CT"]
        slices.sort(key=lambda header: float(header.ImagePositionPatient[2]))
        hu = np.stack([one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices])
        across = [float(size) for size in slices[0].PixelSpacing]
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = float(slices[0].SliceThickness), *across, 1
        uids = tuple(str(one.SOPInstanceUID) for one in slices)
        volume = Volume(hu, affine, uids, (1,) * len(uids), str(slices[0].SeriesInstanceUID), "1.2.3")
        report[name] = f"{len(hu)} slices: {measure(volume).summary}"
    return report


def cost(volume: Volume) -> dict[str, float]:
    """Seconds on 324 slices of 512 x 512, made by running through the real slices to and fro."""
    order = np.resize(np.r_[np.arange(19), np.arange(18, -1, -1)], 324)
    long = _with(volume, volume.array[order], volume.affine)
    wall, cpu = time.perf_counter(), time.process_time()
    measure(long)
    return {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}


if __name__ == "__main__":
    main()
