"""The main job on embedded defaults: a site and a small PACS on this machine, real studies in, results in PACS.

The studies come with pydicom and pydicom-data: a chest X-ray, ultrasound, CT and MR of real machines. One has no workflow, to
show how a non-run is explained, and one object is damaged, to show quarantine.
"""

from __future__ import annotations

import logging
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import sqlalchemy as sa
from PIL import Image
from pydicom.data import get_testdata_file
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from caregrid.demo.pacs import DemoPacs
from caregrid.domain.settings import Destination
from caregrid.engine.judge import add_workflow
from caregrid.errors import BadSetting, DeliveryFailed
from caregrid.plugs import load
from caregrid.setup import MadeSite, init_site
from caregrid.site import Keeper, Site
from caregrid.store.database import reading
from caregrid.store.tables import delivery, quarantine, result, run, study, task
from caregrid.store.users import create_user

#: File of pydicom or pydicom-data → what it is.
STUDIES = {
    "RG1_UNCR.dcm": "chest X-ray, 1955 × 1841",
    "color3d_jpeg_baseline.dcm": "ultrasound cine, 120 frames",
    "eCT_Supplemental.dcm": "enhanced CT, 2 frames",
    "MR-SIEMENS-DICOM-WithOverlays.dcm": "MR of the abdomen",
    "examples_palette.dcm": "ultrasound still",
}
ENDED = ("done", "failed", "no-workflow", "awaiting-review", "cancelled", "held")
PASSWORDS = {"clinician": "reads-with-care-24", "operator": "keeps-it-moving-24"}

SETTINGS = """\
[site]
name = "Demo Hospital"

[dimse]
host = "127.0.0.1"
port = {dimse}

[web]
port = {web}

[engine]
poll_seconds = 0.1
heartbeat_seconds = 1

[[completion]]
source = "*"
quiet_seconds = 2

[[destination]]
name = "PACS"
kind = "cstore"
host = "127.0.0.1"
port = {pacs}
ae_title = "PACS"
first_backoff_seconds = 1
"""


@dataclass(frozen=True)
class Ports:
    """Free ports of this machine."""

    dimse: int
    web: int
    pacs: int


def run_demo(output: Path, keep: bool = False) -> None:
    """Run the demo in ``output`` (made anew). Raises BadSetting when the folder is somebody else's."""
    console = Console()
    output = output.resolve()
    _clear(output)
    ports = Ports(*_free_ports(3))
    console.print("[bold]caregrid demo[/]: a hospital site and a small PACS on this machine\n")
    made = init_site(output / "site", "Demo Hospital", who="demo", settings=SETTINGS.format(**ports.__dict__))
    for reason in made.left_out:
        console.print(f"[yellow]left out[/]: {reason}")
    site = Site.open(made.home)
    _add_workflows(site, made)
    _add_users(site)
    pacs = DemoPacs(output / "pacs", ports.pacs)
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    pacs.start()
    keeper = Keeper(site.settings)
    keeper.start()
    try:
        _wait_for_ports((ports.dimse, ports.web))
        _send(console, site)
        _watch(site)
        pictures = _pictures(site, output / "pictures")
        _report(console, site, pacs, pictures)
        _farewell(console, site, output, keep)
    finally:
        keeper.stop()
        pacs.stop()
        site.close()


