"""SEG: the mask lies where the source lies, on every kind of series."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from caregrid.domain.findings import Findings, Segment
from caregrid.errors import ResultInvalid
from caregrid.results import dicom_seg, tracking_uid, unwritable, validate
from caregrid.runtime.volumes import read_volume
from tests.support.data import shared
from tests.support.results import AXIAL, LUNG, NODULE, STRUCTURE, context, ct_series, findings, headers

ROOT = 0.5**0.5
OBLIQUE = (ROOT, ROOT, 0.0, -0.5, 0.5, -ROOT)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def box_mask(affine: np.ndarray, shape: tuple[int, ...], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Voxels whose centre lies in a box of patient space (mm), worked out from the volume's affine."""
    index = np.indices(shape).reshape(3, -1)
    points = affine[:3, :3] @ index + affine[:3, 3:4]
    inside = np.all((points >= low[:, None]) & (points <= high[:, None]), axis=0)
    return inside.reshape(shape)


def points_by_hand(dataset: Dataset) -> np.ndarray:
    """Patient coordinates (mm) of every set pixel, read with pydicom and arithmetic only. (n, 3), sorted."""
    rows, columns = dataset.Rows, dataset.Columns
    bits = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")
    frames = bits[: dataset.NumberOfFrames * rows * columns].reshape(-1, rows, columns)
    shared_group = dataset.SharedFunctionalGroupsSequence[0]
    found = []
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        orientation = group.get("PlaneOrientationSequence", shared_group.get("PlaneOrientationSequence"))[0]
        measures = group.get("PixelMeasuresSequence", shared_group.get("PixelMeasuresSequence"))[0]
        along = np.array(orientation.ImageOrientationPatient, float)
        spacing = np.array(measures.PixelSpacing, float)
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.nonzero(frame)
        found.append(place + np.outer(column, along[:3] * spacing[1]) + np.outer(row, along[3:] * spacing[0]))
    return in_order(np.concatenate(found))


