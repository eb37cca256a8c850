"""The measurement report: read back by highdicom, by dcmtk, and by hand."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import highdicom as hd
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from caregrid.domain.codes import MILLILITRE, Code
from caregrid.domain.findings import Finding, Findings, Measurement
from caregrid.results import Predecessor, Reviewer, tracking_uid, validate, write_results
from caregrid.results._subject import children, first
from tests.support.results import LUNG, NODULE, VOLUME, context, ct_series, findings, manifest

REVIEWER = Reviewer("Smith^Jane", "Test Hospital", datetime(2026, 3, 4, 12, 0, tzinfo=UTC), "accepted")


def report(
    paths: list[Path], found: Findings, formats: tuple[str, ...] = ("dicom_seg", "dicom_sr"), **changes: object
) -> Dataset:
    made = dict(write_results(context(paths, **changes), found, formats))
    return made["dicom_sr"]


def groups(dataset: Dataset) -> list[Dataset]:
    container = first(dataset, "126010")
    assert container is not None
    return children(container, "125007")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return ct_series(tmp_path / "source")


def test_highdicom_reads_the_values_back(paths: list[Path], tmp_path: Path) -> None:
    found = findings(paths)
    lung, nodule = found.findings
    measured = replace(nodule, measurements=(Measurement(VOLUME, 0.1234567890123, MILLILITRE),))
    report(paths, replace(found, findings=(lung, measured))).save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    content = hd.sr.srread(tmp_path / "sr.dcm").content
    (volume,) = content.get_volumetric_roi_measurement_groups()
    assert volume.tracking_identifier == "lung-left"
    assert volume.finding_sites[0].value.value == LUNG.value
    assert volume.finding_sites[0].laterality.meaning == "Left"
    (measurement,) = volume.get_measurements()
    assert (measurement.value, measurement.unit.value) == (2345.678, "ml")
    (other,) = [group for group in content.get_image_measurement_groups() if group.tracking_identifier == "nodule-1"]
    values = {item.name.meaning: item.value for item in other.get_measurements()}
    assert values == {"Volume": 0.1234567890123, "Certainty of Finding": 87.0}
    answers = {item.name.meaning: item.value.meaning for item in other.get_qualitative_evaluations()}
    assert answers["Presence"] == "Present"


def test_dcmtk_reads_the_report(paths: list[Path], tmp_path: Path) -> None:
    dsrdump = shutil.which("dsrdump")
    if dsrdump is None:
        pytest.skip("dcmtk is not on this machine")
    report(paths, findings(paths)).save_as(tmp_path / "sr.dcm", enforce_file_format=True)
    said = subprocess.run([dsrdump, "-Ph", str(tmp_path / "sr.dcm")], capture_output=True, text=True, check=True).stdout
    assert '<contains NUM:(,,"Volume")="2345.678" (ml,UCUM,"ml")>' in said
    assert '<contains NUM:(,,"Volume")=empty (114006,DCM,"Measurement failure")>' in said
    assert '<contains CODE:(,,"Presence")=(52101004,SCT,"Present")>' in said
    assert '<has concept mod CODE:(,,"Language of Content Item and Descendants")=(en,RFC5646,"English")>' in said


def test_a_finding_is_tracked_the_same_in_seg_and_sr_and_in_the_next_run(paths: list[Path]) -> None:
    one = dict(write_results(context(paths), findings(paths), ("dicom_seg", "dicom_sr")))
    two = dict(write_results(context(paths, uid_seed="run-2/measure"), findings(paths), ("dicom_seg", "dicom_sr")))
    wanted = tracking_uid(str(one["dicom_sr"].StudyInstanceUID), "lung-volume", "lung-left")
    for made in (one, two):
        assert made["dicom_seg"].SegmentSequence[0].TrackingUID == wanted
        assert wanted == first(groups(made["dicom_sr"])[0], "112040").UID  # type: ignore[union-attr]
    assert one["dicom_sr"].SOPInstanceUID != two["dicom_sr"].SOPInstanceUID
    assert one["dicom_sr"].SeriesInstanceUID != two["dicom_sr"].SeriesInstanceUID


def test_the_report_references_the_segment_of_the_same_run(paths: list[Path]) -> None:
    made = dict(write_results(context(paths), findings(paths), ("dicom_seg", "dicom_sr")))
    reference = first(groups(made["dicom_sr"])[0], "121191").ReferencedSOPSequence[0]  # type: ignore[union-attr]
    assert reference.ReferencedSOPInstanceUID == made["dicom_seg"].SOPInstanceUID
    assert reference.ReferencedSegmentNumber == 1


def test_without_a_seg_the_report_references_the_images(paths: list[Path]) -> None:
    dataset = report(paths, findings(paths), ("dicom_sr",))
    assert first(groups(dataset)[0], "121191") is None
    images = [item for item in children(groups(dataset)[0]) if item.ValueType == "IMAGE"]
    assert len(images) == 6
    assert validate(dataset, paths).errors == ()


def test_nothing_found_is_said_by_code_for_all_that_was_looked_for(paths: list[Path]) -> None:
    dataset = report(paths, Findings("Nothing found"))
    said = [
        (first(group, "121071").ConceptCodeSequence[0].CodeValue, first(group, "705057003").ConceptCodeSequence[0].CodeMeaning)  # type: ignore[union-attr]
        for group in groups(dataset)
    ]
    assert said == [(LUNG.value, "Absent"), (NODULE.value, "Absent")]
    assert validate(dataset, paths).errors == ()


def test_evidence_is_exactly_what_was_read(paths: list[Path]) -> None:
    part = findings(paths[1:4])
    made = dict(write_results(context(paths), part, ("dicom_seg", "dicom_sr")))
    (study,) = made["dicom_sr"].CurrentRequestedProcedureEvidenceSequence
    listed = {item.ReferencedSOPInstanceUID for series in study.ReferencedSeriesSequence for item in series.ReferencedSOPSequence}
    assert listed == {*part.used_instances, made["dicom_seg"].SOPInstanceUID}


def test_priors_are_other_evidence(paths: list[Path], tmp_path: Path) -> None:
    prior = ct_series(tmp_path / "prior", slices=2)
    found = findings(paths)
    prior_uids = findings(prior).used_instances
    both = replace(found, used_instances=(*found.used_instances, *prior_uids))
    dataset = report([*paths, *prior], both)
    (other,) = dataset.PertinentOtherEvidenceSequence
    assert other.StudyInstanceUID == dcmread(prior[0]).StudyInstanceUID
    assert dataset.StudyInstanceUID == dcmread(paths[0]).StudyInstanceUID
    assert validate(dataset, [*paths, *prior], [made for _, made in write_results(context(paths), found, ("dicom_seg",))]).ok


def test_unverified_until_a_clinician_confirmed(paths: list[Path]) -> None:
    fresh = report(paths, findings(paths))
    assert (fresh.CompletionFlag, fresh.VerificationFlag, fresh.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    confirmed = report(paths, findings(paths), reviewed=REVIEWER)
    assert (confirmed.VerificationFlag, confirmed.PreliminaryFlag) == ("VERIFIED", "FINAL")
    (observer,) = confirmed.VerifyingObserverSequence
    assert str(observer.VerifyingObserverName) == "Smith^Jane"
    assert observer.VerificationDateTime.astimezone(UTC) == REVIEWER.at
    assert validate(confirmed, paths).errors == ()
    refused = report(paths, findings(paths), reviewed=replace(REVIEWER, decision="rejected"))
    assert refused.VerificationFlag == "UNVERIFIED"


def test_a_report_verified_later_references_the_seg_that_was_delivered(paths: list[Path], tmp_path: Path) -> None:
    found = findings(paths)
    (seg,) = [dataset for _, dataset in write_results(context(paths), found, ("dicom_seg",))]
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    later = context(paths, uid_seed="run-1/measure/reviewed", reviewed=REVIEWER)
    ((_, dataset),) = write_results(later, found, ("dicom_sr",), [dcmread(tmp_path / "seg.dcm")])
    reference = first(groups(dataset)[0], "121191").ReferencedSOPSequence[0]  # type: ignore[union-attr]
    assert reference.ReferencedSOPInstanceUID == seg.SOPInstanceUID
    assert dataset.VerificationFlag == "VERIFIED"
    assert validate(dataset, paths, [seg]).errors == ()


def test_the_report_names_what_it_supersedes(paths: list[Path]) -> None:
    old = report(paths, findings(paths))
    earlier = Predecessor(str(old.SOPClassUID), str(old.SOPInstanceUID), str(old.SeriesInstanceUID))
    new = report(paths, findings(paths), uid_seed="again", supersedes=(earlier,))
    (study,) = new.PredecessorDocumentsSequence
    assert study.StudyInstanceUID == old.StudyInstanceUID
    assert study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == old.SOPInstanceUID
    assert validate(new, paths).errors == ()


@pytest.mark.parametrize(
    ("procedure", "source", "wanted"),
    [
        (None, None, "363679005"),
        (Code("77477000", "SCT", "CT"), None, "77477000"),
        (Code("77477000", "SCT", "CT"), "169069000", "169069000"),
    ],
)
def test_procedure_reported_is_the_imaging_procedure(
    tmp_path: Path, procedure: Code | None, source: str | None, wanted: str
) -> None:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = source, "SCT", "CT of chest"
    paths = ct_series(tmp_path, changes={"ProcedureCodeSequence": [item]} if source else None)
    dataset = report(paths, findings(paths), manifest=manifest(procedure=procedure))
    assert first(dataset, "121058").ConceptCodeSequence[0].CodeValue == wanted  # type: ignore[union-attr]


def test_a_finding_on_frames_of_a_cine_names_the_frames() -> None:
    path = Path(str(get_testdata_file("examples_ybr_color.dcm")))
    uid = str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
    found = Findings("x", (Finding("b-line", NODULE, source_instances=(uid,), frames=(3, 4)),), used_instances=(uid,))
    dataset = report([path], found)
    (image,) = [item for item in children(groups(dataset)[0]) if item.ValueType == "IMAGE"]
    assert list(image.ReferencedSOPSequence[0].ReferencedFrameNumber) == [3, 4]
    assert validate(dataset, [path]).errors == ()


def test_a_segment_on_one_picture_is_referenced_by_its_frame() -> None:
    path = Path(str(get_testdata_file("US1_UNCR.dcm")))
    made = write_results(context([path]), findings([path]), ("dicom_seg", "dicom_sr"))
    dataset = dict(made)["dicom_sr"]
    assert first(groups(dataset)[0], "121214") is not None
    assert validate(dataset, [path], [item for _, item in made]).errors == ()