def _clear(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        if not (output / "site" / "site.toml").exists():
            raise BadSetting(file=output, key="--output", reason="is a folder with other things in it; name an empty one")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _add_workflows(site: Site, made: MadeSite) -> None:
    installed = {model.partition(" ")[0] for model in made.models}
    for file in sorted((Path(__file__).parent / "workflows").glob("*.yaml")):
        if file.stem in installed:
            add_workflow(site.engine, file.read_text("utf-8"), file.name, "demo", "part of the demo")


def _add_users(site: Site) -> None:
    for role, password in PASSWORDS.items():
        create_user(site.engine, role, password, [role], full_name=f"Demo {role}", who="demo", why="part of the demo")


def _wait_for_ports(ports: Sequence[int], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    for port in ports:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline:
                raise DeliveryFailed(destination=f"port {port}", reason="the site did not start; see its messages above")
            time.sleep(0.1)


def _send(console: Console, site: Site) -> None:
    """Send every study by C-STORE, as a scanner would, then a damaged object."""
    to = Destination(
        "CAREGRID", "cstore", host="127.0.0.1", port=site.settings.dimse.port, ae_title="CAREGRID", calling_ae="SCANNER1"
    )
    send = load("results", "cstore").send
    for name, words in STUDIES.items():
        path = get_testdata_file(name, download=False)
        if path is None:
            console.print(f"[yellow]left out[/]: {words} ({name} is not in this pydicom)")
            continue
        (answer,) = send(to, [Path(path)])
        console.print(f"sent {words}: the site answered {answer.status}")
    _send_damaged(console, site)


def _send_damaged(console: Console, site: Site) -> None:
    """An object without a Study Instance UID: refused by name, kept in quarantine, and the line goes on."""
    from pynetdicom import AE

    dataset = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    del dataset.StudyInstanceUID
    ae = AE("SCANNER1")
    ae.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = ae.associate("127.0.0.1", site.settings.dimse.port, ae_title="CAREGRID")
    if association.is_established:
        status = association.send_c_store(dataset)
        association.release()
        console.print(f"sent a damaged object: the site answered {int(status.Status):04X}, and keeps it in quarantine\n")


def _rows(site: Site, query: sa.Select[Any]) -> list[Any]:
    with reading(site.engine) as connection:
        return list(connection.execute(query).all())


def _watch(site: Site, seconds: float = 110) -> None:
    """Show the runs until every study has ended."""
    deadline = time.monotonic() + seconds
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        bars: dict[str, Any] = {}
        while time.monotonic() < deadline:
            rows = _rows(site, sa.select(study.c.study_instance_uid, study.c.modalities, study.c.state))
            for row in rows:
                if row.study_instance_uid not in bars:
                    bars[row.study_instance_uid] = progress.add_task(f"{row.modalities:<4} study", total=4, state=row.state)
                progress.update(bars[row.study_instance_uid], completed=_steps(row.state), state=row.state)
            if rows and all(row.state in ENDED for row in rows):
                return
            time.sleep(0.2)


def _steps(state: str) -> int:
    return {"receiving": 1, "complete": 2, "processing": 3}.get(state, 4)


def _pictures(site: Site, folder: Path) -> list[Path]:
    """The secondary captures as PNG."""
    folder.mkdir()
    made = []
    query = sa.select(result.c.path, run.c.workflow).join(run, run.c.id == result.c.run_id).where(result.c.kind == "dicom_sc")
    for number, row in enumerate(_rows(site, query.order_by(run.c.workflow, result.c.sop_instance_uid)), start=1):
        path = folder / f"{number:02d}-{row.workflow}.png"
        Image.fromarray(pydicom.dcmread(site.folder / row.path).pixel_array).save(path)
        made.append(path)
    return made


def _report(console: Console, site: Site, pacs: DemoPacs, pictures: Sequence[Path]) -> None:
    table = Table(
        "modality", "state", "workflow", "what was found, or why nothing ran", "in PACS", title="Studies", title_justify="left"
    )
    for row in _rows(site, sa.select(study).order_by(study.c.first_received_at)):
        runs = _rows(site, sa.select(run).where(run.c.study_instance_uid == row.study_instance_uid))
        if not runs:
            table.add_row(row.modalities, row.state, "", row.state_reason, "")
        for each in runs:
            summary, delivered = _run_facts(site, each.id, pacs)
            table.add_row(row.modalities, row.state, each.workflow, summary, delivered)
    console.print(table)
    for row in _rows(site, sa.select(quarantine.c.error, quarantine.c.reason)):
        console.print(f"In quarantine: {row.error}: {row.reason}")
    console.print(f"\n{len(pictures)} pictures in {pictures[0].parent}" if pictures else "\nno pictures were made")


def _run_facts(site: Site, run_id: str, pacs: DemoPacs) -> tuple[str, str]:
    words = _rows(site, sa.select(task.c.reason).where(task.c.run_id == run_id, task.c.kind == "run").order_by(task.c.position))
    sent = _rows(site, sa.select(delivery.c.sop_instance_uid, delivery.c.state).where(delivery.c.run_id == run_id))
    there = sum(1 for each in sent if each.state == "delivered" and each.sop_instance_uid in pacs.stored)
    return "; ".join(each.reason for each in words), f"{there} of {len(sent)} objects"


def _farewell(console: Console, site: Site, output: Path, keep: bool) -> None:
    address = f"http://127.0.0.1:{site.settings.web.port}/"
    logins = ", ".join(f"{name} / {password}" for name, password in PASSWORDS.items())
    console.print(f"The PACS's files lie in {output / 'pacs'}, the site in {output / 'site'}.")
    console.print(f"Pages: {address} — sign in as {logins}")
    if not keep:
        console.print(f"The site stops now; see its pages with: caregrid site start --home {output / 'site'}")
        return
    console.print("The site stays up; stop it with Ctrl-C.")
    _until_interrupted(lambda: time.sleep(1))


def _until_interrupted(wait: Callable[[], None]) -> None:
    try:
        while True:
            wait()
    except KeyboardInterrupt:
        return
