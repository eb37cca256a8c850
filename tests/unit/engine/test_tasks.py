"""What the tasks of a run do, on a real site with a real study and a signed algorithm in its sandbox."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from caregrid.domain.codes import Code
from caregrid.domain.findings import Findings, Segment
from caregrid.domain.study import Incoming, Source
from caregrid.engine import reviews
from caregrid.engine.judge import add_workflow
from caregrid.engine.tasks import HeadersAhead
from caregrid.results import ResultContext, make_uid, write_results
from caregrid.setup import add_signed
from caregrid.site import Site
from caregrid.store.database import writing
from caregrid.store.studies import move_study, run_id
from tests.support.inline_queue import InlineQueue
from tests.support.scanner import new_study
from tests.support.site import PACKAGE, make_site, rows, settings_text, workflow_text

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed on this machine")

SEGMENT = """
[[outputs]]
name = "valve"
kind = "segment"
concept = ["17401000", "SCT", "Heart valve"]
"""


class Bench:
    """A site whose runs are carried out here, one after the other."""

    def __init__(self, home: Path, workflow: str) -> None:
        self.site: Site = make_site(home, settings_text(1))
        self.queue = InlineQueue()
        self.site.__dict__["queue"] = self.queue  # in the place of the durable one, which needs a worker process
        add_workflow(self.site.engine, workflow, "test.yaml", "test", "test")
        self.runtime = self.site.runtime()
        self.queue.flow = self.site.flow(self.runtime)

    def receive(self, datasets: list[pydicom.Dataset]) -> str:
        """Take a study in and queue its runs; the run's id."""
        for dataset in datasets:
            content = io.BytesIO()
            dataset.save_as(content, enforce_file_format=True)
            source = Source("folder", "TEST", "CAREGRID", "127.0.0.1")
            self.site.store.receive(Incoming(source, [content.getvalue()], part10=True))
        uid = str(datasets[0].StudyInstanceUID)
        with writing(self.site.engine) as connection:
            move_study(connection, uid, "complete", who="test", why="test")
        self.site.judge.study_closed(uid)
        return run_id(uid, 0, "mean-value")

    def tasks(self) -> dict[str, dict[str, Any]]:
        return {row["task_id"]: row for row in rows(self.site, "select * from task")}

    def results(self) -> dict[str, dict[str, Any]]:
        return {row["sop_instance_uid"]: row for row in rows(self.site, "select * from result")}

    def deliveries(self) -> set[str]:
        return {row["sop_instance_uid"] for row in rows(self.site, "select sop_instance_uid from delivery")}

    def report(self, row: dict[str, Any]) -> pydicom.Dataset:
        return pydicom.dcmread(self.site.folder / row["path"])

    def close(self) -> None:
        self.runtime.close()
        self.site.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "site", workflow_text())
    yield made
    made.close()


@pytest.fixture
def reviewing(tmp_path: Path) -> Iterator[Bench]:
    """The same with a clinician's review before delivery."""
    made = Bench(tmp_path / "site", workflow_text(review=True))
    yield made
    made.close()


@needs_sandbox
def test_a_run_leaves_sound_results_and_their_deliveries(bench: Bench) -> None:
    bench.receive(new_study(3))
    bench.queue.drain()
    assert {name: row["state"] for name, row in bench.tasks().items()} == {"mean": "done", "send": "done"}
    made = bench.results()
    assert sorted(row["kind"] for row in made.values()) == ["dicom_sc", "dicom_sr"]
    assert {row["state"] for row in made.values()} == {"valid"}
    assert bench.deliveries() == set(made)
    (found,) = rows(bench.site, "select tracking_id, algorithm from finding")
    assert found == {"tracking_id": "mean", "algorithm": "mean-value"}


@needs_sandbox
def test_the_time_of_a_result_is_when_the_algorithm_finished(bench: Bench) -> None:
    key = bench.receive(new_study(1))
    bench.queue.drain()
    finished = bench.site.kept.finished_at(bench.site.kept.folder(key, "mean"))
    started = rows(bench.site, "select started_at from run")[0]["started_at"]
    assert finished > datetime.fromisoformat(started)
    for row in bench.results().values():
        dataset = bench.report(row)
        local = finished.astimezone()
        written = datetime.strptime(
            f"{dataset.InstanceCreationDate}{dataset.InstanceCreationTime}{dataset.TimezoneOffsetFromUTC}", "%Y%m%d%H%M%S.%f%z"
        )
        assert written == local


@needs_sandbox
def test_an_object_that_does_not_fit_its_study_is_never_delivered(bench: Bench, tmp_path: Path) -> None:
    """It lies where the run will write its own, so the run judges it: an object is written once."""
    key = bench.receive(new_study(1))
    (other,) = new_study(1, PatientID="ANOTHER")
    path = tmp_path / "other.dcm"
    other.save_as(path)
    manifest = bench.site.registry.resolve("mean-value")
    moment = datetime.now().astimezone()
    context = ResultContext((path,), manifest, key, "mean", f"{key}/mean", started_at=moment, written_at=moment)
    ((_, report),) = write_results(context, Findings("nothing", used_instances=(str(other.SOPInstanceUID),)), ("dicom_sr",))
    bench.site.kept.keep(bench.site.kept.folder(key, "mean"), "dicom_sr", report)
    bench.queue.drain()
    task = bench.tasks()["mean"]
    assert task["state"] == "failed"
    assert "PatientID is not the source's" in task["reason"]
    assert "ANOTHER" not in task["reason"]
    assert bench.results()[str(report.SOPInstanceUID)]["state"] == "invalid"
    assert bench.deliveries() == set()


