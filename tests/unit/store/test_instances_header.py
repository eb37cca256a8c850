"""The header walk against pydicom on every real file, and against broken ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import data_store
import pydicom
import pydicom.data
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.errors import InvalidDicomError

from caregrid.errors import MalformedObject
from caregrid.store._header import read_header

ROOTS = (Path(pydicom.data.__file__).parent, Path(data_store.__file__).parent)
FILES = sorted(file for root in ROOTS for file in root.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc"))
TEXTS = ("StudyInstanceUID", "PatientID", "PatientName", "Modality", "StudyDescription", "ReferringPhysicianName", "StudyDate")
NUMBERS = ("Rows", "Columns", "InstanceNumber", "NumberOfFrames", "SeriesNumber")
#: One character set file holds a third, empty group of a name that pydicom leaves out.
UNREADABLE_NUMBERS = {"badVR.dcm": "NumberOfFrames"}


def test_the_same_as_pydicom_on_every_real_file() -> None:
    compared = 0
    for file in FILES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                header = read_header(file.read_bytes(), True)
                expected = pydicom.dcmread(file, stop_before_pixels=True)
            except (MalformedObject, InvalidDicomError):
                continue
            for keyword in TEXTS:
                assert header.text(keyword) == str(expected.get(keyword, "") or "").strip(), (file.name, keyword)
            for keyword in NUMBERS:
                if UNREADABLE_NUMBERS.get(file.name) != keyword:
                    value = expected.get(keyword)
                    assert header.number(keyword) == (int(value) if value not in (None, "") else None), (file.name, keyword)
        compared += 1
    assert compared > 200


def test_what_pydicom_reads_as_a_whole_study_is_not_refused_without_a_reason() -> None:
    refused = {}
    for file in FILES:
        try:
            read_header(file.read_bytes(), True)
        except MalformedObject as error:
            refused[file.name] = error.details["reason"]
    whole = {name for name, reason in refused.items() if "missing" not in reason and "no DICM" not in reason}
    assert whole == {
        "MR_truncated.dcm",
        "rtplan_truncated.dcm",
        "emri_small_jpeg_2k_lossless_too_short.dcm",
        "bad_sequence.dcm",  # its SOP Instance UID is none
    }


SMALL = Path(str(get_testdata_file("MR_small.dcm"))).read_bytes()
SEQUENCES = Path(str(get_testdata_file("rtplan.dcm"))).read_bytes()
ENCAPSULATED = Path(str(get_testdata_file("MR_small_RLE.dcm"))).read_bytes()
DEFLATED = Path(str(get_testdata_file("image_dfl.dcm"))).read_bytes()


@pytest.mark.parametrize("whole", [SMALL, SEQUENCES, ENCAPSULATED, DEFLATED], ids=["plain", "sequences", "frames", "deflated"])
def test_cut_anywhere_is_noticed(whole: bytes) -> None:
    read_header(whole, True)
    start = len(whole) - len(whole) // 2
    noticed = 0
    for end in range(start, len(whole) - 8, 97):
        try:
            read_header(whole[:end], True)
        except MalformedObject:
            noticed += 1
    # A cut exactly between two elements leaves a whole, shorter data set: nobody can tell.
    assert noticed >= len(range(start, len(whole) - 8, 97)) - 3


def test_zeros_at_the_end_are_padding_and_other_bytes_are_not() -> None:
    assert read_header(SMALL + bytes(300), True).uid("SOPInstanceUID") == read_header(SMALL, True).uid("SOPInstanceUID")
    with pytest.raises(MalformedObject):
        read_header(SMALL + b"\x07\x00\x00", True)


def test_a_deflate_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caregrid.store._header.MAX_INFLATED", 100_000)
    with pytest.raises(MalformedObject, match="inflate"):
        read_header(DEFLATED, True)


def test_sequences_nested_without_end_are_refused() -> None:
    nest = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    with pytest.raises(MalformedObject, match="nested too deeply"):
        read_header(nest * 5000, False, "1.2.840.10008.1.2.1")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_refused_by_name_or_read(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([SMALL[:3000], SEQUENCES, ENCAPSULATED[:4000]])))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(bytes(whole), True)
    except MalformedObject:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword in TEXTS:
            assert "\0" not in header.text(keyword)
        for keyword in NUMBERS:
            header.number(keyword)
