"""Fifty random kill -9 while sixty studies arrive: nothing acknowledged is lost, nothing is delivered twice."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from caregrid.store import audit
from caregrid.store.database import reading
from tests.support.orthanc import Orthanc
from tests.support.ports import free_port
from tests.support.scanner import Scanner, new_study, send_all
from tests.support.site import Part, make_site, rows, running, settings_text, wait_for, workflow_text

STUDIES, INSTANCES, KILLS = 60, 2, 50


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_storm(tmp_path: Path, database_url: str) -> None:
    rng = random.Random(11)
    with Orthanc(tmp_path, aet="PACS") as pacs:
        settings = settings_text(pacs.dicom_port, database=database_url, dimse_port=free_port(), web_port=free_port())
        site = make_site(tmp_path / "site", settings, workflow_text(parameters="{sleep_seconds: 0.2}"))
        studies = [new_study(INSTANCES) for _ in range(STUDIES)]
        scanners = [Scanner(site.settings.dimse.port, calling=f"CT{number}") for number in range(3)]
        killed: list[str] = []
        with running(site, "receiver", "supervisor", "worker", "worker#2") as parts:
            sending = threading.Thread(
                target=send_all, args=([(each, studies[number::3]) for number, each in enumerate(scanners)], 0.3)
            )
            sending.start()
            victims = [parts["receiver"], parts["worker"], parts["worker#2"]]
            for _ in range(KILLS):
                time.sleep(rng.uniform(0.2, 1.2))
                _kill(rng.choice(victims), killed)
            sending.join(timeout=240)
            assert not sending.is_alive()
            wait_for(lambda: _all_done(site), 240, "every study done")
        assert len(killed) == KILLS
        acknowledged = set().union(*(scanner.acknowledged for scanner in scanners))
        _check_nothing_lost(site, studies, acknowledged)
        _check_delivered_once(site, pacs)
        with reading(site.engine) as connection:
            audit.verify(connection)


def _kill(part: Part, killed: list[str]) -> None:
    part.kill()
    part.start()
    killed.append(part.role)


def _all_done(site: object) -> bool:
    states = rows(site, "select state, count(*) as n from study group by state")  # type: ignore[arg-type]
    return states == [{"state": "done", "n": STUDIES}]


def _check_nothing_lost(site: object, studies: list[list[pydicom.Dataset]], acknowledged: set[str]) -> None:
    kept = {row["sop_instance_uid"]: row for row in rows(site, "select * from instance where copy = 0")}  # type: ignore[arg-type]
    sent = {str(each.SOPInstanceUID): each for study in studies for each in study}
    assert acknowledged == set(sent), "the scanners insist until everything is acknowledged"
    assert set(kept) == set(sent)
    assert rows(site, "select * from instance where copy > 0") == []  # type: ignore[arg-type]
    for uid, row in kept.items():
        stored = pydicom.dcmread(site.folder / row["path"])  # type: ignore[attr-defined]
        assert stored.PixelData == sent[uid].PixelData
        assert stored == sent[uid]


def _check_delivered_once(site: object, pacs: Orthanc) -> None:
    made = rows(site, "select sop_instance_uid, sha256, path from result")  # type: ignore[arg-type]
    assert len(made) == STUDIES * 2, "one SR and one SC a study, however often its worker died"
    there = {}
    for identifier in pacs.instances():
        dataset = pydicom.dcmread(BytesIO(pacs.dicom(identifier)))
        there[str(dataset.SOPInstanceUID)] = dataset
    assert set(there) == {row["sop_instance_uid"] for row in made}
    for row in made:
        content = (site.folder / row["path"]).read_bytes()  # type: ignore[attr-defined]
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert there[row["sop_instance_uid"]] == pydicom.dcmread(BytesIO(content))
    outbox = rows(site, "select state, count(*) as n from delivery group by state")  # type: ignore[arg-type]
    assert outbox == [{"state": "delivered", "n": STUDIES * 2}]
    told = rows(site, "select count(*) as n from audit where what = 'result delivered'")  # type: ignore[arg-type]
    assert told == [{"n": STUDIES * 2}]
