"""Secondary captures and rejection notes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from caregrid.domain.codes import Code
from caregrid.domain.findings import Findings, Picture
from caregrid.errors import ResultInvalid
from caregrid.results import dicom_kos, dicom_sc, validate, write_results
from caregrid.results.dicom_sc import WARNING_TEXT, burn_in, label_lines
from tests.support.results import context, ct_series, findings


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return ct_series(tmp_path / "source")


def encoded(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_the_picture_is_whole_and_the_label_lies_below_it(paths: list[Path], tmp_path: Path) -> None:
    found = findings(paths)
    (dataset,) = dicom_sc.write(context(paths), found)
    dataset.save_as(tmp_path / "sc.dcm", enforce_file_format=True)
    pixels = dcmread(tmp_path / "sc.dcm").pixel_array
    rows, columns, _ = found.pictures[0].array.shape
    left = (pixels.shape[1] - columns) // 2
    assert np.array_equal(pixels[:rows, left : left + columns], found.pictures[0].array)
    label = pixels[rows:]
    assert 0.01 < (label > 128).mean() < 0.5
    assert pixels.shape[1] >= 320


def test_the_label_names_algorithm_version_and_warning(paths: list[Path]) -> None:
    picture = findings(paths).pictures[0]
    text = " ".join(label_lines(context(paths), picture))
    assert "lung-volume 1.2.0" in text
    assert "AI result, not for primary diagnosis" in text
    other = burn_in(picture, ("something else",))
    same = burn_in(picture, label_lines(context(paths), picture))
    assert other.shape != same.shape or not np.array_equal(other, same)


def test_the_capture_says_what_it_is(paths: list[Path]) -> None:
    (dataset,) = dicom_sc.write(context(paths), findings(paths))
    assert (dataset.BurnedInAnnotation, dataset.ConversionType, dataset.Modality) == ("YES", "WSD", "OT")
    assert WARNING_TEXT in dataset.DerivationDescription
    assert [item.ReferencedSOPInstanceUID for item in dataset.SourceImageSequence] == [
        dcmread(paths[0], stop_before_pixels=True).SOPInstanceUID
    ]
    assert validate(dataset, paths).errors == ()


def test_a_lossy_source_makes_a_lossy_capture() -> None:
    path = Path(str(get_testdata_file("color3d_jpeg_baseline.dcm")))
    assert dcmread(path, stop_before_pixels=True).LossyImageCompression == "01"
    (dataset,) = dicom_sc.write(context([path]), findings([path]))
    assert dataset.LossyImageCompression == "01"
    assert validate(dataset, [path]).errors == ()


def test_no_picture_no_capture_and_two_pictures_one_series(paths: list[Path]) -> None:
    assert dicom_sc.write(context(paths), Findings("none")) == []
    picture = findings(paths).pictures[0]
    two = dicom_sc.write(context(paths), Findings("two", pictures=(picture, picture)))
    assert [item.InstanceNumber for item in two] == [1, 2]
    assert len({item.SeriesInstanceUID for item in two}) == 1


def test_a_picture_that_is_none_is_refused(paths: list[Path]) -> None:
    with pytest.raises(ResultInvalid, match="uint8"):
        dicom_sc.write(context(paths), Findings("x", pictures=(Picture("x", np.zeros((4, 4), np.uint8)),)))


@pytest.mark.parametrize("value", ["113001", "113037", "113038", "113039"])
def test_a_rejection_note_names_every_result(paths: list[Path], tmp_path: Path, value: str) -> None:
    made = [dataset for _, dataset in write_results(context(paths), findings(paths), ("dicom_seg", "dicom_sr", "dicom_sc"))]
    files = []
    for number, dataset in enumerate(made):
        files.append(tmp_path / f"{number}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    note = dicom_kos.withdraw(context(paths), files, dicom_kos.REASONS[value])
    assert note.ConceptNameCodeSequence[0].CodeValue == value
    (study,) = note.CurrentRequestedProcedureEvidenceSequence
    listed = {item.ReferencedSOPInstanceUID for series in study.ReferencedSeriesSequence for item in series.ReferencedSOPSequence}
    assert listed == {dataset.SOPInstanceUID for dataset in made}
    assert note.PatientID == made[0].PatientID
    assert validate(note, paths).errors == ()


def test_withdrawing_leaves_the_results_as_they_are(paths: list[Path]) -> None:
    (seg,) = [dataset for _, dataset in write_results(context(paths), findings(paths), ("dicom_seg",))]
    before = encoded(seg)
    note = dicom_kos.withdraw(context(paths), [seg])
    assert encoded(seg) == before
    assert dicom_kos.withdraw(context(paths), [seg]).SOPInstanceUID == note.SOPInstanceUID
    assert dicom_kos.withdraw(context(paths), [seg], dicom_kos.PATIENT_SAFETY).SOPInstanceUID != note.SOPInstanceUID


def test_what_cannot_be_withdrawn_is_refused(paths: list[Path], tmp_path: Path) -> None:
    other = ct_series(tmp_path / "other")
    (foreign,) = [dataset for _, dataset in write_results(context(other), findings(other), ("dicom_seg",))]
    with pytest.raises(ResultInvalid, match="another study"):
        dicom_kos.withdraw(context(paths), [foreign])
    with pytest.raises(ResultInvalid, match="no result"):
        dicom_kos.withdraw(context(paths), [])
    with pytest.raises(ResultInvalid, match="not a rejection note"):
        dicom_kos.withdraw(context(other), [foreign], Code("113000", "DCM", "Of Interest"))
