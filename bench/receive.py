"""How fast objects are received: caregrid (durable), dcmtk's storescp and Orthanc, side by side on the same input.

    python bench/receive.py [--quick] [--rounds 3] [--large 150] [--small 400] [--folder DIR]

Each receiver is a process of its own and stays up for all rounds; every round sends it the same fresh objects (one real CT slice
under new UIDs, several studies, written beforehand) with dcmtk's storescu, over one association and over four at once. The order
of the receivers changes from round to round, the disk is synced before every measurement, and medians are printed.
dcmtk's programs and Orthanc run with TCP_NODELAY=1 and large PDUs, so that they are shown at their best. What each promises
differs: caregrid answers after file, folder and index are synced; Orthanc after the file is synced (its index is not); storescp
syncs nothing. The sender shares the machine: sender_cpu_ms says how much of it the sender takes. Last line: JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

ENVIRONMENT = os.environ | {"TCP_NODELAY": "1"}
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
SLICES_A_STUDY = 50
ASSOCIATIONS = (1, 4)


@dataclass
class Receiver:
    """A running receiver and what was measured of it: (size, associations) → one value a round."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    rate: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    cpu_ms: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    peak_rss: float = 0.0

    def tree(self) -> list[int]:
        """The process and its children."""
        pids, found = [self.process.pid], []
        while pids:
            pid = pids.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += map(int, (task / "children").read_text().split())
        return found

    def cpu_seconds(self) -> float:
        """User and system time of the tree, children that have ended included."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                total += sum(map(int, fields[11:15]))
        return total / TICK

    def note_memory(self) -> None:
        """Keep the largest resident size of the tree seen so far."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        self.peak_rss = max(self.peak_rss, total / 1e6)


def make_objects(folder: Path, rounds: int, numbers: dict[str, int]) -> None:
    """``folder/<round>/<size>-<associations>/<association>/n.dcm``: part 10 files with UIDs of their own."""
    slice_512 = pydicom.dcmread(get_testdata_file("693_UNCI.dcm"))
    small = pydicom.dcmread(get_testdata_file("693_UNCI.dcm"))
    small.PixelData = slice_512.pixel_array[196:316, 196:316].tobytes()
    small.Rows = small.Columns = 120
    for number in range(rounds):
        for size, dataset in (("512k", slice_512), ("30k", small)):
            for associations in ASSOCIATIONS:
                for association in range(associations):
                    target = folder / str(number) / f"{size}-{associations}" / str(association)
                    target.mkdir(parents=True)
                    write_objects(dataset, target, numbers[size] // associations)


def write_objects(dataset: pydicom.Dataset, folder: Path, count: int) -> None:
    """``count`` copies in studies of SLICES_A_STUDY slices."""
    for index in range(count):
        if index % SLICES_A_STUDY == 0:
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber = index + 1
        dataset.save_as(folder / f"{index}.dcm")


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def receiver(name: str, folder: Path) -> Iterator[Receiver]:
    """A receiver that answers."""
    port, store = free_port(), folder / name
    store.mkdir()
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command(name, port, store), env=ENVIRONMENT, stdout=log, stderr=log)
    started = Receiver(name, port, process, store)
    try:
        wait_for_echo(started)
        yield started
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def command(name: str, port: int, store: Path) -> list[str]:
    """How a receiver is started."""
    if name == "caregrid":
        return [sys.executable, __file__, "--serve", str(port), str(store)]
    if name == "storescp":
        return ["/usr/bin/storescp", "--fork", "+B", "-pdu", "131072", "-aet", "CAREGRID", "-od", str(store), str(port)]
    settings = {
        "Name": "bench",
        "DicomAet": "CAREGRID",
        "DicomPort": port,
        "HttpPort": free_port(),
        "StorageDirectory": str(store),
        "IndexDirectory": str(store),
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "MaximumPduLength": 131072,
        "Plugins": [],
    }
    configuration = store.parent / "orthanc.json"
    configuration.write_text(json.dumps(settings))
    return [shutil.which("Orthanc") or "/usr/sbin/Orthanc", str(configuration)]


