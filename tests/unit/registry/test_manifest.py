"""algorithm.toml: every complaint is ManifestInvalid and names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caregrid.domain.codes import Code
from caregrid.errors import ManifestInvalid
from caregrid.registry.manifest import manifest_as_json, manifest_from_json, parse_manifest, read_manifest
from tests.unit.registry.packages import MANIFEST, make_package

TEXT = MANIFEST.format(name="counting", version="1.0.0", timeout=30, memory=512)


def test_everything_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(make_package(tmp_path))
    assert manifest.reference == "counting 1.0.0"
    assert manifest.algorithm_family == Code("123110", "DCM", "Artificial Intelligence")
    assert (manifest.inputs[0].form, manifest.inputs[0].modality, manifest.inputs[0].where) == ("files", ("CT",), {})
    assert [(spec.kind, spec.unit and spec.unit.value) for spec in manifest.outputs] == [
        ("measurement", "ml"),
        ("finding", None),
        ("segment", None),
        ("evaluation", None),
    ]
    assert (manifest.timeout_seconds, manifest.resources.memory_mb, manifest.resources.gpu) == (30, 1024, False)


def test_json_is_the_same_manifest() -> None:
    manifest = parse_manifest(TEXT + "\n[parameters]\nthreshold = -500\nnames = ['a']\n")
    assert manifest_from_json(manifest_as_json(manifest)) == manifest


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('title = "', 'tilte = "', "title is missing"),
        ("timeout_seconds", "timeout_second", "timeout_second is not a known key; did you mean timeout_seconds?"),
        ('name = "counting"', 'name = "Counting"', "name must be lower-case"),
        ('version = "1.0.0"', 'version = "1.0"', "version must be a semantic version"),
        ('runner = "python"', 'runner = "pyhton"', "runner must be one of python, onnx, container, map; did you mean python?"),
        ('entry = "counting:run"', 'entry = "counting"', "entry must be module:function"),
        ('entry = "counting:run"', 'entry = "os:system;x"', "entry must be module:function"),
        ('form = "files"', 'form = "volumes"', "inputs[1].form must be one of"),
        ('modality = ["CT"]', 'modality = "CT"', "inputs[1].modality must be a list"),
        ('modality = ["CT"]', "modality = []", "inputs[1].modality must be a list"),
        ('unit = ["ml", "UCUM", "ml"]', "", "outputs[1].unit is missing"),
        ('kind = "finding"', 'kind = "finding"\nunit = ["ml", "UCUM", "ml"]', "outputs[2].unit is only for measurements"),
        ('["39607008", "SCT", "Lung"]', '["39607008", "SCT"]', "outputs[2].concept must be a code"),
        ('name = "finding"', 'name = "count"', "outputs has two called 'count'"),
        ("memory_mb = 512", "memory_mb = 512\nmemory = 1", "resources.memory is not a known key; did you mean memory_mb?"),
        ("memory_mb = 512", "memory_mb = -1", "resources.memory_mb must be a whole number"),
        ("timeout_seconds = 30", "timeout_seconds = true", "timeout_seconds must be a whole number"),
        ("timeout_seconds = 30", 'model_card = "../README.md"', "model_card must be a file inside the package"),
        ("timeout_seconds = 30", 'environment = "../evil"', "environment must be an environment's name"),
        ('manufacturer = "caregrid"', 'manufacturer = ""', "manufacturer must be text that is not empty"),
    ],
)
def test_complaints_name_the_key(old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(ManifestInvalid) as caught:
        parse_manifest(TEXT.replace(old, new))
    assert says in caught.value.message
    assert caught.value.message.startswith("algorithm.toml: ")


@pytest.mark.parametrize("value", ["2024-01-01", "inf", "nan", '"\\u0000"', "[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]"])
def test_parameters_that_json_cannot_keep(value: str) -> None:
    with pytest.raises(ManifestInvalid, match="parameters"):
        parse_manifest(f"{TEXT}\n[parameters]\nx = {value}\n")


@pytest.mark.parametrize(
    ("runner", "entry"),
    [
        ("onnx", "/etc/passwd"),
        ("onnx", "../model.onnx"),
        ("container", "busybox:latest"),
        ("map", "../image.tar"),
        ("container", "x.zip"),
    ],
)
def test_entries_of_the_other_runners(runner: str, entry: str) -> None:
    with pytest.raises(ManifestInvalid, match="entry"):
        parse_manifest(TEXT.replace('runner = "python"', f'runner = "{runner}"').replace("counting:run", entry))


@pytest.mark.parametrize("file", ["README.md", "code/counting.py"])
def test_what_is_named_must_be_there(tmp_path: Path, file: str) -> None:
    make_package(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ManifestInvalid, match="which is not in the package"):
        read_manifest(tmp_path)


def test_no_manifest_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "algorithm.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestInvalid, match="not UTF-8"):
        read_manifest(tmp_path)


@given(st.text())
def test_any_text_at_all(text: str) -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(text)


LINES = TEXT.strip().splitlines()
VALUES = st.sampled_from(
    ["1", "-1", "1e400", "true", '""', '"x"', "[]", "{}", '["a","b","c"]', "[[1]]", "2020-01-01", '"\\u0000"', "'''a"]
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(LINES) - 1), VALUES), min_size=1, max_size=3), st.booleans())
def test_any_value_for_any_key(changes: list[tuple[int, str]], drop: bool) -> None:
    lines = list(LINES)
    for place, value in changes:
        key, equals, _ = lines[place].partition(" = ")
        lines[place] = "" if drop else f"{key}{equals}{value}" if equals else value
    try:
        parse_manifest("\n".join(lines))
    except ManifestInvalid as error:
        complaint = error.message
    else:
        return
    assert complaint.startswith("algorithm.toml: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(manifest_as_json(parse_manifest(TEXT)))), JSON)
def test_any_data_for_any_key(key: str, value: Any) -> None:
    raw = manifest_as_json(parse_manifest(TEXT))
    raw[key] = value
    try:
        manifest_from_json(raw)
    except ManifestInvalid as error:
        complaint = error.message
    else:
        return
    assert complaint.startswith(f"algorithm.toml: {key}")
