"""Names of a patient, planted in a study, appear in no log, no reason and no audit record."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.scanner import Scanner, new_study
from tests.support.site import make_site, rows, running, settings_text, wait_for, workflow_text

CANARIES = {
    "PatientName": "CANARYNAME^JANE",
    "PatientID": "CANARYID4711",
    "AccessionNumber": "CANARYACC1",
    "ReferringPhysicianName": "CANARYDOCTOR^JO",
    "StudyDescription": "CANARYSTUDY",
    "PatientComments": "CANARYCOMMENT",
}


@pytest.mark.network
def test_no_patient_data_in_logs_reasons_or_audit(tmp_path: Path) -> None:
    with Orthanc(tmp_path, aet="PACS") as pacs:
        settings = settings_text(pacs.dicom_port, dimse_port=free_port(), web_port=free_port())
        site = make_site(tmp_path / "site", settings, workflow_text())
        good, odd, bad = new_study(1, **CANARIES), new_study(1, **CANARIES, Modality="NM"), new_study(1, **CANARIES)
        bad[0].StudyInstanceUID = ""
        clash = new_study(1, **CANARIES)[0]
        clash.SOPInstanceUID = clash.file_meta.MediaStorageSOPInstanceUID = good[0].SOPInstanceUID
        clash.StudyInstanceUID = good[0].StudyInstanceUID
        with running(site, "receiver", "supervisor", "worker"):
            scanner = Scanner(site.settings.dimse.port)
            scanner.insist(good)
            scanner.insist(odd)
            assert scanner.send(bad)[0] > 0
            scanner.insist([clash])
            Scanner(site.settings.dimse.port, called="NOTUS").send(good)
            ended = "select count(*) as n from study where state in ('done', 'no-workflow')"
            wait_for(lambda: rows(site, ended) == [{"n": 2}], 90, "both studies ended")
    told = [path.read_text(errors="replace") for path in (tmp_path / "site").glob("*.log")]
    for table, columns in (
        ("audit", "why || ' ' || detail || ' ' || subject"),
        ("verdict", "reason || ' ' || trail"),
        ("task", "reason"),
        ("run", "state_reason"),
        ("study", "state_reason"),
        ("quarantine", "reason"),
        ("rejection", "reason || ' ' || what"),
        ("delivery", "last_error || ' ' || receiver_said"),
    ):
        found = rows(site, f"select {columns} as words from {table}")
        assert found, f"{table} has nothing to look at"
        told += [str(row["words"]) for row in found]
    whole = "\n".join(told)
    assert "CANARY" not in whole
    kept = rows(site, "select patient_name from study")
    assert any("CANARYNAME" in row["patient_name"] for row in kept), "the canaries did arrive"