def wait_for_echo(of: Receiver) -> None:
    """Until it answers C-ECHO."""
    deadline = time.monotonic() + 30
    echo = ["/usr/bin/echoscu", "-to", "2", "-aec", "CAREGRID", "127.0.0.1", str(of.port)]
    while subprocess.run(echo, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
        if time.monotonic() > deadline or of.process.poll() is not None:
            raise SystemExit(f"{of.name} did not start")
        time.sleep(0.1)


def kept(of: Receiver) -> int:
    """How many objects the receiver has under their final names."""
    skip = ("index", "index-wal", "index-shm", "index-journal")
    if of.name == "caregrid":
        return sum(1 for file in (of.folder / "store" / "instances").rglob("*.dcm") if file.is_file())
    return sum(1 for file in of.folder.rglob("*") if file.is_file() and file.name not in skip)


def measure(of: Receiver, folder: Path, size: str, associations: int) -> float:
    """Send the objects of one folder; returns the sender's CPU seconds."""
    sources = sorted(folder.iterdir())
    count = sum(len(list(source.iterdir())) for source in sources)
    os.sync()
    before_kept, before_cpu, before_sender = kept(of), of.cpu_seconds(), children_cpu()
    stop = threading.Event()
    watch = threading.Thread(target=lambda: [of.note_memory() for _ in iter(lambda: stop.wait(0.1), True)])
    watch.start()
    start = time.perf_counter()
    send = ["/usr/bin/storescu", "-R", "-aec", "CAREGRID", "+sd", "127.0.0.1", str(of.port)]
    senders = [subprocess.Popen([*send, str(source)], env=ENVIRONMENT, stderr=subprocess.DEVNULL) for source in sources]
    codes = [sender.wait() for sender in senders]
    elapsed = time.perf_counter() - start
    stop.set()
    watch.join()
    of.note_memory()
    before_sender = children_cpu() - before_sender
    if any(codes) or settled(of, before_kept + count) < before_kept + count:
        raise SystemExit(f"{of.name} lost objects: sender said {codes}, {kept(of) - before_kept} of {count} are there")
    of.rate.setdefault((size, associations), []).append(count / elapsed)
    of.cpu_ms.setdefault((size, associations), []).append((of.cpu_seconds() - before_cpu) / count * 1000)
    return before_sender / count * 1000


def settled(of: Receiver, expected: int) -> int:
    """The number kept, once it is the expected one or two seconds have passed."""
    deadline = time.monotonic() + 2
    while (number := kept(of)) < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    return number


def children_cpu() -> float:
    """CPU seconds of ended children: the senders."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare(rounds: int, numbers: dict[str, int], folder: Path) -> dict[str, float]:
    """Run everything and return the JSON's content."""
    make_objects(folder / "objects", rounds, numbers)
    sender_cpu: dict[str, list[float]] = {"512k": [], "30k": []}
    with contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(receiver(name, folder)) for name in ("caregrid", "storescp", "orthanc")]
        for number in range(rounds):
            order = receivers[number % 3 :] + receivers[: number % 3]
            for size in ("512k", "30k"):
                for associations in ASSOCIATIONS:
                    objects = folder / "objects" / str(number) / f"{size}-{associations}"
                    for each in order:
                        sender_cpu[size].append(measure(each, objects, size, associations))
            shutil.rmtree(folder / "objects" / str(number))
    return report(receivers, {size: statistics.median(values) for size, values in sender_cpu.items()})


def report(receivers: list[Receiver], sender_cpu: dict[str, float]) -> dict[str, float]:
    """Print a table; the same as a flat dictionary."""
    found: dict[str, float] = {}
    print(f"{'receiver':10} {'size':5} {'assoc.':>6} {'instances/s':>12} {'CPU ms each':>12} {'peak RSS MB':>12}")
    for each in receivers:
        for (size, associations), rates in sorted(each.rate.items(), reverse=True):
            suffix = f"{associations}" + ("" if size == "512k" else "_30k")
            rate, cpu = statistics.median(rates), statistics.median(each.cpu_ms[(size, associations)])
            found[f"rate_{each.name}_{suffix}"] = round(rate, 1)
            found[f"cpu_ms_{each.name}_{suffix}"] = round(cpu, 2)
            print(f"{each.name:10} {size:5} {associations:6} {rate:12.1f} {cpu:12.2f} {each.peak_rss:12.1f}")
        found[f"rss_mb_{each.name}"] = round(each.peak_rss, 1)
    for peer in ("orthanc", "storescp"):
        for suffix in ("1", "4", "1_30k", "4_30k"):
            found[f"vs_{peer}_{suffix}"] = round(found[f"rate_caregrid_{suffix}"] / found[f"rate_{peer}_{suffix}"], 2)
    for size, value in sender_cpu.items():
        found["sender_cpu_ms" + ("" if size == "512k" else "_30k")] = round(value, 2)
    return found


def serve_caregrid(port: int, folder: Path) -> None:
    """The receiver as a site runs it: door, store and SQLite index in one process."""
    from caregrid.domain.settings import DimseSettings
    from caregrid.intake.dimse import serve
    from caregrid.store.database import create_all, open_engine
    from caregrid.store.instances import InstanceStore

    engine = open_engine(f"sqlite:///{folder}/site.db")
    create_all(engine)
    store = InstanceStore(engine, folder / "store", free_bytes_floor=0)
    serve(DimseSettings(host="127.0.0.1", port=port), store.receive)


def main() -> None:
    """Read the arguments and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer objects: ends within 40 s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=160, help="512 KB objects a measurement")
    parser.add_argument("--small", type=int, default=400, help="30 KB objects a measurement")
    parser.add_argument("--folder", type=Path, help="where to receive, on the disk to be measured (not a RAM disk)")
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_caregrid(int(given.serve[0]), Path(given.serve[1]))
        return
    numbers = {"512k": 60, "30k": 100} if given.quick else {"512k": given.large, "30k": given.small}
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="caregrid-receive-") as folder:
        print(json.dumps(compare(given.rounds, numbers, Path(folder))))


if __name__ == "__main__":
    main()
