"""A series becomes a right volume or is refused by name. The traps are made of real series."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, generate_uid
from scipy.spatial.transform import Rotation

from caregrid.domain.images import Volume
from caregrid.errors import PixelsUndecodable, VolumeRefused
from caregrid.runtime.pixels import decode
from caregrid.runtime.volumes import CODES, read_volume
from tests.support.data import shared

#: The chest series lacks one slice between its first and second file; without the first the rest is a sound volume.
CHEST_MISSING_AFTER = 1
GOOD = ("ct-chest", "mr-ge-16", "mr-acr-phantom/GE", "mr-acr-phantom/Siemens", "mr-acr-phantom/PhilipsAchieva", "ct-liver-seg")


def _files(name: str) -> list[Path]:
    files = sorted(shared(name).glob("0*.dcm" if name == "ct-liver-seg" else "*.dcm"))
    return files[CHEST_MISSING_AFTER:] if name == "ct-chest" else files


def _datasets(name: str = "ct-chest", edge: int = 48, count: int = 10) -> list[Dataset]:
    """The lowest slices of a real series in order, cut down to a small square so that many can be written."""
    datasets = [pydicom.dcmread(path) for path in _files(name)]
    datasets.sort(key=lambda one: float(np.cross(*np.reshape(one.ImageOrientationPatient, (2, 3))) @ one.ImagePositionPatient))
    return [_cropped(dataset, edge) for dataset in datasets[:count]]


def _cropped(dataset: Dataset, edge: int) -> Dataset:
    pixels = dataset.pixel_array[200 : 200 + edge, 200 : 200 + edge]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelData = pixels.tobytes()
    return dataset


Write = Callable[[Sequence[Dataset]], list[Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(datasets: Sequence[Dataset]) -> list[Path]:
        paths = [tmp_path / f"{number:03d}.dcm" for number in range(len(datasets))]
        for path, dataset in zip(paths, datasets, strict=True):
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.save_as(path)
        return paths

    return written


def _copy(dataset: Dataset, **changes: object) -> Dataset:
    """Another instance like ``dataset`` with some attributes changed."""
    other = deepcopy(dataset)
    other.SOPInstanceUID = generate_uid()
    for keyword, value in changes.items():
        setattr(other, keyword, value)
    return other


def _moved(dataset: Dataset, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> list[float]:
    return [float(a) + b for a, b in zip(dataset.ImagePositionPatient, (x, y, z), strict=True)]


def _refused(paths: Sequence[Path], **options: bool) -> VolumeRefused:
    with pytest.raises(VolumeRefused) as refusal:
        read_volume(paths, **options)
    assert refusal.value.details["code"] in CODES
    assert refusal.value.details["reason"]
    return refusal.value


def _at(volume: Volume, lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Index (slice, row, column) of points (n, 3) in the patient."""
    return (np.linalg.inv(volume.affine) @ np.c_[lps, np.ones(len(lps))].T).T[:, :3]


# ── sound series ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", GOOD)
def test_every_voxel_lies_where_its_header_says(name: str) -> None:
    paths = _files(name)
    volume = read_volume(paths)
    assert volume.array.shape[0] == len(paths) == len(volume.sop_instance_uids) == len(volume.frame_numbers)
    assert volume.corrections == ()
    for path in paths:
        dataset = pydicom.dcmread(path)
        number = volume.sop_instance_uids.index(dataset.SOPInstanceUID)
        position, orientation = np.array(dataset.ImagePositionPatient), np.array(dataset.ImageOrientationPatient)
        down, across = (float(step) for step in dataset.PixelSpacing)
        for row, column in ((0, 0), (10, 200), (255, 7)):
            # PS3.3 equation C.7.6.2.1-1: i counts columns along the first triplet, j rows along the second.
            patient = position + orientation[:3] * across * column + orientation[3:] * down * row
            np.testing.assert_allclose(volume.affine @ [number, row, column, 1], [*patient, 1], atol=2e-3)
        slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
        np.testing.assert_allclose(volume.array[number], dataset.pixel_array * slope + intercept, rtol=1e-6)


@pytest.mark.parametrize("name", GOOD)
def test_highdicom_builds_the_same_volume(name: str) -> None:
    volume = read_volume(_files(name))
    _same_as_highdicom(volume, _files(name))


