"""Findings cross unchanged, and nothing else gets through."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caregrid.domain.codes import MILLILITRE, PRESENT, Code
from caregrid.domain.findings import Evaluation, Finding, Findings, Measurement, Picture, Segment
from caregrid.errors import AlgorithmBroken
from caregrid.registry.manifest import parse_manifest
from caregrid.runtime.exchange import finding_as_json, finding_from_json, read_findings, write_findings
from tests.unit.registry.packages import MANIFEST

MANIFEST_OF = parse_manifest(MANIFEST.format(name="counting", version="1.0.0", timeout=30, memory=512))
LUNG = Code("39607008", "SCT", "Lung")
LEFT = Code("44029006", "SCT", "Left lung")
VOLUME = Code("118565006", "SCT", "Volume")
INFLATED = Code("57297003", "SCT", "Hyperinflation of lung")
BODY = Code("123037004", "SCT", "Anatomical Structure")


def whole() -> Findings:
    rng = np.random.default_rng(1)
    return Findings(
        summary="Left lung 2.3 l",
        findings=(
            Finding(
                tracking_id="left",
                concept=LUNG,
                site=LEFT,
                segment="left lung",
                measurements=(
                    Measurement(VOLUME, 2310.5, MILLILITRE),
                    Measurement(VOLUME, None, MILLILITRE, Code("114007", "DCM", "Measurement not attempted")),
                ),
                evaluations=(Evaluation(INFLATED, PRESENT),),
                source_instances=("1.2.3", "1.2.4"),
                frames=(1, 3),
                confidence=0.75,
            ),
        ),
        segments=(
            Segment("left lung", BODY, LEFT, rng.random((3, 7, 5)) > 0.5, "1.2"),
            Segment("rest", BODY, LEFT, np.zeros((3, 7, 5), bool), "1.2"),
        ),
        pictures=(Picture("Overlay", rng.integers(0, 255, (4, 6, 3), dtype=np.uint8), ("1.2.3",)),),
        used_instances=("1.2.3", "1.2.4"),
        values={"ml": 2310.5, "found": True, "slices": 3, "word": "schön"},
        warnings=("tilted",),
    )


def same(one: Findings, other: Findings) -> bool:
    plain = [
        (
            f.summary,
            f.findings,
            f.used_instances,
            f.values,
            f.warnings,
            [(s.label, s.category, s.type, s.source_series) for s in f.segments],
        )
        for f in (one, other)
    ]
    arrays = [[s.mask for s in f.segments] + [p.array for p in f.pictures] for f in (one, other)]
    return plain[0] == plain[1] and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*arrays, strict=True))


def test_whole_findings_cross_unchanged(tmp_path: Path) -> None:
    write_findings(whole(), tmp_path)
    assert same(read_findings(tmp_path, MANIFEST_OF), whole())


def test_an_answer_without_arrays(tmp_path: Path) -> None:
    write_findings(Findings("nothing seen"), tmp_path)
    assert not (tmp_path / "arrays.npz").exists()
    assert read_findings(tmp_path, MANIFEST_OF) == Findings("nothing seen")


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    values = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}
    write_findings(Findings("x", values=values), tmp_path)
    assert read_findings(tmp_path, MANIFEST_OF).values == {"a": 0.5, "b": 3, "c": True}


def test_a_finding_as_json_and_back() -> None:
    finding = whole().findings[0]
    assert finding_from_json(json.loads(json.dumps(finding_as_json(finding)))) == finding
    with pytest.raises(ValueError, match=r"finding\.concept"):
        finding_from_json({"tracking_id": "x"})


def test_masks_not_packed_as_a_container_may_write_them(tmp_path: Path) -> None:
    write_findings(whole(), tmp_path)
    content = json.loads((tmp_path / "findings.json").read_text())
    for entry in content["segments"]:
        del entry["shape"]
    (tmp_path / "findings.json").write_text(json.dumps(content))
    masks = {f"mask_{n}": s.mask.astype(np.uint8) for n, s in enumerate(whole().segments)}
    np.savez_compressed(tmp_path / "arrays.npz", picture_0=whole().pictures[0].array, **masks)
    assert same(read_findings(tmp_path, MANIFEST_OF), whole())


def test_masks_take_one_bit_a_voxel(tmp_path: Path) -> None:
    mask = np.zeros((40, 256, 256), bool)
    write_findings(Findings("x", segments=(Segment("a", BODY, LEFT, mask, "1.2"),)), tmp_path)
    assert (tmp_path / "arrays.npz").stat().st_size < mask.size / 8 + 1000


Change = Callable[[dict[str, Any]], object]


def _change(path: str, value: Any) -> Change:
    def change(content: Any) -> None:
        *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
        for step in way:
            content = content[step]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", "other/1", "format must be"),
        ("extra", 1, "unknown key"),
        (
            "findings/0/concept",
            ["1", "SCT", "Heart"],
            r"findings\[1\]\.concept holds a concept that the manifest does not declare",
        ),
        ("findings/0/measurements/0/concept", ["1", "SCT", "Mass"], "does not declare"),
        ("findings/0/measurements/0/unit", ["mm", "UCUM", "mm"], "unit that the manifest does not declare"),
        ("findings/0/measurements/1/qualifier", None, "neither a value nor a qualifier"),
        ("findings/0/evaluations/0/concept", ["118565006", "SCT", "Volume"], "does not declare"),
        ("segments/0/type", ["39607008", "SCT", "Lung"], "does not declare"),
        ("segments/1/label", "left lung", "segment label is there twice"),
        ("segments/0/mask", "mask_7", "not in arrays.npz"),
        ("segments/0/mask", "picture_0", "does not fit its mask"),
        ("segments/0/shape", [3, 7, 6], "does not fit its mask"),
        ("segments/0/shape", [7, 3, 5], "masks of one series have different shapes"),
        ("segments/0/shape", [3, -7, 5], "three whole numbers"),
        ("segments/0/shape", [1 << 19, 1 << 19, 1 << 19], "does not fit"),
        ("segments/0/source_series", "1.2.x", "DICOM UID"),
        ("pictures/0/array", "mask_0", r"uint8 \(rows, columns, 3\)"),
        ("findings/0/segment", "right lung", "names a segment that is not in the answer"),
        ("findings/0/confidence", 1.5, "from 0 to 1"),
        ("findings/0/frames", [0], "frame numbers"),
        ("findings/0/tracking_id", "", "must not be empty"),
        ("findings/0/tracking_id", "a\u0000b", "control characters"),
        ("values/ml", [1], "values must be numbers"),
        ("values/ml", {"a": 1}, "values must be numbers"),
        ("values/ml", 10**400, "values must be numbers"),
        ("summary", "x" * 2000, "at most 1024"),
        ("used_instances", ["../../etc"], "DICOM UID"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, path: str, value: Any, says: str) -> None:
    write_findings(whole(), tmp_path)
    content = json.loads((tmp_path / "findings.json").read_text())
    _change(path, value)(content)
    (tmp_path / "findings.json").write_text(json.dumps(content))
    with pytest.raises(AlgorithmBroken, match=says):
        read_findings(tmp_path, MANIFEST_OF)


def test_two_findings_of_one_name(tmp_path: Path) -> None:
    finding = Finding("a", LUNG)
    write_findings(Findings("x", (finding, finding)), tmp_path)
    with pytest.raises(AlgorithmBroken, match="tracking_id is there twice"):
        read_findings(tmp_path, MANIFEST_OF)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(tmp_path: Path, number: str) -> None:
    write_findings(whole(), tmp_path)
    text = (tmp_path / "findings.json").read_text().replace("2310.5", number)
    (tmp_path / "findings.json").write_text(text)
    with pytest.raises(AlgorithmBroken, match="finite"):
        read_findings(tmp_path, MANIFEST_OF)


@pytest.mark.parametrize("name", ["findings.json", "arrays.npz"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_only_plain_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    write_findings(whole(), inside)
    write_findings(whole(), outside)
    path = inside / name
    path.unlink()
    if kind == "link":
        path.symlink_to(outside / name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(AlgorithmBroken, match="plain file"):
        read_findings(inside, MANIFEST_OF)


def _npy(header: bytes, body: bytes = b"") -> bytes:
    header = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    "member",
    [
        _npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n."),
        _npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999,), }"),
        _npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-5,), }", b"12345"),
        _npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (14,), }", b"123"),
        _npy(b"{'descr': '<f8', 'fortran_order': False, 'shape': (14,), }", b"1" * 112),
        _npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os'), }"),
        _npy(b"[" * 5000),
        b"\x93NUMPY\x09\x00",
        b"",
    ],
)
def test_arrays_made_to_hurt(tmp_path: Path, member: bytes) -> None:
    write_findings(whole(), tmp_path)
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as archive:
        archive.writestr("mask_0.npy", member)
    with pytest.raises(AlgorithmBroken):
        read_findings(tmp_path, MANIFEST_OF)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    write_findings(whole(), tmp_path)
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mask_0.npy", _npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (14,), }", bytes(200 << 20)))
    with pytest.raises(AlgorithmBroken, match="not as long as its header says"):
        read_findings(tmp_path, MANIFEST_OF)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "findings.json").write_bytes(content)
    with pytest.raises(AlgorithmBroken):
        read_findings(tmp_path, MANIFEST_OF)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=20))
def test_any_damage_to_the_arrays(tmp_path: Path, place: int, damage: bytes) -> None:
    write_findings(whole(), tmp_path)
    content = bytearray((tmp_path / "arrays.npz").read_bytes())
    content[place : place + len(damage)] = damage
    (tmp_path / "arrays.npz").write_bytes(content)
    with contextlib.suppress(AlgorithmBroken):
        read_findings(tmp_path, MANIFEST_OF)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def _content() -> dict[str, Any]:
    memory = io.StringIO()
    json.dump({"format": "caregrid-findings/1", "summary": "x", "findings": [finding_as_json(whole().findings[0])]}, memory)
    content: dict[str, Any] = json.loads(memory.getvalue())
    return {**content, "segments": [], "pictures": [], "used_instances": [], "values": {}, "warnings": []}


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([*_content(), *(f"findings/0/{key}" for key in finding_as_json(whole().findings[0]))]), JSON)
def test_any_data_in_any_place(tmp_path: Path, path: str, value: Any) -> None:
    content = copy.deepcopy(_content())
    _change(path, value)(content)
    (tmp_path / "findings.json").write_text(json.dumps(content))
    with contextlib.suppress(AlgorithmBroken):
        read_findings(tmp_path, MANIFEST_OF)
