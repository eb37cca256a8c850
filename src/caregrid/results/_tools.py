"""Asks other people's validators about a result: dcmtk's dcmftest, dcmdump and dsrdump, and David Clunie's dciodvfy."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydicom.datadict import tag_for_keyword

from caregrid.results._common import IDENTITY_TYPE_2, IDENTITY_TYPE_3
from caregrid.results._subject import KO, SR

_SECONDS = 120

#: Those that say only whether a file can be read.
READERS = ("dcmftest", "dcmdump", "dsrdump")

#: What we copy from the source as it is: its faults are the source's, and must not hold a result back.
_COPIED = {*IDENTITY_TYPE_2, *IDENTITY_TYPE_3}
_COPIED_TAGS = {tag for keyword in _COPIED if (tag := tag_for_keyword(keyword)) is not None}


@dataclass(frozen=True)
class Opinion:
    """What one tool says. A tool that is not installed has none."""

    tool: str
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def ask(sop_class: str, result: Path | bytes) -> list[Opinion]:
    """The opinions of all tools on this machine that can judge the object, in parallel. result: its file, or its bytes."""
    if isinstance(result, bytes):
        with tempfile.TemporaryDirectory(prefix="caregrid-check-") as folder:
            path = Path(folder) / "result.dcm"
            path.write_bytes(result)
            return ask(sop_class, path)
    judges: list[Callable[[Path], Opinion | None]] = [_dciodvfy, _dcmdump, _dcmftest]
    if sop_class in (SR, KO):
        judges.append(_dsrdump)
    with ThreadPoolExecutor(len(judges)) as pool:
        return [opinion for opinion in pool.map(lambda judge: judge(result), judges) if opinion is not None]


def _run(arguments: list[str], listen: bool) -> tuple[int, str] | None:
    """Exit code, and all output where somebody listens; None when the tool is not installed."""
    tool = shutil.which(arguments[0])
    if tool is None:
        return None
    try:
        said = subprocess.PIPE if listen else subprocess.DEVNULL
        done = subprocess.run([tool, *arguments[1:]], stdout=said, stderr=said, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"did not finish in {_SECONDS} s"
    return done.returncode, ((done.stdout or b"") + (done.stderr or b"")).decode("utf-8", "replace")


def _plain(tool: str, arguments: list[str]) -> Opinion | None:
    """The opinion of a tool that says only yes or no."""
    said = _run([tool, *arguments], listen=False)
    if said is None:
        return None
    return Opinion(tool, errors=() if said[0] == 0 else (f"exit code {said[0]}",))


def _dcmftest(path: Path) -> Opinion | None:
    return _plain("dcmftest", [str(path)])


def _dcmdump(path: Path) -> Opinion | None:
    return _plain("dcmdump", ["-q", str(path)])


def _dsrdump(path: Path) -> Opinion | None:
    return _plain("dsrdump", ["-q", str(path)])


def _dciodvfy(path: Path) -> Opinion | None:
    said = _run(["dciodvfy", str(path)], listen=True)
    return None if said is None else read_dciodvfy(said[1])


def read_dciodvfy(text: str) -> Opinion:
    """Its ``Error -`` and ``Warning -`` lines without values; errors in what the source handed us count as warnings."""
    errors: list[str] = []
    warnings: list[str] = []
    for line in text.splitlines():
        kind, dash, message = line.partition(" - ")
        if not dash or kind not in ("Error", "Warning", "Abort"):
            continue
        copied = kind == "Error" and _is_copied(message)
        (warnings if kind == "Warning" or copied else errors).append(_without_values(message))
    return Opinion("dciodvfy", tuple(dict.fromkeys(errors)), tuple(dict.fromkeys(warnings)))


def _is_copied(message: str) -> bool:
    tag = re.search(r"\(0x([0-9a-fA-F]{4}),0x([0-9a-fA-F]{4})\)", message)
    if tag and int(tag[1] + tag[2], 16) in _COPIED_TAGS:
        return True
    element = re.search(r"[Ee]lement=<(\w+)>", message)
    return bool(element and element[1] in _COPIED)


def _without_values(message: str) -> str:
    """dciodvfy quotes values, which may be a patient's: ``PN [1] = <…>``."""
    return re.sub(r"\s*= <.*", "", message).strip()