def _same_as_highdicom(volume: Volume, paths: Sequence[Path]) -> None:
    """highdicom runs through the slices the other way; the same point of the patient must have the same value."""
    other = highdicom.get_volume_from_series([pydicom.dcmread(path) for path in paths])
    points = np.random.default_rng(2).integers(0, volume.array.shape, size=(500, 3))
    patient = (volume.affine @ np.c_[points, np.ones(500)].T).T[:, :3]
    index = other.map_reference_to_indices(patient)
    np.testing.assert_allclose(index, np.rint(index), atol=0.02)
    theirs = other.array[tuple(np.rint(index).astype(int).T)]
    np.testing.assert_allclose(volume.array[tuple(points.T)], theirs, rtol=1e-6)


@pytest.mark.parametrize("name", GOOD)
def test_dcm2niix_builds_the_same_volume(name: str, tmp_path: Path) -> None:
    # The program of the Python package lies beside the interpreter, which is not always on PATH.
    program = shutil.which("dcm2niix", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("dcm2niix is not installed")
    for path in _files(name):
        shutil.copy(path, tmp_path)
    subprocess.run([program, "-z", "n", "-b", "n", "-f", "volume", tmp_path], check=True, capture_output=True)
    (nifti,) = tmp_path.glob("*.nii")
    other = nibabel.load(nifti)
    volume = read_volume(_files(name))
    points = np.random.default_rng(2).integers(0, volume.array.shape, size=(500, 3))
    patient = (volume.affine @ np.c_[points, np.ones(500)].T).T
    # NIfTI counts x and y the other way round (RAS).
    index = (np.linalg.inv(other.affine) @ (patient * [-1, -1, 1, 1]).T).T[:, :3]
    np.testing.assert_allclose(index, np.rint(index), atol=0.02)
    theirs = other.get_fdata()[tuple(np.rint(index).astype(int).T)]
    np.testing.assert_allclose(volume.array[tuple(points.T)], theirs, rtol=1e-4, atol=1e-3)


#: Organ → mean between, HU (a scan without contrast medium: blood is about 40).
ORGANS = {
    "lung_lower_lobe_left": (-900, -800),
    "lung_lower_lobe_right": (-900, -800),
    "heart_ventricle_left": (20, 70),
    "heart_atrium_right": (0, 70),
    "vertebrae_T8": (850, 1050),
    "vertebrae_T11": (600, 750),
}


@pytest.mark.parametrize("organ", ORGANS)
def test_organ_masks_fall_on_the_organ(organ: str) -> None:
    """The masks' own slice distance, 1.6 mm, is wrong: whoever made them measured it across the missing slice."""
    volume = read_volume(_files("ct-chest"))
    mask = nibabel.load(shared(f"ct-chest/masks/{organ}.nii.gz"))
    assert mask.shape == (512, 512, 20)
    voxels = np.argwhere(np.asarray(mask.dataobj)[:, :, CHEST_MISSING_AFTER:])
    # NIfTI counts x and y the other way round (RAS).
    ras = (mask.affine @ np.c_[voxels, np.ones(len(voxels))].T).T
    patient = np.c_[-ras[:, 0], -ras[:, 1], volume.affine[2, 3] + voxels[:, 2] * volume.spacing[0]]
    index = np.rint(_at(volume, patient)).astype(int)
    low, high = ORGANS[organ]
    assert low < _mean(volume, index) < high
    if organ.startswith("vertebrae"):
        top = np.array(volume.array.shape) - 1
        for axis in range(3):
            turned = index.copy()
            turned[:, axis] = top[axis] - turned[:, axis]
            assert not low < _mean(volume, turned) < high, f"axis {axis} could be reversed and nobody would notice"


def _mean(volume: Volume, index: NDArray[np.intp]) -> float:
    return float(np.mean(volume.array[tuple(index.T)]))


def test_a_compressed_series_is_the_same_volume(write: Write) -> None:
    plain = _datasets()
    expected = read_volume(write(plain))
    for dataset in plain:
        dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    volume = read_volume(write(plain))
    np.testing.assert_array_equal(volume.array, expected.array)
    assert volume.array.dtype == np.int16


@pytest.mark.slow
def test_a_long_oblique_mr_series_of_384_slices(tmp_path: Path) -> None:
    with tarfile.open(shared("mri-t1/t1-dicom-384.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    paths = sorted(tmp_path.rglob("*.dcm"))
    volume = read_volume(paths)
    assert volume.array.shape == (384, 384, 274)
    np.testing.assert_allclose(volume.spacing, (0.66667, 0.66667, 0.69999), atol=1e-4)
    _same_as_highdicom(volume, paths)


# ── any order ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("eight")
    paths = []
    for number, dataset in enumerate(_datasets(edge=16, count=8)):
        paths.append(folder / f"{number}.dcm")
        dataset.save_as(paths[-1])
    return paths


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(8)))
def test_any_order_of_files_gives_the_identical_volume(eight: list[Path], order: list[int]) -> None:
    expected, volume = read_volume(eight), read_volume([eight[number] for number in order])
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.sop_instance_uids == expected.sop_instance_uids


def test_file_names_do_not_decide_the_order(write: Write) -> None:
    datasets = _datasets(edge=16)
    expected, reverse = read_volume(write(datasets)), read_volume(write(datasets[::-1]))
    np.testing.assert_array_equal(reverse.array, expected.array)
    np.testing.assert_array_equal(reverse.affine, expected.affine)


@settings(max_examples=15, deadline=None)
@given(
    turn=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0), st.floats(0.5, 10.0)),
    upwards=st.booleans(),
)
def test_any_orientation_and_spacing(
    eight: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
    turn: tuple[float, ...],
    spacing: tuple[float, ...],
    upwards: bool,
) -> None:
    """Oblique planes and pixels that are not square: the affine is the one the attributes say, whatever way the slices came."""
    axes = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    across, down, normal = np.round(axes, 6).T
    folder, corner = tmp_path_factory.mktemp("turned"), np.array([10.0, -20.0, 30.0])
    for number, path in enumerate(eight):
        dataset = pydicom.dcmread(path)
        place = number if upwards else -number
        dataset.ImageOrientationPatient = [*across, *down]
        dataset.ImagePositionPatient = [f"{value:.6f}"[:16] for value in corner + place * spacing[2] * normal]
        dataset.PixelSpacing = [f"{value:.6f}" for value in spacing[:2]]
        dataset.save_as(folder / f"{number}.dcm")
    volume = read_volume(sorted(folder.glob("*.dcm")))
    lowest = corner if upwards else corner - 7 * spacing[2] * normal
    expected = np.c_[normal * spacing[2], down * spacing[0], across * spacing[1], lowest]
    np.testing.assert_allclose(volume.affine[:3], expected, atol=1e-4)
    np.testing.assert_allclose(volume.spacing, (spacing[2], *spacing[:2]), rtol=1e-4)
    first = pydicom.dcmread(folder / f"{0 if upwards else 7}.dcm")
    assert volume.sop_instance_uids[0] == first.SOPInstanceUID


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rescale_is_applied_slice_by_slice(write: Write) -> None:
    datasets = _datasets()
    stored = [dataset.pixel_array.astype(float) for dataset in datasets]
    for number, dataset in enumerate(datasets):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(1 + number), str(-1000 + 10 * number)
    volume = read_volume(write(datasets))
    for number, one in enumerate(stored):
        np.testing.assert_array_equal(volume.array[number], one * (1 + number) - 1000 + 10 * number)
    datasets[3].RescaleSlope = "1.5"
    volume = read_volume(write(datasets))
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[3], stored[3] * 1.5 - 970)
    np.testing.assert_allclose(volume.array[4], stored[4] * 5 - 960)