@needs_sandbox
def test_an_accepted_report_is_verified_and_replaces_the_first(reviewing: Bench) -> None:
    key = reviewing.receive(new_study(2))
    reviewing.queue.drain()
    assert reviewing.deliveries() == set()
    first = {row["kind"]: row for row in reviewing.results().values()}
    reviews.decide(reviewing.site.engine, reviewing.queue, key, "look", "accepted", "Doe^Jane", "")
    reviewing.queue.drain()
    (verified,) = (
        row for uid, row in reviewing.results().items() if uid not in {each["sop_instance_uid"] for each in first.values()}
    )
    report = reviewing.report(verified)
    assert (verified["state"], report.VerificationFlag) == ("valid", "VERIFIED")
    predecessor = report.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert predecessor.SeriesInstanceUID == first["dicom_sr"]["series_instance_uid"]
    assert predecessor.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first["dicom_sr"]["sop_instance_uid"]
    assert reviewing.deliveries() == {verified["sop_instance_uid"], first["dicom_sc"]["sop_instance_uid"]}


@needs_sandbox
def test_a_corrected_report_holds_the_clinicians_value(reviewing: Bench) -> None:
    key = reviewing.receive(new_study(1))
    reviewing.queue.drain()
    corrections = {"mean": {"Mean": 42.0}}
    reviews.decide(reviewing.site.engine, reviewing.queue, key, "look", "corrected", "Doe^Jane", "looks wrong", corrections)
    reviewing.queue.drain()
    uid = make_uid(f"{key}/mean/reviewed", "dicom_sr", "instance", 1)
    report = reviewing.report(reviewing.results()[uid])
    numbers = [item for item in report.iterall() if item.keyword == "NumericValue"]
    assert [float(item.value) for item in numbers] == [42.0]


@needs_sandbox
def test_a_rejected_result_goes_nowhere(reviewing: Bench) -> None:
    key = reviewing.receive(new_study(1))
    reviewing.queue.drain()
    reviews.decide(reviewing.site.engine, reviewing.queue, key, "look", "rejected", "Doe^Jane", "motion")
    reviewing.queue.drain()
    assert reviewing.deliveries() == set()


@needs_sandbox
def test_a_segment_that_no_seg_can_carry_is_said(bench: Bench, tmp_path: Path) -> None:
    """Findings that are kept already: the algorithm is not run again, and the mask of a cine has no place in the patient."""
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package)
    text = (package / "algorithm.toml").read_text().replace('version = "1.0.0"', 'version = "1.1.0"')
    (package / "algorithm.toml").write_text(text.replace("[parameters]", f"{SEGMENT}[parameters]"))
    add_signed(bench.site, package, (bench.site.settings.home / "keys" / "site.key").read_bytes(), "test", "for tests")
    cine = pydicom.dcmread(str(get_testdata_file("examples_ybr_color.dcm", download=False)))
    key = bench.receive([cine])
    mask = np.zeros((int(cine.NumberOfFrames), cine.Rows, cine.Columns), bool)
    mask[0, 10:20, 10:20] = True
    structure, valve = Code("123037004", "SCT", "Anatomical Structure"), Code("17401000", "SCT", "Heart valve")
    segment = Segment("Mitral valve", structure, valve, mask, str(cine.SeriesInstanceUID))
    found = Findings("A valve", segments=(segment,), used_instances=(str(cine.SOPInstanceUID),), warnings=("dark",))
    bench.site.kept.keep_findings(bench.site.kept.folder(key, "mean"), found)
    bench.queue.drain()
    task = rows(bench.site, "select state, output from task where task_id = 'mean'")[0]
    assert task["state"] == "done"
    assert "no SEG is written for Mitral valve" in str(task["output"])
    assert "dark" in str(task["output"])
    assert [row["kind"] for row in bench.results().values()] == ["dicom_sr"]


def test_headers_read_ahead_are_handed_out_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.dcm" for number in range(3)]
    for path, dataset in zip(paths, new_study(3), strict=True):
        dataset.save_as(path)
    missing = tmp_path / "gone.dcm"
    with HeadersAhead([*paths, missing]) as ahead:
        first = [ahead(path) for path in paths]
    for path, header in zip(paths, first, strict=True):
        assert "PixelData" not in header
        assert header == pydicom.dcmread(path, stop_before_pixels=True)
        header.PatientID = "changed by who took it"
        assert ahead(path) == pydicom.dcmread(path, stop_before_pixels=True)
    with pytest.raises(FileNotFoundError):
        ahead(missing)