def points_by_affine(affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return in_order((affine[:3, :3] @ np.array(np.nonzero(mask)) + affine[:3, 3:4]).T)


def in_order(points: np.ndarray) -> np.ndarray:
    """Sorted to the hundredth of a millimetre."""
    rounded = np.round(points, 2) + 0.0
    return rounded[np.lexsort(rounded.T)]


@pytest.mark.parametrize(
    ("orientation", "step", "backwards"),
    [
        pytest.param(AXIAL, 2.0, False, id="axial"),
        pytest.param(AXIAL, 2.0, True, id="axial, files from head to feet"),
        pytest.param(FLIPPED, 2.0, False, id="normal towards the feet"),
        pytest.param(CORONAL, 3.3, True, id="coronal"),
        pytest.param(OBLIQUE, 1.7, False, id="oblique"),
        pytest.param(OBLIQUE, 1.7, True, id="oblique, backwards"),
        pytest.param(AXIAL, 12.5, False, id="gapped: slices 12.5 mm apart"),
    ],
)
def test_a_box_in_the_patient_comes_back_where_it_was(
    tmp_path: Path, orientation: tuple[float, ...], step: float, backwards: bool
) -> None:
    paths = ct_series(tmp_path, slices=7, step=step, orientation=orientation, backwards=backwards)
    volume = read_volume(paths)
    centre = volume.affine[:3, :3] @ np.array([2.5, 60, 40]) + volume.affine[:3, 3]
    half = np.abs(volume.affine[:3, :3]) @ np.array([1.6, 12, 9])
    mask = box_mask(volume.affine, volume.array.shape, centre - half, centre + half)
    assert mask.any(axis=(1, 2)).sum() >= 2
    assert 100 < mask.sum() < mask.size / 10

    (dataset,) = dicom_seg.write(context(paths), findings(paths, mask))
    dataset.save_as(tmp_path / "seg.dcm", enforce_file_format=True)

    wanted = points_by_affine(volume.affine, mask)
    assert np.array_equal(points_by_hand(dcmread(tmp_path / "seg.dcm")), wanted)
    read = hd.seg.segread(tmp_path / "seg.dcm")
    geometry = read.get_volume(combine_segments=True, rescale_fractional=False)
    assert np.array_equal(points_by_affine(geometry.affine, geometry.array > 0), wanted)
    assert validate(tmp_path / "seg.dcm", paths).errors == ()


@pytest.mark.parametrize("folder", ["ct-chest", "mr-ge-16"])
def test_a_mask_on_a_real_series_comes_back_voxel_for_voxel(tmp_path: Path, folder: str) -> None:
    paths = sorted(path for path in shared(folder).iterdir() if path.is_file() and path.suffix != ".md")
    volume = read_volume(paths, longest_run=True)  # ct-chest lacks a slice
    used = [path for path in paths if dcmread(path, stop_before_pixels=True).SOPInstanceUID in volume.sop_instance_uids]
    mask = volume.array > np.percentile(volume.array, 90)
    mask[::3] = False
    (dataset,) = dicom_seg.write(context(paths), findings(used, mask))
    assert np.array_equal(points_by_hand(dataset), points_by_affine(volume.affine, mask))
    assert dataset.NumberOfFrames == mask.any(axis=(1, 2)).sum()
    assert validate(dataset, used).errors == ()


def test_every_frame_names_the_instance_it_lies_on(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, backwards=True)
    (dataset,) = dicom_seg.write(context(paths), findings(paths))
    places = {str(one.SOPInstanceUID): list(one.ImagePositionPatient) for one in headers(paths)}
    for group in dataset.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert list(group.PlanePositionSequence[0].ImagePositionPatient) == places[source]


def test_frames_without_a_voxel_are_left_out(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=6)
    (dataset,) = dicom_seg.write(context(paths), findings(paths))
    assert dataset.NumberOfFrames == 2
    assert len(dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 6


def test_an_empty_mask_is_left_out_and_no_mask_makes_no_seg(tmp_path: Path) -> None:
    paths = ct_series(tmp_path)
    full = findings(paths)
    empty = replace(full.segments[0], label="Right lung", mask=np.zeros_like(full.segments[0].mask))
    (dataset,) = dicom_seg.write(context(paths), replace(full, segments=(empty, *full.segments)))
    assert [(item.SegmentNumber, item.SegmentLabel) for item in dataset.SegmentSequence] == [(1, "Left lung")]
    assert dicom_seg.write(context(paths), replace(full, segments=(empty,))) == []
    assert dicom_seg.write(context(paths), Findings("nothing")) == []


def test_overlapping_segments_keep_their_own_voxels(tmp_path: Path) -> None:
    paths = ct_series(tmp_path)
    lung = findings(paths).segments[0]
    nodule = np.zeros_like(lung.mask)
    nodule[2, 25:30, 35:40] = True
    both = (lung, Segment("Nodule", STRUCTURE, NODULE, nodule, lung.source_series))
    (dataset,) = dicom_seg.write(context(paths), Findings("two", segments=both))
    dataset.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    read = hd.seg.segread(tmp_path / "seg.dcm")
    sources = [str(one.SOPInstanceUID) for one in headers(paths)]
    pixels = read.get_pixels_by_source_instance(sources, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels[..., 0].astype(bool), lung.mask)
    assert np.array_equal(pixels[..., 1].astype(bool), nodule)


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=4)
    wrong = findings(paths, np.ones((5, 128, 128), bool))
    with pytest.raises(ResultInvalid, match="has shape"):
        dicom_seg.write(context(paths), wrong)


def test_instances_the_algorithm_was_not_given_are_refused(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=4)
    with pytest.raises(ResultInvalid, match="was not given"):
        dicom_seg.write(context(paths[:3]), findings(paths))


def test_a_mask_on_part_of_a_series_lies_on_the_instances_used(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, slices=6)
    part = findings(paths[2:5])
    (dataset,) = dicom_seg.write(context(paths), part)
    listed = {item.ReferencedSOPInstanceUID for item in dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert listed == set(part.used_instances)


def test_segments_say_what_and_by_which_algorithm(tmp_path: Path) -> None:
    paths = ct_series(tmp_path)
    (dataset,) = dicom_seg.write(context(paths), findings(paths))
    (segment,) = dataset.SegmentSequence
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("lung-volume", "1.2.0")
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
    assert "threshold" in algorithm.AlgorithmParameters
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == LUNG.value
    assert (segment.TrackingID, segment.TrackingUID) == (
        "lung-left",
        tracking_uid(str(dataset.StudyInstanceUID), "lung-volume", "lung-left"),
    )


def test_one_seg_per_source_series(tmp_path: Path) -> None:
    first, second = ct_series(tmp_path / "a"), ct_series(tmp_path / "b")
    one, two = findings(first), findings(second)
    both = replace(one, segments=(*one.segments, *two.segments), used_instances=(*one.used_instances, *two.used_instances))
    made = dicom_seg.write(context([*first, *second]), both)
    assert [item.ReferencedSeriesSequence[0].SeriesInstanceUID for item in made] == [
        one.segments[0].source_series,
        two.segments[0].source_series,
    ]
    assert len({item.SOPInstanceUID for item in made}) == 2
    assert [item.InstanceNumber for item in made] == [1, 2]


def test_an_enhanced_object_with_frames_out_of_order() -> None:
    path = Path(str(get_testdata_file("eCT_Supplemental.dcm")))
    volume = read_volume([path])
    assert volume.frame_numbers == (2, 1)
    mask = np.zeros(volume.array.shape, bool)
    mask[0, 100:120, 200:260] = True
    (dataset,) = dicom_seg.write(context([path]), findings([path], mask))
    assert np.array_equal(points_by_hand(dataset), points_by_affine(volume.affine, mask))
    group = dataset.PerFrameFunctionalGroupsSequence[0]
    assert group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber == 2


def test_a_chest_x_ray_gets_a_seg_without_a_frame_of_reference() -> None:
    path = Path(str(get_testdata_file("RG1_UNCR.dcm")))
    mask = np.zeros((1955, 1841), bool)
    mask[300:900, 200:700] = True
    (dataset,) = dicom_seg.write(context([path]), findings([path], mask))
    assert "FrameOfReferenceUID" not in dataset
    pixels = np.unpackbits(np.frombuffer(dataset.PixelData, np.uint8), bitorder="little")[: mask.size]
    assert np.array_equal(pixels.reshape(mask.shape).astype(bool), mask)
    assert validate(dataset, [path]).errors == ()


def test_a_cine_has_no_seg_and_says_so() -> None:
    path = Path(str(get_testdata_file("examples_ybr_color.dcm")))
    found = findings([path])
    assert dicom_seg.write(context([path]), found) == []
    assert unwritable(context([path]), found) == ("Left lung",)