@pytest.mark.parametrize(("signed", "low", "high"), [(0, 0, 65535), (0, 0, 33791), (1, -32768, 32767), (1, -31744, 32767)])
def test_values_at_the_edge_of_the_type_are_not_wrapped(write: Write, signed: int, low: int, high: int) -> None:
    datasets = _datasets(count=3)
    stored = np.full((48, 48), low, dtype=np.int16 if signed else np.uint16)
    stored[0, 0] = high
    for dataset in datasets:
        dataset.PixelRepresentation, dataset.PixelData = signed, stored.tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
        dataset.pop("SmallestImagePixelValue", None)
    volume = read_volume(write(datasets))
    np.testing.assert_array_equal(volume.array[1], stored.astype(float) - 1024)
    fits = low - 1024 >= -32768 and high - 1024 <= 32767
    assert volume.array.dtype == (np.int16 if fits else np.float32)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(("bits", "stored"), [(16, 16), (16, 12), (8, 8), (8, 7)])
@pytest.mark.parametrize("signed", [0, 1])
def test_pixels_are_those_the_decoder_gives(write: Write, syntax: UID, bits: int, stored: int, signed: int) -> None:
    """Noise in every bit, also in those that mean nothing: taken from the file or decoded, it must come out the same."""
    datasets = _datasets(count=3)
    noise = np.random.default_rng(bits + stored)
    for dataset in datasets:
        list(dataset.iterall())  # read in the file's own encoding before it is written in another
        pixels = noise.integers(0, 1 << bits, (48, 48)).astype(f"<u{bits // 8}")
        dataset.PixelData, dataset.file_meta.TransferSyntaxUID = pixels.tobytes(), syntax
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, stored, stored - 1
        dataset.PixelRepresentation, dataset["PixelData"].VR = signed, "OW"
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0"
        dataset.pop("SmallestImagePixelValue", None)
    paths = write(datasets)
    volume = read_volume(paths)
    by_uid = {str(one.SOPInstanceUID): decode(one) for one in map(pydicom.dcmread, paths)}
    for array, uid in zip(volume.array, volume.sop_instance_uids, strict=True):
        np.testing.assert_array_equal(array, by_uid[uid])


