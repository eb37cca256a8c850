"""Every transfer syntax a scanner sends is decoded right or refused by name."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import UID, AllTransferSyntaxes

from caregrid.errors import PixelsUndecodable
from caregrid.runtime import _dcmtk, pixels
from tests.support.data import shared

SYNTAXES = "transfer-syntaxes"
NATIVE = "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1.dcm"
LOSSLESS = (
    "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2.dcm",
    "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99.dcm",
    "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90.dcm",
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80.dcm",
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70.dcm",
    "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57.dcm",
    "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2.dcm",
    "RLELosslessTransferSyntax_1.2.840.10008.1.2.5.dcm",
)
#: file → largest and mean difference allowed, HU. 12-bit JPEG was quantised in steps of 2, 8-bit in steps of 32.
LOSSY = {
    "JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91.dcm": (6, 1),
    "JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81.dcm": (2, 1),
    "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50.dcm": (70, 20),
}
BY_DCMTK = {
    "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm": (40, 5),
    "JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": (40, 5),
    "JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": (40, 5),
}
needs_dcmtk = pytest.mark.skipif(shutil.which("dcmdjpeg") is None, reason="dcmtk is not installed")


def _slice(name: str) -> Dataset:
    return pydicom.dcmread(shared(f"{SYNTAXES}/{name}"))


def _example(name: str) -> Dataset:
    path = get_testdata_file(name)
    assert path, f"{name} comes with pydicom-data"
    return pydicom.dcmread(path)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_syntaxes_give_the_uncompressed_pixels(name: str) -> None:
    reference = pixels.decode(_slice(NATIVE))
    decoded = pixels.decode(_slice(name))
    assert decoded.dtype == reference.dtype
    np.testing.assert_array_equal(decoded, reference)


@pytest.mark.parametrize("name", [*LOSSY, *(pytest.param(name, marks=needs_dcmtk) for name in BY_DCMTK)])
def test_lossy_syntaxes_come_close_in_hounsfield_units(name: str) -> None:
    reference = pixels.modality_values(_slice(NATIVE)).astype(float)
    off = np.abs(pixels.modality_values(_slice(name)) - reference)[reference > -2000]
    largest, mean = {**LOSSY, **BY_DCMTK}[name]
    assert off.max() <= largest
    assert off.mean() <= mean


def test_every_file_of_the_matrix_is_named_above() -> None:
    others = {NATIVE, "TestPattern_Palette.dcm", "US-YBR_FULL_422-EVRLE.dcm", "no-pixel-data.dcm", "no-pixel-spacing.dcm"}
    present = {path.name for path in shared(SYNTAXES).glob("*.dcm")}
    assert present == {*LOSSLESS, *LOSSY, *BY_DCMTK, *others}


@pytest.mark.parametrize("name", BY_DCMTK)
def test_without_dcmtk_its_syntaxes_are_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _slice(name)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PixelsUndecodable, match="dcmdjpeg") as refusal:
        pixels.decode(dataset)
    assert str(dataset.file_meta.TransferSyntaxUID) in str(refusal.value)
    assert refusal.value.details["code"] == "syntax"


@pytest.mark.parametrize("uid", [uid for uid in AllTransferSyntaxes if uid.startswith("1.2.840.10008.1.2.4.10")])
def test_video_is_refused_by_name(uid: UID) -> None:
    dataset = _slice("JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70.dcm")
    dataset.file_meta.TransferSyntaxUID = uid
    with pytest.raises(PixelsUndecodable) as refusal:
        pixels.decode(dataset)
    assert str(uid) in str(refusal.value)
    assert refusal.value.details["code"] == "syntax"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", [NATIVE, *LOSSLESS, *LOSSY, *BY_DCMTK])
def test_cut_off_pixels_are_refused(name: str, share: float) -> None:
    dataset = _slice(name)
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated and share > 0:
        coded = get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([coded[: int(len(coded) * share)]])
    else:
        dataset.PixelData = dataset.PixelData[: int(len(dataset.PixelData) * share)]
    with pytest.raises(PixelsUndecodable) as refusal:
        pixels.decode(dataset)
    assert refusal.value.details["code"] in ("truncated", "broken", "no-pixels")


def test_padding_after_the_end_marker_is_no_damage() -> None:
    dataset = _slice("JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80.dcm")
    expected = pixels.decode(dataset)
    dataset.PixelData = encapsulate([get_frame(dataset.PixelData, 0, number_of_frames=1) + bytes(64)])
    np.testing.assert_array_equal(pixels.decode(dataset), expected)


def test_the_gpl_decoder_is_never_asked() -> None:
    """pylibjpeg takes JPEG and JPEG-LS to pylibjpeg-libjpeg (GPL) when that happens to be installed."""
    asked = {syntax for syntax, plugins in pixels._PLUGINS.items() if "pylibjpeg" in plugins}
    assert all(UID(syntax).name.startswith(("JPEG 2000", "High-Throughput", "RLE")) for syntax in asked)


def test_a_missing_frame_is_refused() -> None:
    dataset = _example("emri_small_jpeg_ls_lossless.dcm")
    frames = [get_frame(dataset.PixelData, number, number_of_frames=10) for number in range(9)]
    dataset.PixelData = encapsulate(frames)
    with pytest.raises(PixelsUndecodable, match="9 of 10"):
        pixels.decode(dataset)


def test_no_pixels_is_said_so() -> None:
    with pytest.raises(PixelsUndecodable, match="no pixel data"):
        pixels.decode(pydicom.dcmread(shared(f"{SYNTAXES}/no-pixel-data.dcm")))


def test_frames_are_numbered_from_one() -> None:
    dataset = _example("emri_small_RLE.dcm")
    every = pixels.decode(dataset)
    assert every.shape == (10, 64, 64)
    for number in range(1, 11):
        np.testing.assert_array_equal(pixels.decode(dataset, number), every[number - 1])
    for number in (0, -1, 11):
        with pytest.raises(PixelsUndecodable, match="numbered 1 to 10"):
            pixels.decode(dataset, number)


@pytest.mark.parametrize(
    "pair",
    [
        ("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"),
        ("OBXXXX1A.dcm", "OBXXXX1A_rle.dcm"),
        ("OBXXXX1A_2frame.dcm", "OBXXXX1A_expb_2frame.dcm"),
        ("gdcm-US-ALOKA-16.dcm", "gdcm-US-ALOKA-16_big.dcm"),
        ("color-px.dcm", "color-pl.dcm"),
        ("US1_UNCR.dcm", "US1_J2KR.dcm"),
        ("SC_rgb_16bit_2frame.dcm", "SC_rgb_rle_16bit_2frame.dcm"),
        ("SC_rgb_expb_16bit.dcm", "SC_rgb_16bit.dcm"),
    ],
)
def test_the_same_colour_picture_in_two_encodings_is_the_same_rgb(pair: tuple[str, str]) -> None:
    first, second = (pixels.decode(_example(name)) for name in pair)
    assert first.shape[-1] == 3
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["SC_rgb_dcmtk_+eb+cy+s4.dcm", "examples_ybr_color.dcm", "SC_ybr_full_422_uncompressed.dcm"])
def test_ybr_becomes_rgb_within_one_step_of_the_exact_formula(name: str) -> None:
    dataset = _example(name)
    exact = dataset.pixel_array.astype(int)
    assert np.abs(pixels.decode(dataset).astype(int) - exact).max() <= 1


def test_palette_colours_are_those_of_the_table() -> None:
    dataset = _slice("TestPattern_Palette.dcm")
    index = np.frombuffer(dataset.PixelData, np.uint8).reshape(dataset.Rows, dataset.Columns)
    red = np.frombuffer(dataset.RedPaletteColorLookupTableData, np.uint8)
    wide = len(red) > 256
    table = red[0::2] | red[1::2] if wide else red
    np.testing.assert_array_equal(pixels.as_uint8(pixels.decode(dataset))[..., 0], table[index])


def test_rescale_gives_int16_where_it_fits_and_float32_where_not() -> None:
    ct = pixels.modality_values(_slice(NATIVE))
    assert ct.dtype == np.int16
    np.testing.assert_array_equal(ct, pixels.decode(_slice(NATIVE)).astype(int) - 1024)
    dataset = _slice(NATIVE)
    dataset.RescaleSlope = "0.5"
    np.testing.assert_allclose(pixels.modality_values(dataset), pixels.decode(dataset) * 0.5 - 1024)
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-40000"
    assert pixels.modality_values(dataset).dtype == np.float32


def test_the_modality_table_is_applied() -> None:
    dataset = _example("mlut_18.dcm")
    table = np.asarray(dataset.ModalityLUTSequence[0].LUTData)
    first = dataset.ModalityLUTSequence[0].LUTDescriptor[1]
    stored = pixels.decode(dataset).astype(int)
    expected = table[np.clip(stored - first, 0, len(table) - 1)]
    np.testing.assert_array_equal(pixels.modality_values(dataset).astype(int), expected)


def test_the_picture_of_a_ct_follows_its_window() -> None:
    dataset = _slice(NATIVE)
    picture = pixels.display_image(dataset, window=(40.0, 400.0))
    values = pixels.modality_values(dataset)
    assert picture.dtype == np.uint8
    assert set(np.unique(picture[values <= -160])) == {0}
    assert set(np.unique(picture[values >= 240])) == {255}
    # PS3.3 C.11.2.1.2.1: y = ((x - (c - 0.5)) / (w - 1) + 0.5) * 255
    np.testing.assert_array_equal(np.unique(picture[values == 40]), [round((0.5 / 399 + 0.5) * 255)])


def test_monochrome1_comes_out_white_on_black() -> None:
    dataset = _example("RG1_UNCR.dcm")
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    inverted = pixels.display_image(dataset)
    dataset.PhotometricInterpretation = "MONOCHROME2"
    assert np.abs(255 - inverted.astype(int) - pixels.display_image(dataset)).max() <= 1


def test_the_voi_table_is_applied() -> None:
    dataset = _example("vlut_04.dcm")
    expected = pydicom.pixels.apply_voi(dataset.pixel_array, dataset).astype(float)
    bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
    np.testing.assert_allclose(pixels.display_image(dataset), expected / (2**bits - 1) * 255, atol=1)


def test_what_dcmtk_is_given_says_nothing_about_the_patient() -> None:
    dataset = _slice("JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm")
    dataset.PatientName = "Canary^Yellow"
    bare = _dcmtk._pixels_only(dataset, dataset.file_meta.TransferSyntaxUID)
    assert "Canary" not in str(bare)
    assert not [element for element in bare if element.tag.group in (0x0010, 0x0020)]


def _every_example() -> list[Path]:
    anchor, tests = get_testdata_file("SC_rgb.dcm"), get_testdata_file("CT_small.dcm")
    folders = {Path(str(anchor)).parent, Path(str(tests)).parent}
    return sorted(path for folder in folders for path in folder.glob("*.dcm"))


@pytest.mark.parametrize("path", _every_example(), ids=lambda path: path.name)
def test_every_file_of_pydicom_is_decoded_or_refused_by_name(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(path, force=True)
        try:
            array = pixels.decode(dataset)
            picture = pixels.display_image(dataset)
        except PixelsUndecodable as refusal:
            said = refusal.details
            array = picture = None
    if array is None or picture is None:
        assert said["transfer_syntax"]
        assert said["reason"]
        return
    assert array.shape[-1 if array.ndim == 2 else -2] in (dataset.Rows, dataset.Columns)
    assert picture.shape[:2] == (dataset.Rows, dataset.Columns)
