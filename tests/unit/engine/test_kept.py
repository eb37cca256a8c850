"""What a run has made, on disk: written once, the same at every retry, and held against the study it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid

from caregrid.domain.findings import Findings
from caregrid.engine.kept import KeptResults, MadeResult
from caregrid.errors import ResultInvalid
from caregrid.results import Predecessor, ResultContext, Reviewer, write_results
from tests.support.results import context, ct_series, findings, manifest

FORMATS = ("dicom_seg", "dicom_sr", "dicom_sc")


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    return ct_series(tmp_path / "source")


@pytest.fixture
def kept(tmp_path: Path) -> KeptResults:
    return KeptResults(tmp_path / "store")


@pytest.fixture
def folder(kept: KeptResults, series: list[Path]) -> Path:
    """A task's folder with its findings kept."""
    made = kept.folder("run-1", "measure")
    kept.keep_findings(made, findings(series))
    return made


def by_kind(made: Sequence[MadeResult]) -> dict[str, MadeResult]:
    return {each.kind: each for each in made}


def of(kept: KeptResults, made: MadeResult) -> pydicom.Dataset:
    return pydicom.dcmread(kept.store / made.path)


def errors(made: MadeResult, line: str) -> list[str]:
    return [each for each in made.errors if each.startswith(line)]


def test_findings_are_kept_whole_or_not_at_all(kept: KeptResults, series: list[Path]) -> None:
    # Only what the manifest for tests declares.
    whole = replace(findings(series), findings=(), pictures=())
    folder = kept.folder("run-1", "measure")
    assert kept.findings(folder, manifest()) is None
    half = folder / "findings.part"
    half.mkdir(parents=True)
    (half / "findings.json").write_text("{")
    assert kept.findings(folder, manifest()) is None
    kept.keep_findings(folder, whole)
    found = kept.findings(folder, manifest())
    assert found is not None
    assert found.used_instances == whole.used_instances
    assert (found.segments[0].mask == whole.segments[0].mask).all()
    assert not half.exists()


def test_the_time_an_algorithm_finished_stays(kept: KeptResults, folder: Path) -> None:
    first = kept.finished_at(folder)
    assert abs((datetime.now(UTC) - first).total_seconds()) < 60
    assert kept.finished_at(folder) == first


def test_a_run_and_task_name_no_folder_outside_the_store(kept: KeptResults) -> None:
    assert kept.folder("../../etc", "a/b").relative_to(kept.store / "results").parts == (".._.._etc", "a_b")


def test_all_formats_are_written_sound_and_a_retry_changes_nothing(kept: KeptResults, folder: Path, series: list[Path]) -> None:
    first = kept.write(folder, context(series), findings(series), FORMATS)
    assert [each.kind for each in first] == ["dicom_seg", "dicom_sr", "dicom_sc"]
    assert [each.errors for each in first] == [(), (), ()]
    when = {path: path.stat().st_mtime_ns for path in folder.glob("*.dcm")}
    assert kept.write(folder, context(series), findings(series), FORMATS) == first
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.dcm")} == when
    assert not list(folder.glob("*.part"))


def test_an_object_lost_before_it_was_recorded_is_written_again_to_the_byte(
    kept: KeptResults, folder: Path, series: list[Path]
) -> None:
    said = {"written_at": kept.finished_at(folder)}
    first = kept.write(folder, context(series, **said), findings(series), FORMATS)
    for each in first:
        (kept.store / each.path).unlink()
    assert kept.write(folder, context(series, **said), findings(series), FORMATS) == first


def test_an_object_of_another_patient_is_found_out(kept: KeptResults, folder: Path, series: list[Path], tmp_path: Path) -> None:
    """The object on disk is what is judged, against the sources of this run."""
    other = ct_series(tmp_path / "other", changes={"PatientID": "ANOTHER"})
    kept.write(folder, context(other), findings(other), FORMATS)
    made = by_kind(kept.write(folder, context(series), findings(series), FORMATS))
    for kind in ("dicom_sr", "dicom_sc"):  # a SEG's UID depends on its source series, so that one is another object
        assert "6.1.1: PatientID is not the source's" in made[kind].errors
        assert "6.1.1: StudyInstanceUID is not the source's" in made[kind].errors
    assert errors(made["dicom_sr"], "6.1.8"), "it refers to instances that were not used"
    assert errors(made["dicom_sr"], "6.3.2"), "its image library lists other images"


def test_a_segmentation_that_lies_elsewhere_is_found_out(kept: KeptResults, folder: Path, series: list[Path]) -> None:
    ((_, seg),) = write_results(context(series), findings(series), ("dicom_seg",))
    seg.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0].ImagePositionPatient[2] += 0.5
    kept.keep(folder, "dicom_seg", seg)
    made = by_kind(kept.write(folder, context(series), findings(series), FORMATS))
    assert made["dicom_seg"].errors == ("6.2.2: frame 2 does not lie where its source lies",)