# ── traps ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_real_chest_series_lacks_a_slice() -> None:
    refusal = _refused(sorted(shared("ct-chest").glob("*.dcm")))
    assert refusal.details["code"] == "gap"
    assert "1 slice(s) missing at steps of 0.80 mm, the first after slice 1 of 20" in str(refusal)


def test_the_longest_run_is_kept_when_asked() -> None:
    volume = read_volume(sorted(shared("ct-chest").glob("*.dcm")), longest_run=True)
    expected = read_volume(_files("ct-chest"))
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.corrections == ("longest-run: kept 19 of 20 slices, 1 missing",)


@pytest.mark.parametrize("correct_tilt", [False, True])
def test_the_real_head_of_variable_tilt_and_spacing_is_refused(correct_tilt: bool) -> None:
    refusal = _refused(sorted(shared("ct-head-tilt").glob("*.dcm")), correct_tilt=correct_tilt)
    assert refusal.details["code"] == "variable-spacing"
    assert "from 1.08 to 7.00 mm" in str(refusal)


def test_the_evenly_spaced_part_of_the_head_is_refused_for_its_tilt() -> None:
    refusal = _refused(sorted(shared("ct-head-tilt").glob("*.dcm"))[:14])
    assert refusal.details["code"] == "gantry-tilt"
    assert "18.5°" in str(refusal)


@pytest.mark.parametrize("missing", [[4], [1], [4, 5, 6], [2, 7]])
def test_missing_slices(write: Write, missing: list[int]) -> None:
    refusal = _refused(write([one for number, one in enumerate(_datasets()) if number not in missing]))
    assert refusal.details["code"] == "gap"
    assert f"{len(missing)} slice(s) missing" in str(refusal)


def test_one_slice_moved_along_the_stack(write: Write) -> None:
    datasets = _datasets()
    datasets[4].ImagePositionPatient = _moved(datasets[4], z=0.3)
    assert _refused(write(datasets)).details["code"] == "variable-spacing"


def test_spacing_that_creeps(write: Write) -> None:
    """Every step is near the mean, and still the middle of the stack lies millimetres off."""
    datasets, base = [], _datasets(count=1)[0]
    for number in range(200):
        z = number * 1.04 if number < 100 else 104 + (number - 100) * 0.96
        datasets.append(_copy(base, ImagePositionPatient=_moved(base, z=z)))
    assert _refused(write(datasets)).details["code"] == "variable-spacing"


def test_rounded_positions_are_accepted(write: Write) -> None:
    datasets = _datasets()
    for number, dataset in enumerate(datasets):
        dataset.ImagePositionPatient = _moved(dataset, z=0.02 * (-1) ** number)
    assert read_volume(write(datasets)).array.shape[0] == 10


def test_one_slice_moved_sideways(write: Write) -> None:
    datasets = _datasets()
    datasets[4].ImagePositionPatient = _moved(datasets[4], x=3.0)
    assert _refused(write(datasets)).details["code"] == "shifted-slices"


def test_two_instances_in_one_place(write: Write) -> None:
    datasets = _datasets()
    assert _refused(write([*datasets, _copy(datasets[3])])).details["code"] == "duplicate-position"
    assert _refused(write([*datasets, _copy(datasets[3], AcquisitionNumber=2)])).details["code"] == "duplicate-position"
    sideways = _copy(datasets[3], ImagePositionPatient=_moved(datasets[3], x=40.0))
    assert _refused(write([*datasets, sideways])).details["code"] == "duplicate-position"


