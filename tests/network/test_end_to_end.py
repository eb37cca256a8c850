"""A study in by C-STORE, its results in a real PACS; on SQLite and PostgreSQL."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from caregrid.engine import reviews
from caregrid.site import Site
from caregrid.store import audit
from caregrid.store.database import reading
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.scanner import Scanner, new_study
from tests.support.site import make_site, rows, running, settings_text, wait_for, workflow_text

pytestmark = pytest.mark.network


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    with Orthanc(tmp_path, aet="PACS") as server:
        yield server


def site_with(tmp_path: Path, pacs: Orthanc, database: str = "", workflow: str = "", extra: str = "") -> Site:
    settings = settings_text(pacs.dicom_port, database=database, dimse_port=free_port(), web_port=free_port(), extra=extra)
    return make_site(tmp_path / "site", settings, workflow or workflow_text())


def study_states(site: Site) -> dict[str, str]:
    return {row["study_instance_uid"]: row["state"] for row in rows(site, "select study_instance_uid, state from study")}


def test_study_in_result_in_pacs_identical(tmp_path: Path, pacs: Orthanc, database_url: str) -> None:
    site = site_with(tmp_path, pacs, database_url)
    study = new_study(3)
    uid = study[0].StudyInstanceUID
    with running(site, "receiver", "supervisor", "worker"):
        assert Scanner(site.settings.dimse.port).send(study) == [0, 0, 0]
        wait_for(lambda: study_states(site).get(uid) == "done", 60, "the study done")
    made = rows(site, "select sop_instance_uid, kind, path from result")
    assert sorted(row["kind"] for row in made) == ["dicom_sc", "dicom_sr"]
    for row in made:
        (there,) = pacs.instances(row["sop_instance_uid"])
        in_pacs = pydicom.dcmread(BytesIO(pacs.dicom(there)))
        ours = pydicom.dcmread(site.folder / row["path"])
        assert in_pacs == ours
        assert in_pacs.StudyInstanceUID == uid
    with reading(site.engine) as connection:
        assert audit.verify(connection)[0] > 5


def test_storescu_as_scanner_and_the_reason_nothing_ran(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs)
    study = new_study(2, Modality="NM")
    files = []
    for number, each in enumerate(study):
        files.append(tmp_path / f"{number}.dcm")
        each.save_as(files[-1])
    with running(site, "receiver", "supervisor"):
        command = ["/usr/bin/storescu", "-aet", "CT1", "-aec", "CAREGRID", "127.0.0.1", str(site.settings.dimse.port), *files]
        subprocess.run(command, check=True, timeout=60)
        wait_for(lambda: study_states(site).get(study[0].StudyInstanceUID) == "no-workflow", 30, "the study judged")
    (verdict,) = rows(site, "select workflow, applies, reason from verdict")
    assert not verdict["applies"]
    assert "Modality" in verdict["reason"]
    assert pacs.instances() == []


def test_review_holds_delivery_until_a_clinician_accepts(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs, workflow=workflow_text(review=True))
    study = new_study(2)
    uid = study[0].StudyInstanceUID
    with running(site, "receiver", "supervisor", "worker"):
        Scanner(site.settings.dimse.port).insist(study)
        wait_for(lambda: study_states(site).get(uid) == "awaiting-review", 60, "the review")
        assert pacs.instances() == []
        (asked,) = rows(site, "select run_id, task_id from review where state = 'open'")
        reviews.decide(site.engine, site.queue, asked["run_id"], asked["task_id"], "accepted", "Reader^Ann", "")
        wait_for(lambda: study_states(site).get(uid) == "done", 60, "the study done")
    reports = [pydicom.dcmread(BytesIO(pacs.dicom(each))) for each in pacs.instances()]
    (report,) = [each for each in reports if each.Modality == "SR"]
    assert report.VerificationFlag == "VERIFIED"
    assert "Reader" in str(report.VerifyingObserverSequence[0].VerifyingObserverName)


def test_rejected_result_never_leaves(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs, workflow=workflow_text(review=True))
    study = new_study(1)
    with running(site, "receiver", "supervisor", "worker"):
        Scanner(site.settings.dimse.port).insist(study)
        wait_for(lambda: rows(site, "select * from review where state = 'open'"), 60, "the review")
        (asked,) = rows(site, "select run_id, task_id from review")
        reviews.decide(site.engine, site.queue, asked["run_id"], asked["task_id"], "rejected", "ann", "wrong organ")
        wait_for(lambda: study_states(site)[study[0].StudyInstanceUID] == "done", 60, "the study done")
    assert pacs.instances() == []
    (send,) = rows(site, "select state, reason from task where task_id = 'send'")
    assert send == {"state": "skipped", "reason": "look was rejected by a clinician"}


def test_corrected_value_is_what_the_pacs_gets(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs, workflow=workflow_text(review=True))
    study = new_study(1)
    with running(site, "receiver", "supervisor", "worker"):
        Scanner(site.settings.dimse.port).insist(study)
        wait_for(lambda: rows(site, "select * from review where state = 'open'"), 60, "the review")
        (asked,) = rows(site, "select run_id, task_id from review")
        key = (asked["run_id"], asked["task_id"])
        reviews.decide(site.engine, site.queue, *key, "corrected", "Reader^Ann", "measured by hand", {"mean": {"Mean": 42.5}})
        wait_for(lambda: study_states(site)[study[0].StudyInstanceUID] == "done", 60, "the study done")
    reports = [pydicom.dcmread(BytesIO(pacs.dicom(each))) for each in pacs.instances()]
    (report,) = [each for each in reports if each.Modality == "SR"]
    assert "42.5" in report.to_json()


def test_pacs_down_for_the_run_and_back_everything_is_delivered(tmp_path: Path) -> None:
    pacs = Orthanc(tmp_path, aet="PACS")
    site = site_with(tmp_path, pacs)
    studies = [new_study(1) for _ in range(5)]
    with running(site, "receiver", "supervisor", "worker"):
        scanner = Scanner(site.settings.dimse.port)
        for study in studies:
            scanner.insist(study)
        tried = "select id from delivery where state = 'pending' and attempts > 0"
        wait_for(lambda: rows(site, tried), 60, "a failed attempt")
        wait_for(lambda: len(rows(site, "select id from run where state = 'delivering'")) == 5, 60, "all runs delivering")
        with pacs:
            wait_for(lambda: set(study_states(site).values()) == {"done"}, 90, "everything delivered")
            assert len(pacs.instances()) == 10


def test_withdrawn_result_is_followed_by_a_rejection_note(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs)
    study = new_study(1)
    with running(site, "receiver", "supervisor", "worker"):
        Scanner(site.settings.dimse.port).insist(study)
        wait_for(lambda: study_states(site).get(study[0].StudyInstanceUID) == "done", 60, "the study done")
        (run,) = rows(site, "select id from run")
        assert site.withdrawal().withdraw(run["id"], "ann", "segmented the wrong lung", "safety") == 2
        wait_for(lambda: len(pacs.instances()) == 3, 30, "the rejection note")
    (note,) = rows(site, "select sop_instance_uid, path from result where kind = 'dicom_kos'")
    there = pydicom.dcmread(BytesIO(pacs.dicom(pacs.instances(note["sop_instance_uid"])[0])))
    assert there.ConceptNameCodeSequence[0].CodeValue == "113037"
    named = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for item in there.ContentSequence
        if "ReferencedSOPSequence" in item
    }
    withdrawn = rows(site, "select sop_instance_uid from result where state = 'withdrawn'")
    assert named == {row["sop_instance_uid"] for row in withdrawn}


def test_failing_algorithm_is_retried_then_failed_visibly_and_can_be_run_again(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs, workflow=workflow_text(parameters="{crash: true}"))
    study = new_study(1)
    with running(site, "receiver", "supervisor", "worker"):
        Scanner(site.settings.dimse.port).insist(study)
        wait_for(lambda: study_states(site).get(study[0].StudyInstanceUID) == "failed", 90, "the failure")
    (mean,) = rows(site, "select state, reason, attempts from task where task_id = 'mean'")
    assert (mean["state"], mean["attempts"]) == ("failed", 2)
    assert "mean-value" in mean["reason"]


def test_same_study_by_two_associations_is_one_study(tmp_path: Path, pacs: Orthanc) -> None:
    site = site_with(tmp_path, pacs)
    study = new_study(4)
    with running(site, "receiver", "supervisor", "worker"):
        Scanner(site.settings.dimse.port, calling="CT1").insist(study[:2])
        Scanner(site.settings.dimse.port, calling="CT2").insist(study[2:])
        wait_for(lambda: study_states(site).get(study[0].StudyInstanceUID) == "done", 60, "the study done")
    (row,) = rows(site, "select number_of_instances, number_of_series, generation from study")
    assert (row["number_of_instances"], row["number_of_series"]) == (4, 1)
