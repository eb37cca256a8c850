"""C-STORE receive: caregrid beside dcmtk storescp and Orthanc, on identical input, in one run.

caregrid is run as in production (its own process, SQLite, every object synced and indexed before it is acknowledged); storescp
keeps files without syncing or indexing, at its fastest settings (``+B``, large PDUs, a process for each association); Orthanc
runs with its own defaults. ``TCP_NODELAY=1`` stands in the environment of every dcmtk-based program: without it each object
waits 40 ms for a delayed acknowledgement, which would flatter us. The sender is dcmtk's storescu.

    python bench/receive.py [--quick] [--folder /a/folder/on/the/disk/to/measure]

The last line is JSON: per_s_*, cpu_ms_* (receiver's processor time an object, its whole process tree), rss_mb_* (its peak
memory), and vs_orthanc_*, vs_storescp_* (ratios of objects a second; above 1: caregrid is faster). Suffixes: the number of
associations, and ``_30k`` for the small objects; without it an object is a CT slice of 512 KB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import pydicom
from pydicom.data import get_testdata_file

from caregrid.setup import init_site

STORESCU, STORESCP = "/usr/bin/storescu", "/usr/bin/storescp"
ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
TICK = os.sysconf("SC_CLK_TCK")
STUDIES, SERIES = 4, 2

SETTINGS = """
[site]
name = "Bench"
[dimse]
host = "127.0.0.1"
port = {port}
[web]
port = {web}
[engine]
free_bytes_floor = 1000000
"""


@dataclass
class Receiver:
    """A server under measurement: how to reach it, whose processor time counts, how many objects it has kept."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    kept: Callable[[], int]


@dataclass
class Usage:
    """What one run cost. seconds: wall clock; cpu: seconds of processor time; rss: peak bytes."""

    seconds: float
    cpu: float
    rss: float


