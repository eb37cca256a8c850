"""What caregrid itself adds: from the last C-STORE of a 324-slice CT to its results stored in the PACS.

overhead = (last result stored in the PACS − answer to the last C-STORE) − quiet time − the algorithm's own time.
Peer: AIDE's published figure, 70–90 s of platform time around its application (on 144 vCPU), quoted, not run here.
The PACS is a real Orthanc. The CT is made of real slices (pydicom-data), repeated to 324 with true positions; with --ct FOLDER of
your own. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import sqlalchemy as sa
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.scanner import Scanner
from tests.support.site import running, settings_text, wait_for

from caregrid.engine.judge import add_workflow
from caregrid.setup import init_site
from caregrid.site import Site
from caregrid.store.database import reading

SLICES = 324
QUIET = 1.0
AIDE_SECONDS = (70, 90)
PHASES = ("close", "queue", "prepare", "write", "validate", "outbox", "deliver")
WORKFLOW = """\
workflow: lung
description: Lung volume, for the overhead benchmark
owner: bench@caregrid.example
priority: routine
when:
  any_series: {Modality: CT}
tasks:
  - {id: lung, kind: run, algorithm: ct-lung-volume, timeout: 5m}
  - {id: send, kind: deliver, results: [lung], formats: [dicom_seg, dicom_sr, dicom_sc], destinations: [PACS]}
"""


#: When what happened to a study, and the algorithm's own seconds.
MOMENTS = """
select study.state, study.completed_at, run.id as run_id, task.started_at as began_at, task.finished_at as ended_at,
       task.algorithm_seconds, min(delivery.created_at) as put_at, max(delivery.delivered_at) as delivered_at