def test_a_report_about_a_segmentation_of_another_run_is_found_out(kept: KeptResults, folder: Path, series: list[Path]) -> None:
    ((_, seg),) = write_results(context(series, uid_seed="another"), findings(series), ("dicom_seg",))
    ((_, report),) = write_results(context(series), findings(series), ("dicom_sr",), [seg])
    kept.keep(folder, "dicom_sr", report)
    made = by_kind(kept.write(folder, context(series), findings(series), FORMATS))
    assert made["dicom_seg"].errors == ()
    assert "6.2.6: a group references a SEG that the run did not make" in made["dicom_sr"].errors


# ── verified by a clinician ──────────────────────────────────────────────────────────────────────────────────────────


def reviewed(series: list[Path], before: MadeResult, decision: str = "accepted") -> ResultContext:
    reviewer = Reviewer("Doe^Jane", "Test Hospital", datetime(2026, 3, 5, 9, tzinfo=UTC), decision)
    earlier = Predecessor(before.sop_class_uid, before.sop_instance_uid, before.series_instance_uid)
    seed = "run-1/measure/reviewed"
    return context(series, uid_seed=seed, reviewed=reviewer, supersedes=(earlier,), written_at=reviewer.at)


def segments_named(report: pydicom.Dataset) -> set[str]:
    return {
        str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        for group in report.ContentSequence[-1].ContentSequence
        for item in group.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeValue == "121191"
    }


def test_a_verified_report_keeps_the_segments_and_names_its_predecessor(
    kept: KeptResults, folder: Path, series: list[Path]
) -> None:
    first = by_kind(kept.write(folder, context(series), findings(series), FORMATS))
    made = kept.write_verified(folder, reviewed(series, first["dicom_sr"]), findings(series))
    report = of(kept, made)
    assert made.errors == ()
    assert report.VerificationFlag == "VERIFIED"
    assert segments_named(report) == segments_named(of(kept, first["dicom_sr"])) == {first["dicom_seg"].sop_instance_uid}
    (study,) = report.PredecessorDocumentsSequence
    before = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert before == first["dicom_sr"].sop_instance_uid
    assert kept.write_verified(folder, reviewed(series, first["dicom_sr"]), findings(series)) == made


def test_corrected_values_take_the_place_of_the_algorithms(kept: KeptResults, series: list[Path]) -> None:
    corrected = kept.corrected(findings(series), {"lung-left": {"Volume": 2000}, "nobody": {"Volume": 1}})
    lung, nodule = corrected.findings
    assert lung.measurements[0].value == 2000.0
    assert nodule == findings(series).findings[1]


# ── objects that an algorithm made itself ────────────────────────────────────────────────────────────────────────────


def nothing(series: list[Path]) -> Findings:
    return replace(findings(series), findings=(), segments=(), pictures=())


def plain_seg(series: list[Path], path: Path) -> pydicom.Dataset:
    """A SEG as somebody else's code makes one: sound, and without what caregrid adds to its own."""
    ((_, dataset),) = write_results(context(series, uid_seed="theirs"), findings(series), ("dicom_seg",))
    for keyword in ("ContributingEquipmentSequence", "SeriesDescription", "InstanceCreationDate", "DeviceSerialNumber"):
        delattr(dataset, keyword)
    del dataset.SegmentSequence[0].TrackingID
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def test_an_algorithms_own_object_is_delivered_byte_for_byte(kept: KeptResults, series: list[Path], tmp_path: Path) -> None:
    folder, path = kept.folder("run-1", "measure"), tmp_path / "theirs.dcm"
    dataset = plain_seg(series, path)
    kept.keep_findings(folder, nothing(series), [path])
    (made,) = kept.write(folder, context(series), nothing(series), FORMATS)
    assert made.errors == ()
    assert any(each.startswith("6.1.6") for each in made.warnings), "that it is not made as ours are is said"
    assert (made.kind, made.sop_instance_uid) == ("dicom_seg", dataset.SOPInstanceUID)
    assert (kept.store / made.path).read_bytes() == path.read_bytes()
    assert kept.write(folder, context(series), nothing(series), FORMATS) == [made]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientID", "ANOTHER"), ("PatientName", "Another^One"), ("StudyInstanceUID", "1.2.3"), ("AccessionNumber", "77")],
)
def test_an_algorithms_object_of_another_study_is_held_back(
    kept: KeptResults, series: list[Path], tmp_path: Path, keyword: str, value: str
) -> None:
    folder, path = kept.folder("run-1", "measure"), tmp_path / "theirs.dcm"
    dataset = plain_seg(series, path)
    setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    kept.keep_findings(folder, nothing(series), [path])
    (made,) = kept.write(folder, context(series), nothing(series), FORMATS)
    assert made.errors == (f"6.1.1: {keyword} is not the source's",)


@pytest.mark.parametrize("uid", ["", "../../escaped"])
def test_an_algorithms_object_without_a_uid_is_refused(kept: KeptResults, series: list[Path], tmp_path: Path, uid: str) -> None:
    folder, path = kept.folder("run-1", "measure"), tmp_path / "theirs.dcm"
    plain_seg(series, path)
    dataset = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        dataset.SOPInstanceUID = uid
        dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.save_as(path)
    kept.keep_findings(folder, nothing(series), [path])
    with pytest.raises(ResultInvalid, match="SOP Instance UID"):
        kept.write(folder, context(series), nothing(series), FORMATS)
    assert not list(kept.store.parent.rglob("escaped*"))