@dataclass
class Figures:
    """Every measured value by its name in the last line."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def medians(self) -> dict[str, float]:
        """Median over the rounds."""
        return {name: statistics.median(values) for name, values in sorted(self.values.items())}


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# what is sent -----------------------------------------------------------------------------------------------------------


def _template(columns: int) -> tuple[bytes, dict[str, bytes]]:
    """A real CT slice (cut to columns × columns) with placeholder UIDs of full length to be replaced in its bytes."""
    slice_ = pydicom.dcmread(get_testdata_file("693_UNCR.dcm"))
    if columns != slice_.Columns:
        slice_.PixelData = slice_.pixel_array[:columns, :columns].tobytes()
        slice_.Rows = slice_.Columns = columns
    marks = {name: f"2.25.{number}{'7' * 38}" for number, name in enumerate(("study", "series", "object"), 1)}
    slice_.StudyInstanceUID, slice_.SeriesInstanceUID = marks["study"], marks["series"]
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = marks["object"]
    file = BytesIO()
    slice_.save_as(file)
    return file.getvalue(), {name: mark.encode() for name, mark in marks.items()}


def _uid() -> bytes:
    return f"2.25.{uuid.uuid4().int:039d}".replace("2.25.0", "2.25.1").encode()


def make_objects(folder: Path, count: int, associations: int, columns: int) -> int:
    """Write ``count`` objects with fresh UIDs, dealt to one folder for each association; returns an object's size in bytes."""
    template, marks = _template(columns)
    studies = [(_uid(), [_uid() for _ in range(SERIES)]) for _ in range(STUDIES)]
    for number in range(count):
        study, series = studies[number % STUDIES]
        made = template.replace(marks["study"], study).replace(marks["series"], series[number // STUDIES % SERIES])
        target = folder / str(number % associations)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number:06d}.dcm").write_bytes(made.replace(marks["object"], _uid()))
    return len(template)


# who receives -----------------------------------------------------------------------------------------------------------


def start_caregrid(folder: Path) -> Receiver:
    """A site's receiver process, as in production."""
    home, port = folder / "site", free_port()
    init_site(home, "Bench", builtin=False, settings=SETTINGS.format(port=port, web=free_port()))
    command = [sys.executable, "-m", "caregrid.cli", "site", "part", "receiver", "--home", str(home)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kept() -> int:
        with sqlite3.connect(home / "data" / "site.db") as database:
            return int(database.execute("select count(*) from instance").fetchone()[0])

    return _ready(Receiver("caregrid", port, process, kept))


def start_storescp(folder: Path) -> Receiver:
    """dcmtk's receiver at its fastest."""
    target, port = folder / "storescp", free_port()
    target.mkdir()
    command = [STORESCP, "--fork", "+B", "-pdu", "131072", "-od", str(target), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return _ready(Receiver("storescp", port, process, lambda: sum(1 for _ in target.iterdir())))


def start_orthanc(folder: Path) -> Receiver:
    """Orthanc with its defaults, without plugins."""
    target, port, http = folder / "orthanc", free_port(), free_port()
    target.mkdir()
    settings = {
        "StorageDirectory": str(target),
        "DicomPort": port,
        "HttpPort": http,
        "DicomAlwaysAllowStore": True,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings | {"DicomAet": "ORTHANC", "DicomCheckCalledAet": False}))
    command = [ORTHANC, str(folder / "orthanc.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kept() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/statistics", timeout=30) as answer:
            return int(json.load(answer)["CountInstances"])

    return _ready(Receiver("orthanc", port, process, kept))


def _ready(receiver: Receiver) -> Receiver:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", receiver.port)) == 0:
                return receiver
        time.sleep(0.1)
    raise SystemExit(f"{receiver.name} did not start")


# measuring --------------------------------------------------------------------------------------------------------------


def _tree(root: int) -> list[int]:
    """The process and all its descendants."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _cpu(root: int) -> float:
    """Seconds of processor time of the tree, children that ended included."""
    ticks = 0
    for pid in _tree(root):
        try:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / TICK


def _rss(root: int) -> int:
    """Peak resident bytes, summed over the tree as it stands now."""
    total = 0
    for pid in _tree(root):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    return total


def measure(receiver: Receiver, corpus: Path, count: int) -> Usage:
    """Send the corpus, one storescu for each of its folders; raises SystemExit when not every object was kept."""
    before_kept, before_cpu, peak, over = receiver.kept(), _cpu(receiver.process.pid), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            peak[0] = max(peak[0], _rss(receiver.process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    senders = [
        subprocess.Popen([STORESCU, "-aec", "CAREGRID", "+sd", "127.0.0.1", str(receiver.port), str(each)])
        for each in sorted(corpus.iterdir())
    ]
    codes = [sender.wait() for sender in senders]
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    cpu = _cpu(receiver.process.pid) - before_cpu
    kept = receiver.kept() - before_kept
    if any(codes) or kept != count:
        raise SystemExit(f"{receiver.name} kept {kept} of {count}; storescu ended with {codes}")
    return Usage(seconds, cpu, max(peak[0], _rss(receiver.process.pid)))


def _warm_up(receivers: list[Receiver], folder: Path) -> None:
    """Every receiver has loaded its code and made its files before anything is measured."""
    corpus = folder / "warm-up"
    make_objects(corpus, 30, 1, 121)
    for receiver in receivers:
        measure(receiver, corpus, 30)
    os.sync()
    time.sleep(1.5)


def one_round(receivers: list[Receiver], folder: Path, plan: dict[tuple[int, str], int], number: int, figures: Figures) -> None:
    """Every size and number of associations once, the receivers in another order each time."""
    for step, ((associations, size), count) in enumerate(plan.items()):
        corpus = folder / f"corpus-{number}-{associations}{size}"
        make_objects(corpus, count, associations, 512 if not size else 121)
        os.sync()
        turn = (number + step) % len(receivers)
        for receiver in receivers[turn:] + receivers[:turn]:
            used = measure(receiver, corpus, count)
            key = f"{receiver.name}_{associations}{size}"
            figures.values[f"per_s_{key}"].append(count / used.seconds)
            figures.values[f"cpu_ms_{key}"].append(used.cpu / count * 1000)
            figures.values[f"rss_mb_{key}"].append(used.rss / (1 << 20))
            print(f"round {number + 1}  {key:<18} {count / used.seconds:7.1f}/s", end="")
            print(f"  {used.cpu / count * 1000:6.2f} ms  {used.rss >> 20:4} MB")
        shutil.rmtree(corpus)


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """caregrid's objects a second over each peer's."""
    return {
        f"vs_{peer}_{suffix}": medians[f"per_s_caregrid_{suffix}"] / medians[f"per_s_{peer}_{suffix}"]
        for peer in ("orthanc", "storescp")
        for suffix in ("1", "4", "1_30k", "4_30k")
    }


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer objects; ends within 40 s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; its disk is what is measured")
    asked = parser.parse_args()
    os.environ["TCP_NODELAY"] = "1"
    counts = (120, 240, 200, 400) if asked.quick else (300, 600, 600, 1200)
    plan = dict(zip(((1, ""), (4, ""), (1, "_30k"), (4, "_30k")), counts, strict=True))
    figures, began, receivers = Figures(), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="caregrid-bench-", dir=asked.folder) as place:
        folder = Path(place)
        try:
            for start in (start_caregrid, start_storescp, start_orthanc):
                receivers.append(start(folder))
            _warm_up(receivers, folder)
            for number in range(asked.rounds):
                one_round(receivers, folder, plan, number, figures)
                if asked.quick and (time.monotonic() - began) * (number + 2) / (number + 1) > 33:
                    break
        finally:
            for receiver in receivers:
                receiver.process.send_signal(signal.SIGTERM)
                receiver.process.wait(20)
    medians = figures.medians()
    print(json.dumps({name: round(value, 2) for name, value in (ratios(medians) | medians).items()}))


if __name__ == "__main__":
    main()