from study join run on run.study_instance_uid = study.study_instance_uid
join task on task.run_id = run.id and task.kind = 'run'
left join delivery on delivery.run_id = run.id
where study.study_instance_uid = :uid
group by study.state, study.completed_at, run.id, task.started_at, task.finished_at, task.algorithm_seconds
"""


def slices(folder: Path | None) -> list[pydicom.Dataset]:
    """324 slices 512 × 512 with fresh UIDs, 1 mm apart: the given series to and fro, or one real slice with a lung-like body."""
    found = sorted(folder.glob("*.dcm")) if folder else [Path(str(get_testdata_file("693_UNCR.dcm", download=False)))]
    real = [pydicom.dcmread(path) for path in found]
    if folder:
        real.sort(key=lambda each: float(each.ImagePositionPatient[2]))
    order = list(range(len(real))) + list(range(len(real) - 2, 0, -1))
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    made = []
    for number in range(SLICES):
        each = copy.deepcopy(real[order[number % len(order)]])
        each.StudyInstanceUID, each.SeriesInstanceUID, each.FrameOfReferenceUID = study, series, frame
        each.SOPInstanceUID = each.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        each.InstanceNumber = number + 1
        each.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        each.ImagePositionPatient = [*[float(value) for value in each.ImagePositionPatient[:2]], float(number)]
        each.SliceThickness = 1.0
        made.append(each)
    return made


def with_air(datasets: list[pydicom.Dataset]) -> list[pydicom.Dataset]:
    """Two air-filled ellipsoids in the body, so that there is a segmentation to write where no chest CT is at hand."""
    rows, columns = np.mgrid[0 : datasets[0].Rows, 0 : datasets[0].Columns]
    for number, each in enumerate(datasets):
        pixels = each.pixel_array.copy()
        depth = np.sqrt(max(0.0, 1 - ((number - SLICES / 2) / (SLICES * 0.45)) ** 2))
        for centre in (180, 332):
            inside = ((rows - 250) / (75 * depth + 1e-6)) ** 2 + ((columns - centre) / (55 * depth + 1e-6)) ** 2 < 1
            air = round((-850 - float(each.RescaleIntercept)) / float(each.RescaleSlope))
            pixels[inside] = air
        each.PixelData = pixels.tobytes()
    return datasets


def once(site: Site, datasets: list[pydicom.Dataset], pacs: Orthanc) -> dict[str, float]:
    """Send one study and time it to the last result in the PACS."""
    before = len(pacs.instances())
    scanner = Scanner(site.settings.dimse.port)
    began = time.time()
    statuses = scanner.send(datasets)
    last = time.time()
    assert statuses == [0] * len(datasets), f"the site answered {sorted(set(statuses))}"
    uid = str(datasets[0].StudyInstanceUID)

    def ended() -> Any:
        with reading(site.engine) as connection:
            query = sa.text("select state from study where study_instance_uid = :uid")
            return connection.execute(query, {"uid": uid}).scalar() in ("done", "failed")

    wait_for(ended, 120, "the study done")
    with reading(site.engine) as connection:
        reasons = connection.execute(sa.text("select task_id, state, reason from task")).all()
        moments = connection.execute(sa.text(MOMENTS), {"uid": uid}).mappings().one()
    assert moments["state"] == "done", f"{moments['state']}: {reasons}"
    stored = len(pacs.instances()) - before
    assert stored >= 2, f"only {stored} results in the PACS"
    whole = _seconds(moments["delivered_at"]) - last
    return {
        "send_s": last - began,
        "whole_s": whole,
        "algorithm_s": moments["algorithm_seconds"],
        "overhead_s": whole - QUIET - moments["algorithm_seconds"],
        "results": float(stored),
        **_phases(site, dict(moments), last),
    }


def _phases(site: Site, moments: dict[str, Any], last: float) -> dict[str, float]:
    """Where the overhead goes, in seconds; together they are the overhead."""
    made = site.kept.folder(moments["run_id"], "lung")
    kept = (made / "findings").stat().st_mtime
    at = {name: _seconds(moments[name]) for name in moments if name.endswith("_at")}
    objects = max(path.stat().st_mtime for path in made.glob("*.dcm"))
    return {
        "close": at["completed_at"] - last - QUIET,
        "queue": at["began_at"] - at["completed_at"],
        "prepare": kept - at["began_at"] - moments["algorithm_seconds"],
        "write": objects - kept,
        "validate": at["ended_at"] - objects,
        "outbox": at["put_at"] - at["ended_at"],
        "deliver": at["delivered_at"] - at["put_at"],
    }


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two studies instead of five")
    parser.add_argument("--ct", type=Path, help="folder of one CT series to repeat")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), rounds, arguments.ct)
    for number, each in enumerate(figures):
        print(f"study {number + 1}: " + ", ".join(f"{key} {value:.2f}" for key, value in each.items()))
    warm = figures[1:] or figures
    print("where the overhead goes (median, s): " + ", ".join(f"{key} {median(warm, key):.2f}" for key in PHASES))
    overhead = median(warm, "overhead_s")
    print(
        json.dumps(
            {
                "overhead_s": round(overhead, 3),
                "overhead_first_s": round(figures[0]["overhead_s"], 3),
                "algorithm_s": round(median(warm, "algorithm_s"), 3),
                "phases_s": {key: round(median(warm, key), 3) for key in PHASES},
                "slices": SLICES,
                "aide_published_s": list(AIDE_SECONDS),
                "vs_aide": round(AIDE_SECONDS[0] / overhead, 1),
                "children_peak_rss_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
            }
        )
    )


def median(figures: list[dict[str, float]], key: str) -> float:
    """The middle value of one figure."""
    return statistics.median(each[key] for each in figures)


def measure(folder: Path, rounds: int, ct: Path | None) -> list[dict[str, float]]:
    """``rounds`` studies one after the other through one site; the first starts its workers cold."""
    with Orthanc(folder, aet="PACS") as pacs:
        settings = settings_text(pacs.dicom_port, dimse_port=free_port(), web_port=free_port(), quiet=QUIET)
        made = init_site(folder / "site", "Bench", who="bench", settings=settings)
        site = Site.open(made.home)
        add_workflow(site.engine, WORKFLOW, "bench.yaml", "bench", "bench")
        with running(site, "receiver", "supervisor", "worker"):
            time.sleep(3)
            return [once(site, slices(ct) if ct else with_air(slices(None)), pacs) for _ in range(rounds)]


if __name__ == "__main__":
    main()