def test_the_same_instance_twice_is_dropped_and_said(write: Write) -> None:
    datasets = _datasets()
    expected = read_volume(write(datasets))
    volume = read_volume(write([*datasets, deepcopy(datasets[5])]))
    np.testing.assert_array_equal(volume.array, expected.array)
    assert volume.corrections == ("duplicate-instance: 1 repeated file(s) dropped",)


def test_two_different_objects_under_one_uid(write: Write) -> None:
    datasets = _datasets()
    other = deepcopy(datasets[5])
    other.PixelData = bytes(len(other.PixelData))
    refusal = _refused(write([*datasets, other]))
    assert refusal.details["code"] == "duplicate-instance"
    assert datasets[5].SOPInstanceUID in str(refusal)


def test_one_slice_turned(write: Write) -> None:
    datasets = _datasets()
    turned = _copy(datasets[0], ImageOrientationPatient=[0, 1, 0, 0, 0, -1], ImagePositionPatient=[0, -100, 100])
    assert _refused(write([*datasets, turned])).details["code"] == "mixed-orientation"
    flipped = _copy(datasets[0], ImageOrientationPatient=[-1, 0, 0, 0, 1, 0], ImagePositionPatient=_moved(datasets[0], z=-0.8))
    assert _refused(write([*datasets, flipped])).details["code"] == "mixed-orientation"


def test_one_slice_of_another_size_or_spacing(write: Write) -> None:
    datasets = _datasets()
    smaller = _copy(datasets[-1], Rows=24, ImagePositionPatient=_moved(datasets[-1], z=0.8))
    smaller.PixelData = smaller.PixelData[: 24 * 48 * 2]
    assert _refused(write([*datasets, smaller])).details["code"] == "mixed-matrix"
    datasets[3].PixelSpacing = [0.9, 0.9]
    assert _refused(write(datasets)).details["code"] == "mixed-matrix"


def test_several_series_or_frames_of_reference(write: Write) -> None:
    datasets = _datasets()
    datasets[3].FrameOfReferenceUID = generate_uid()
    assert _refused(write(datasets)).details["code"] == "mixed-frame-of-reference"
    datasets[3].SeriesInstanceUID = generate_uid()
    assert _refused(write(datasets)).details["code"] == "mixed-series"


@pytest.mark.parametrize(
    ("keyword", "values", "code"),
    [
        ("EchoTime", (10.0, 80.0), "multi-echo"),
        ("EchoNumbers", (1, 2), "multi-echo"),
        ("TemporalPositionIdentifier", (1, 2), "temporal"),
        ("TriggerTime", (0.0, 40.0), "temporal"),
        ("AcquisitionNumber", (1, 2), "temporal"),
        ("DiffusionBValue", (0.0, 1000.0), "mixed-diffusion"),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]), "mixed-image-type"),
        ("ContentTime", ("101010", "111111"), "temporal"),
    ],
)
def test_several_volumes_in_one_series(write: Write, keyword: str, values: tuple[object, object], code: str) -> None:
    datasets = _datasets("mr-ge-16")
    both = [_copy(one, **{keyword: value}) for value in values for one in datasets]
    assert _refused(write(both)).details["code"] == code


def test_a_four_dimensional_series_of_two_places_only(write: Write) -> None:
    datasets = _datasets(count=1)
    assert _refused(write([_copy(datasets[0]) for _ in range(5)])).details["code"] == "temporal"


def test_echoes_that_do_not_overlap_are_still_two_volumes(write: Write) -> None:
    datasets = _datasets("mr-ge-16")
    for number, dataset in enumerate(datasets):
        dataset.EchoNumbers = 1 + number // 5
    assert _refused(write(datasets)).details["code"] == "multi-echo"


def test_a_mosaic(write: Write) -> None:
    datasets = _datasets("mr-ge-16", count=2)
    datasets[0].ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    assert _refused(write(datasets)).details["code"] == "mosaic"


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_slice_without_geometry(write: Write, keyword: str) -> None:
    datasets = _datasets()
    delattr(datasets[2], keyword)
    refusal = _refused(write(datasets))
    assert refusal.details["code"] == "no-geometry"
    assert keyword in str(refusal)
    setattr(datasets[2], keyword, None)
    assert _refused(write(datasets)).details["code"] == "no-geometry"


