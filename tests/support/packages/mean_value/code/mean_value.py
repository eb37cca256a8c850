"""The mean of all pixels of a study; slow or fatal when a test asks for it."""

import os
import time

import numpy as np

from caregrid.domain.codes import NO_UNITS, Code
from caregrid.domain.findings import Finding, Findings, Measurement, Picture
from caregrid.domain.images import AlgorithmInput


def run(input: AlgorithmInput) -> Findings:
    """Measure; ``sleep_seconds`` waits first, ``crash`` ends the process."""
    time.sleep(float(input.parameters["sleep_seconds"]))
    if input.parameters["crash"]:
        os._exit(7)
    images = [image for series in input.series["images"] for image in series.images]
    mean = float(np.mean([image.array.mean() for image in images]))
    used = tuple(dict.fromkeys(image.sop_instance_uid for image in images))
    finding = Finding(
        tracking_id="mean",
        concept=Code("mean-value", "99CAREGRID", "Mean pixel value"),
        measurements=(Measurement(Code("373098007", "SCT", "Mean"), mean, NO_UNITS),),
        source_instances=used,
    )
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32] = 200
    return Findings(
        f"Mean pixel value {mean:.1f}",
        (finding,),
        pictures=(Picture("Mean", picture, used[:1]),),
        used_instances=used,
        values={"mean": mean},
    )
