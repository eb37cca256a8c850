"""Every line of the checklist: a good object passes, and each way of breaking it is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from caregrid.results import dicom_kos, validate, write_results
from caregrid.results._subject import children, first
from caregrid.results._tools import read_dciodvfy
from caregrid.results._validation import CHECKS
from tests.support.results import context, ct_series, findings


@cache
def made() -> tuple[tuple[Path, ...], dict[str, Dataset]]:
    """One source series and the four results on it."""
    paths = ct_series(Path(mkdtemp(prefix="caregrid-validation-")))
    results = dict(write_results(context(paths), findings(paths), ("dicom_seg", "dicom_sr", "dicom_sc")))
    results["dicom_kos"] = dicom_kos.withdraw(context(paths), list(results.values()))
    return tuple(paths), results


def broken(kind: str, damage: Callable[[Dataset], object]) -> tuple[str, ...]:
    """What our own checks say of a damaged copy."""
    paths, results = made()
    dataset = deepcopy(results[kind])
    damage(dataset)
    companions = [item for name, item in results.items() if name != kind]
    return validate(dataset, paths, companions, tools=False).errors


def delete(keyword: str) -> Callable[[Dataset], object]:
    return lambda dataset: delattr(dataset, keyword)


def put(keyword: str, value: object) -> Callable[[Dataset], object]:
    return lambda dataset: setattr(dataset, keyword, value)


def segment(keyword: str, value: object = None) -> Callable[[Dataset], object]:
    def damage(dataset: Dataset) -> None:
        item = dataset.SegmentSequence[0]
        if value is None:
            delattr(item, keyword)
        else:
            setattr(item, keyword, value)

    return damage


def frame(change: Callable[[Dataset], object]) -> Callable[[Dataset], object]:
    return lambda dataset: change(dataset.PerFrameFunctionalGroupsSequence[0])


def drop(concept: str, within: str = "") -> Callable[[Dataset], object]:
    """Take the content items called ``concept`` out of the root, or out of the first measurement group."""

    def damage(dataset: Dataset) -> None:
        parent = dataset if not within else group(dataset)
        parent.ContentSequence = [item for item in parent.ContentSequence if item not in children(parent, concept)]

    return damage


def group(dataset: Dataset, number: int = 0) -> Dataset:
    container = first(dataset, "126010")
    assert container is not None
    return children(container, "125007")[number]


def number(change: Callable[[Dataset], object], place: int = 0) -> Callable[[Dataset], object]:
    def damage(dataset: Dataset) -> None:
        change(next(item for item in group(dataset, place).ContentSequence if item.ValueType == "NUM"))

    return damage


def move_frame(by: float) -> Callable[[Dataset], object]:
    def change(item: Dataset) -> None:
        x, y, z = item.PlanePositionSequence[0].ImagePositionPatient
        item.PlanePositionSequence[0].ImagePositionPatient = [x, y, float(z) + by]

    return frame(change)


def reference_foreign(dataset: Dataset) -> None:
    item = deepcopy(dataset.SourceImageSequence[0])
    item.ReferencedSOPInstanceUID = "1.2.3.4"
    dataset.SourceImageSequence.append(item)


def forget_evidence(dataset: Dataset) -> None:
    dataset.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence.pop()


def shorten_library(dataset: Dataset) -> None:
    library = first(dataset, "111028")
    assert library is not None
    library.ContentSequence[0].ContentSequence.pop()


def change_tracking(dataset: Dataset) -> None:
    item = first(group(dataset), "112040")
    assert item is not None
    item.UID = "1.2.3"


def uncode_answer(dataset: Dataset) -> None:
    item = first(group(dataset, 1), "705057003")
    assert item is not None
    item.ConceptCodeSequence = []


BROKEN = [
    # 6.1 every object
    ("6.1.1", "dicom_seg", put("StudyInstanceUID", "1.2.3"), "StudyInstanceUID is not the source's"),
    ("6.1.1", "dicom_sr", put("PatientID", "other"), "PatientID is not the source's"),
    ("6.1.1", "dicom_sc", put("PatientName", "Other^Name"), "PatientName is not the source's"),
    ("6.1.1", "dicom_kos", put("AccessionNumber", "x"), "AccessionNumber is not the source's"),
    ("6.1.2", "dicom_seg", lambda d: put("SeriesInstanceUID", dcmread(made()[0][0]).SeriesInstanceUID)(d), "source series"),
    ("6.1.2", "dicom_sr", put("SeriesInstanceUID", "1.2.03"), "SeriesInstanceUID is not a UID"),
    ("6.1.2", "dicom_sr", put("SeriesInstanceUID", "1." + "2" * 63), "SeriesInstanceUID is not a UID"),
    ("6.1.3", "dicom_sc", put("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "not a result class"),
    ("6.1.4", "dicom_sr", put("SpecificCharacterSet", "ISO_IR 999"), "does not decode"),
    ("6.1.5", "dicom_seg", put("Modality", "OT"), "Modality is not SEG"),
    ("6.1.5", "dicom_sr", put("SeriesNumber", None), "SeriesNumber is not a number"),
    ("6.1.5", "dicom_sc", lambda d: put("SeriesNumber", dcmread(made()[0][0]).SeriesNumber)(d), "source series's"),
    ("6.1.6", "dicom_seg", delete("SoftwareVersions"), "SoftwareVersions is missing"),
    ("6.1.6", "dicom_sr", delete("DeviceSerialNumber"), "DeviceSerialNumber is missing"),
    ("6.1.6", "dicom_sc", lambda d: d.ContributingEquipmentSequence.pop(), "no complete item"),
    ("6.1.6", "dicom_kos", lambda d: delattr(d.ContributingEquipmentSequence[-1], "DeviceUID"), "no complete item"),
    ("6.1.7", "dicom_sr", delete("ContentTime"), "ContentTime is missing"),
    ("6.1.7", "dicom_seg", delete("InstanceCreationDate"), "InstanceCreationDate is missing"),
    ("6.1.8", "dicom_sc", reference_foreign, "were not used"),
    ("6.1.8", "dicom_sr", forget_evidence, "not listed"),
    ("6.1.9", "dicom_seg", delete("ContentLabel"), "ContentLabel (type 1) is missing"),
    ("6.1.9", "dicom_sr", put("InstanceNumber", ""), "InstanceNumber"),
    ("6.1.9", "dicom_kos", delete("PatientSex"), "PatientSex (type 2) is missing"),
    # 6.2 SEG
    ("6.2.1", "dicom_seg", segment("SegmentNumber", 2), "not numbered from 1"),
    ("6.2.1", "dicom_seg", segment("SegmentLabel"), "SegmentLabel is missing"),
    ("6.2.1", "dicom_seg", segment("SegmentedPropertyTypeCodeSequence", []), "has no code"),
    ("6.2.1", "dicom_seg", segment("SegmentAlgorithmType", "MANUAL"), "not AUTOMATIC"),
    ("6.2.1", "dicom_seg", segment("SegmentationAlgorithmIdentificationSequence"), "IdentificationSequence is missing"),
    ("6.2.2", "dicom_seg", frame(lambda g: delattr(g, "DerivationImageSequence")), "derived by segmentation"),
    ("6.2.2", "dicom_seg", put("FrameOfReferenceUID", "1.2.3"), "FrameOfReferenceUID is not the source's"),
    ("6.2.2", "dicom_seg", move_frame(2.0), "does not lie where its source lies"),
    ("6.2.3", "dicom_seg", delete("ReferencedSeriesSequence"), "ReferencedSeriesSequence is missing"),
    ("6.2.5", "dicom_seg", put("SegmentationType", "FRACTIONAL"), "not BINARY"),
    ("6.2.5", "dicom_seg", lambda d: put("PixelData", bytes(len(d.PixelData)))(d), "no voxel is set"),
    ("6.2.5", "dicom_seg", lambda d: put("PixelData", d.PixelData[:-2])(d), "length"),
    ("6.2.6", "dicom_seg", segment("TrackingUID"), "no Tracking ID and UID"),
    ("6.2.6", "dicom_sr", change_tracking, "tracked otherwise"),
    # 6.3 SR
    ("6.3.1", "dicom_sr", lambda d: put("CodeValue", "126001")(d.ConceptNameCodeSequence[0]), "126000"),
    ("6.3.1", "dicom_sr", delete("ContentTemplateSequence"), "TID 1500"),
    ("6.3.1", "dicom_sr", drop("121049"), "Language"),
    ("6.3.1", "dicom_sr", drop("121005"), "no device observer"),
    ("6.3.1", "dicom_sr", drop("121012"), "Device Observer UID"),
    ("6.3.1", "dicom_sr", drop("121058"), "Procedure reported"),
    ("6.3.2", "dicom_sr", drop("111028"), "Image Library"),
    ("6.3.2", "dicom_sr", shorten_library, "exactly the images used"),
    ("6.3.3", "dicom_sr", drop("126010"), "no measurement group"),
    ("6.3.3", "dicom_sr", drop("112040", "group"), "Tracking Unique Identifier"),
    ("6.3.3", "dicom_sr", drop("121071", "group"), "Finding (121071)"),
    ("6.3.3", "dicom_sr", drop("111003", "group"), "Algorithm Version"),
    (
        "6.3.4",
        "dicom_sr",
        number(lambda n: put("MeasurementUnitsCodeSequence", [])(n.MeasuredValueSequence[0])),
        "UCUM unit",
    ),
    (
        "6.3.4",
        "dicom_sr",
        number(lambda n: delattr(n, "NumericValueQualifierCodeSequence"), 1),
        "neither a value nor a qualifier",
    ),
    ("6.3.4", "dicom_sr", uncode_answer, "no coded answer"),
    ("6.3.6", "dicom_sr", put("CompletionFlag", "PARTIAL"), "not COMPLETE"),
    ("6.3.6", "dicom_sr", put("VerificationFlag", "VERIFIED"), "without a verifying observer"),
    ("6.3.7", "dicom_sr", delete("ReferencedPerformedProcedureStepSequence"), "StepSequence is missing"),
    ("6.3.7", "dicom_sr", delete("PerformedProcedureCodeSequence"), "CodeSequence is missing"),
    # 6.4 other carriers
    ("6.4", "dicom_sc", put("BurnedInAnnotation", "NO"), "BurnedInAnnotation is not YES"),
    ("6.4", "dicom_sc", delete("ConversionType"), "ConversionType is missing"),
    ("6.4", "dicom_sc", put("ImageComments", ""), "not for primary diagnosis"),
    ("6.4", "dicom_sc", lambda d: put("PixelData", d.PixelData[:-2])(d), "length"),
    ("6.4", "dicom_kos", lambda d: put("CodeValue", "113000")(d.ConceptNameCodeSequence[0]), "not a rejection note"),
    ("6.4", "dicom_kos", forget_evidence, "exactly what is rejected"),
]


@pytest.mark.parametrize(("line", "kind", "damage", "said"), BROKEN, ids=[f"{row[0]} {row[1]} {row[3]}" for row in BROKEN])
def test_a_broken_object_is_found_out(line: str, kind: str, damage: Callable[[Dataset], object], said: str) -> None:
    errors = broken(kind, damage)
    assert any(error.startswith(f"{line}:") and said in error for error in errors), errors


@pytest.mark.parametrize("kind", ["dicom_seg", "dicom_sr", "dicom_sc", "dicom_kos"])
def test_a_good_object_passes_all_checks_and_all_tools(kind: str) -> None:
    paths, results = made()
    verdict = validate(results[kind], paths, [item for name, item in results.items() if name != kind])
    assert verdict.errors == ()
    assert verdict.ok
    installed = {name for name in ("dcmftest", "dcmdump", "dciodvfy", "dsrdump") if shutil.which(name)}
    if kind not in ("dicom_sr", "dicom_kos"):
        installed -= {"dsrdump"}
    assert set(verdict.checked_by) == {"caregrid", *installed}


def test_every_error_line_of_the_checklist_is_broken_once() -> None:
    assert {line for level, line, _ in CHECKS if level == "A"} == {row[0] for row in BROKEN}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (delete("TimezoneOffsetFromUTC"), "6.1.7: TimezoneOffsetFromUTC is missing"),
        (put("SeriesDescription", "Lung volume"), "6.1.10: SeriesDescription does not say AI in at most 64 characters"),
    ],
)
def test_warnings_do_not_hold_an_object_back(damage: Callable[[Dataset], object], said: str) -> None:
    paths, results = made()
    dataset = deepcopy(results["dicom_sc"])
    damage(dataset)
    verdict = validate(dataset, paths, tools=False)
    assert verdict.ok
    assert said in verdict.warnings


def test_text_that_is_not_what_the_character_set_says(tmp_path: Path) -> None:
    _, results = made()
    path = tmp_path / "sr.dcm"
    results["dicom_sr"].save_as(path, enforce_file_format=True)
    path.write_bytes(path.read_bytes().replace(b"Test Hospital", b"Te\xefst Hospita"))
    assert any("SpecificCharacterSet" in error for error in validate(path, tools=False).errors)


@pytest.mark.parametrize("content", [b"", b"no DICOM here", bytes(132) + b"DICM"])
def test_what_is_no_dicom_is_an_error_not_a_crash(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(content)
    assert not validate(path, tools=False).ok


def test_a_truncated_object_is_an_error(tmp_path: Path) -> None:
    _, results = made()
    path = tmp_path / "seg.dcm"
    results["dicom_seg"].save_as(path, enforce_file_format=True)
    whole = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert not validate(path).ok


def test_dciodvfy_finds_what_our_checks_do_not(tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not on this machine (apt-get install dicom3tools)")
    paths, results = made()
    dataset = deepcopy(results["dicom_seg"])
    dataset.SegmentSequence[0].SegmentedPropertyCategoryCodeSequence[0].CodeMeaning = ""
    verdict = validate(dataset, paths)
    assert any(error.startswith("dciodvfy:") for error in verdict.errors)


def test_faults_of_the_source_do_not_hold_a_result_back_and_no_value_is_quoted() -> None:
    text = (
        "Error - Value invalid for this VR - (0x0010,0x0030) DA Patient's Birth Date  DA [1] = <1950/01/01> - bad\n"
        "Error - Missing attribute Type 1 Required Element=<PatientID> Module=<Patient>\n"
        "Error - Missing attribute Type 1 Required Element=<SegmentLabel> Module=<SegmentationImage>\n"
        "Warning - Value dubious for this VR - (0x0010,0x0010) PN Patient's Name  PN [1] = <SECRET> - Retired\n"
        "Segmentation\n"
    )
    opinion = read_dciodvfy(text)
    assert opinion.errors == ("Missing attribute Type 1 Required Element=<SegmentLabel> Module=<SegmentationImage>",)
    assert len(opinion.warnings) == 3
    assert not any("SECRET" in line or "1950" in line for line in (*opinion.errors, *opinion.warnings))


def test_complaints_hold_no_patient_data() -> None:
    paths, results = made()
    dataset = deepcopy(results["dicom_sr"])
    dataset.PatientName, dataset.PatientID = "Secret^Person", "ID-4711"
    text = " ".join(validate(dataset, paths).errors + validate(dataset, paths).warnings)
    assert "Secret" not in text
    assert "4711" not in text


def test_a_seg_moved_by_half_a_voxel_is_found() -> None:
    spacing = np.array(dcmread(made()[0][0]).PixelSpacing, float)
    assert broken("dicom_seg", move_frame(float(spacing[0]) / 2))