def test_geometry_that_makes_no_sense(write: Write) -> None:
    for keyword, value in (("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), ("PixelSpacing", [0, 0.5])):
        assert _refused(write([_copy(one, **{keyword: value}) for one in _datasets()])).details["code"] == "no-geometry"


def test_a_localizer(write: Write) -> None:
    datasets = _datasets(count=3)
    datasets[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    assert _refused(write(datasets)).details["code"] == "no-geometry"


def test_one_slice_or_none(write: Write) -> None:
    assert _refused(write(_datasets(count=1))).details["code"] == "too-few-slices"
    assert _refused([]).details["code"] == "too-few-slices"


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "letter.dcm").write_text("dear colleague")
    assert _refused([tmp_path / "letter.dcm"]).details["code"] == "not-an-image"
    assert _refused([shared("ct-liver-seg/liver.dcm")]).details["code"] == "not-an-image"
    assert _refused([shared("transfer-syntaxes/no-pixel-data.dcm")]).details["code"] == "not-an-image"
    assert _refused([shared("transfer-syntaxes/US-YBR_FULL_422-EVRLE.dcm")]).details["code"] == "colour"
    assert _refused([tmp_path / "gone.dcm"]).details["code"] == "not-an-image"


def test_pixels_that_stop_early(write: Write) -> None:
    datasets = _datasets()
    datasets[7].PixelData = datasets[7].PixelData[:400]
    refusal = _refused(write(datasets))
    assert refusal.details["code"] == "truncated-pixels"
    assert "007.dcm" in str(refusal)


def test_a_file_that_stops_early(write: Write) -> None:
    paths = write(_datasets())
    paths[7].write_bytes(paths[7].read_bytes()[:-200])
    assert _refused(paths).details["code"] == "truncated-pixels"


def test_an_unknown_transfer_syntax_is_named(write: Write) -> None:
    datasets = _datasets()
    datasets[2].compress(JPEGLSLossless, generate_instance_uid=False)
    paths = write(datasets)
    paths[2].write_bytes(paths[2].read_bytes().replace(b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.4.92"))
    with pytest.raises(PixelsUndecodable, match=r"1\.2\.840\.10008\.1\.2\.4\.92"):
        read_volume(paths)


def test_refusals_say_nothing_about_the_patient(write: Write) -> None:
    datasets = _datasets()
    for dataset in datasets:
        dataset.PatientName, dataset.PatientID = "Canary^Yellow", "CANARY-1"
    datasets[4].ImagePositionPatient = _moved(datasets[4], z=0.3)
    assert "canary" not in str(_refused(write(datasets))).lower()


# ── gantry tilt ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _anatomy(lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth body with a vessel that leans: what a scanner would measure at points (…, 3)."""
    x, y, z = lps[..., 0], lps[..., 1], lps[..., 2]
    body = 1000.0 * np.exp(-((x / 14.0) ** 2) - ((y - 2.0) / 11.0) ** 2)
    return body + 600.0 * np.exp(-((x - 0.4 * z) ** 2 + (y + 4.0) ** 2) / 20.0) - 1000.0


def _tilted(degrees: float, slices: int = 12) -> list[Dataset]:
    """The chest's headers with the pixels of ``_anatomy`` as a tilted gantry cuts it, one slice each 2 mm along z."""
    angle = np.deg2rad(degrees)
    along_row, along_column = np.array([1.0, 0, 0]), np.array([0, np.cos(angle), -np.sin(angle)])
    base = _datasets(count=1)[0]
    rows, columns = np.mgrid[0:48, 0:48]
    found = []
    for number in range(slices):
        position = np.array([-24.0, -24.0, 2.0 * number - 12.0])
        points = position + columns[..., None] * along_row + rows[..., None] * along_column
        values = np.rint(_anatomy(points) + 1024).astype(np.int16)
        one = _copy(base, ImagePositionPatient=list(position), ImageOrientationPatient=[*along_row, *along_column])
        one.PixelSpacing, one.PixelData, one.PixelRepresentation = [1.0, 1.0], values.tobytes(), 1
        one.RescaleSlope, one.RescaleIntercept = "1", "-1024"
        found.append(one)
    return found


@pytest.mark.parametrize("degrees", [18.5, -18.5, 5.0])
def test_tilt_is_refused_unless_asked_and_then_sheared_back(write: Write, degrees: float) -> None:
    paths = write(_tilted(degrees))
    assert _refused(paths).details["code"] == "gantry-tilt"
    volume = read_volume(paths, correct_tilt=True)
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert f"{abs(degrees):.1f}°" in volume.corrections[0]
    index = np.stack(np.meshgrid(*(np.arange(size) for size in volume.array.shape), indexing="ij"), axis=-1)
    patient = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    measured = volume.array > volume.array.min()
    off = np.abs(volume.array - _anatomy(patient))[measured]
    assert measured.mean() > 0.5
    # A wrong direction or sign of the shear is off by hundreds; linear interpolation between rows by a few.
    assert np.percentile(off, 99) < 12


def test_a_straight_stack_is_not_touched_by_the_tilt_correction(write: Write) -> None:
    paths = write(_tilted(0.0))
    np.testing.assert_array_equal(read_volume(paths, correct_tilt=True).array, read_volume(paths).array)


# ── enhanced multi-frame ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _enhanced() -> Dataset:
    path = get_testdata_file("eCT_Supplemental.dcm")
    assert path
    return pydicom.dcmread(path)


def test_enhanced_ct_frames_lie_where_their_functional_groups_say(write: Write) -> None:
    dataset = _enhanced()
    volume = read_volume(write([dataset]))
    assert volume.sop_instance_uids == (dataset.SOPInstanceUID,)
    assert sorted(volume.frame_numbers) == [1, 2]
    for number, frame in enumerate(volume.frame_numbers):
        groups = dataset.PerFrameFunctionalGroupsSequence[frame - 1]
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(volume.affine @ [number, 0, 0, 1], [*(float(x) for x in position), 1], atol=1e-3)
        np.testing.assert_array_equal(volume.array[number], dataset.pixel_array[frame - 1].astype(int) - 1024)


@pytest.mark.filterwarnings("ignore:The string")
@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("ct-chest", highdicom.legacy.LegacyConvertedEnhancedCTImage),
        ("mr-acr-phantom/PhilipsAchieva", highdicom.legacy.LegacyConvertedEnhancedMRImage),
    ],
)
def test_a_series_and_its_multi_frame_conversion_are_the_same_volume(write: Write, name: str, convert: type) -> None:
    datasets = _datasets(name)
    for number, dataset in enumerate(datasets):
        dataset.setdefault("PatientBirthDate", "")
        dataset.setdefault("AccessionNumber", "")
        dataset.RescaleSlope, dataset.RescaleIntercept = "1.5", str(-100 * number)
    expected = read_volume(write(datasets))
    converted = convert(datasets[::-1], generate_uid(), 1, generate_uid(), 1)
    volume = read_volume(write([converted]))
    assert len(volume.sop_instance_uids) == 1
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)


@pytest.mark.parametrize(("keyword", "code"), [("TemporalPositionIndex", "temporal"), ("StackID", "multiple-stacks")])
def test_enhanced_objects_of_several_volumes(write: Write, keyword: str, code: str) -> None:
    dataset = _enhanced()
    for number, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence, start=1):
        setattr(groups.FrameContentSequence[0], keyword, number if keyword == "TemporalPositionIndex" else str(number))
    assert _refused(write([dataset])).details["code"] == code


def test_enhanced_frames_at_one_place_and_two_echoes(write: Write) -> None:
    dataset = _enhanced()
    first, second = dataset.PerFrameFunctionalGroupsSequence
    second.PlanePositionSequence = deepcopy(first.PlanePositionSequence)
    assert _refused(write([dataset])).details["code"] == "temporal"
    for number, groups in enumerate((first, second)):
        echo = Dataset()
        echo.EffectiveEchoTime = 10.0 + number
        groups.MREchoSequence = [echo]
    assert _refused(write([dataset])).details["code"] == "multi-echo"


@pytest.mark.parametrize("name", ["emri_small.dcm", "rtdose.dcm", "JPEG2000_UNC.dcm"])
def test_frames_without_functional_groups_have_no_geometry(name: str) -> None:
    path = get_testdata_file(name)
    assert path
    assert _refused([Path(path)]).details["code"] in ("no-geometry", "too-few-slices")


def test_every_code_is_explained_in_the_reference() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/volumes.md").read_text()
    table = page.split("## Refusals")[1].split("## Corrections")[0]
    explained = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(explained) == sorted(CODES)
