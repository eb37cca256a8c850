"""WADO-RS: what is given is what was received, in each transfer syntax; pixels that are asked for decoded are the right ones."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
import sqlalchemy as sa
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRLittleEndian

from caregrid.intake._dicomweb_multipart import boundary_of, read_parts
from tests.support.data import SHARED
from tests.support.dicomweb import STOW_TYPE, DoorSite, body, door_site, serving

DICOM, OCTETS = 'multipart/related; type="application/dicom"', 'multipart/related; type="application/octet-stream"'
EXPLICIT = f"; transfer-syntax={ExplicitVRLittleEndian}"


@pytest.fixture
def site(db: sa.Engine, tmp_path: Path) -> Iterator[DoorSite]:
    with serving(door_site(db, tmp_path / "store")) as served:
        yield served


def test_file(name: str) -> Path:
    found = get_testdata_file(name)
    assert found, f"{name} comes with pydicom or pydicom-data"
    return Path(str(found))


test_file.__test__ = False  # type: ignore[attr-defined]


def put(site: DoorSite, *files: Path) -> str:
    """Send the files; the address of the last one's instance."""
    answer = httpx.post(
        f"{site.url}/studies", content=body([file.read_bytes() for file in files]), headers={"Content-Type": STOW_TYPE}
    )
    assert answer.status_code == 200, answer.text
    header = pydicom.dcmread(files[-1], stop_before_pixels=True)
    return f"{site.url}/studies/{header.StudyInstanceUID}/series/{header.SeriesInstanceUID}/instances/{header.SOPInstanceUID}"


def get(address: str, accept: str = "", **options: str) -> httpx.Response:
    return httpx.get(address, headers={"Accept": accept} if accept else {}, params=options, timeout=60)


def parts(answer: httpx.Response) -> list[tuple[str, bytes]]:
    """(content type, content) of each part of a multipart answer."""
    assert answer.status_code == 200, answer.text
    media, options = boundary_of(answer.headers["content-type"])
    assert media == "multipart/related"

    async def whole() -> AsyncIterator[bytes]:
        yield answer.content

    async def run() -> list[tuple[str, bytes]]:
        found = []
        async for part in read_parts(whole(), options["boundary"], Path("/nonexistent"), 1 << 40):
            found.append((part.headers["content-type"], b"".join(bytes(chunk) for chunk in part.chunks())))
        return found

    return asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "image_dfl.dcm", "JPEG2000.dcm", "MR_small_RLE.dcm",
     "color3d_jpeg_baseline.dcm", "RG1_UNCR.dcm", "liver.dcm"],
)  # fmt: skip
def test_an_object_comes_back_byte_for_byte(site: DoorSite, name: str) -> None:
    address = put(site, test_file(name))
    for accept in ("", DICOM, f'{DICOM}; transfer-syntax="*"'):
        ((kind, content),) = parts(get(address, accept))
        assert content == test_file(name).read_bytes()
        assert kind.startswith("application/dicom; transfer-syntax=1.2.840.10008.1.2")
    single = get(address, "application/dicom; transfer-syntax=*")
    assert single.content == test_file(name).read_bytes()


@pytest.mark.parametrize("name", ["JPEG2000.dcm", "MR_small_RLE.dcm", "image_dfl.dcm", "MR_small_implicit.dcm", "JPEG-LL.dcm"])
def test_an_object_is_rewritten_when_the_client_asks(site: DoorSite, name: str) -> None:
    ((kind, content),) = parts(get(put(site, test_file(name)), DICOM + EXPLICIT))
    given, sent = pydicom.dcmread(io.BytesIO(content)), pydicom.dcmread(test_file(name))
    assert kind == f"application/dicom{EXPLICIT}"
    assert given.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert given.SOPInstanceUID == sent.SOPInstanceUID
    assert np.array_equal(given.pixel_array, sent.pixel_array)


def test_what_cannot_be_given_is_406(site: DoorSite) -> None:
    address = put(site, test_file("MR_small_bigendian.dcm"))
    assert get(address, DICOM + EXPLICIT).status_code == 406
    assert get(address, f"{DICOM}; transfer-syntax=1.2.840.10008.1.2.4.90").status_code == 406
    assert get(address, "application/pdf").status_code == 406
    assert get(address + "/metadata", "image/png").status_code == 406
    assert get(put(site, test_file("JPEG-lossy.dcm")), DICOM + EXPLICIT).status_code == 406


def test_a_study_comes_as_one_body_of_all_its_objects(site: DoorSite) -> None:
    files = sorted(test_file("dicomdirtests/98892001/CT2N/6293").parent.glob("*"))
    address = put(site, *files)
    study = address.partition("/series/")[0]
    assert {content for _, content in parts(get(study, DICOM))} == {file.read_bytes() for file in files}
    assert get(study, "application/dicom").status_code == 406
    assert len(json.loads(get(study + "/metadata").content)) == len(files)


@pytest.mark.parametrize(
    ("name", "media"),
    [
        ("CT_small.dcm", "application/octet-stream"),
        ("MR_small_bigendian.dcm", "application/octet-stream"),
        ("image_dfl.dcm", "application/octet-stream"),
        ("emri_small.dcm", "application/octet-stream"),
        ("liver.dcm", "application/octet-stream"),
        ("JPEG2000.dcm", "image/jp2"),
        ("MR_small_RLE.dcm", "image/dicom-rle"),
        ("examples_ybr_color.dcm", "image/jpeg"),
        ("emri_small_jpeg_ls_lossless.dcm", "image/jls"),
    ],
)
def test_frames_hold_the_pixels_of_the_object(site: DoorSite, name: str, media: str) -> None:
    address, sent = put(site, test_file(name)), pydicom.dcmread(test_file(name))
    count = int(sent.get("NumberOfFrames", 1) or 1)
    stored = parts(get(f"{address}/frames/{count}"))
    assert stored[0][0].startswith(media)
    asked = parts(get(f"{address}/frames/{count},1", OCTETS + EXPLICIT))
    expected = [pydicom.pixels.pixel_array(sent, index=place, raw=True) for place in (count - 1, 0)]
    for (kind, content), array in zip(asked, expected, strict=True):
        assert kind == f"application/octet-stream{EXPLICIT}"
        if sent.BitsAllocated == 1:
            bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
            assert np.array_equal(bits[: array.size].reshape(array.shape), array)
        else:
            assert content == array.astype(array.dtype.newbyteorder("<")).tobytes()
    viewer = parts(get(f"{address}/frames/1", f'{OCTETS}; transfer-syntax="*"'))
    assert viewer[0][0].startswith("application/octet-stream; transfer-syntax=")
    assert viewer[0][1] == parts(get(f"{address}/frames/1"))[0][1]


@pytest.mark.parametrize("frames", ["0", "2", "1,2", "99999999999", "x", "1,,1", "-1"])
def test_frames_that_are_not_there(site: DoorSite, frames: str) -> None:
    assert get(put(site, test_file("CT_small.dcm")) + f"/frames/{frames}").status_code in (400, 404)


def test_metadata_holds_everything_but_bulk_and_bulk_is_where_it_says(site: DoorSite) -> None:
    sent = pydicom.dcmread(test_file("examples_overlay.dcm"))
    (given,) = get(put(site, test_file("examples_overlay.dcm")) + "/metadata").json()
    assert given["00100010"]["Value"][0]["Alphabetic"] == str(sent.PatientName)
    assert given["00280010"] == {"vr": "US", "Value": [sent.Rows]}
    assert set(given["7FE00010"]) == {"vr", "BulkDataURI"}
    overlay = get(given["60003000"]["BulkDataURI"], "application/octet-stream")
    assert overlay.content == sent[0x6000, 0x3000].value
    assert get(given["7FE00010"]["BulkDataURI"], "application/octet-stream").content == sent.PixelData
    assert {f"{element.tag:08X}" for element in sent} <= set(given)


def test_metadata_reads_back_as_the_data_set(site: DoorSite) -> None:
    sent = pydicom.dcmread(test_file("liver.dcm"))
    (given,) = get(put(site, test_file("liver.dcm")) + "/metadata").json()
    given.pop("7FE00010")
    given.pop("00083002")
    back = pydicom.Dataset.from_json(given)
    del sent.PixelData
    assert back.SegmentSequence == sent.SegmentSequence
    assert back.PerFrameFunctionalGroupsSequence == sent.PerFrameFunctionalGroupsSequence


@pytest.mark.parametrize(
    ("name", "shape"),
    [("CT_small.dcm", (128, 128)), ("examples_rgb_color.dcm", (240, 320, 3)), ("color3d_jpeg_baseline.dcm", (480, 640, 3))],
)
def test_pictures_for_people(site: DoorSite, name: str, shape: tuple[int, ...]) -> None:
    address = put(site, test_file(name))
    picture = get(f"{address}/rendered", "image/png")
    assert picture.headers["content-type"] == "image/png"
    array = np.asarray(Image.open(io.BytesIO(picture.content)))
    assert array.shape == shape
    assert array.std() > 5
    small = Image.open(io.BytesIO(get(f"{address}/thumbnail", "image/jpeg").content))
    assert small.format == "JPEG"
    assert max(small.size) <= 200


def test_a_window_changes_the_picture(site: DoorSite) -> None:
    address = put(site, test_file("CT_small.dcm"))
    narrow, wide = (
        np.asarray(Image.open(io.BytesIO(get(f"{address}/rendered", window=window).content))).astype(int)
        for window in ("40,10,linear", "40,4000,linear")
    )
    assert narrow.std() > wide.std() * 2
    tiny = Image.open(io.BytesIO(get(f"{address}/frames/1/rendered", viewport="32,64").content))
    assert tiny.size == (32, 32)
    for broken in ({"window": "a,b"}, {"window": "1"}, {"window": "1,nan"}, {"viewport": "0,0"}, {"viewport": "-5,5"}):
        assert get(f"{address}/rendered", **broken).status_code == 400


def test_an_object_without_an_image_has_no_picture(site: DoorSite) -> None:
    address = put(site, test_file("reportsi.dcm"))
    assert [get(address + end).status_code for end in ("/rendered", "/thumbnail", "/frames/1", "/bulkdata/7FE00010")] == [404] * 4


def test_what_is_not_here_is_404(site: DoorSite) -> None:
    for end in ("studies/1.2", "studies/1.2/metadata", "studies/1.2/series/3", "studies/1.2/series/3/instances/4/frames/1"):
        assert get(f"{site.url}/{end}").status_code == 404


@pytest.mark.parametrize("file", sorted((SHARED / "transfer-syntaxes").glob("*_1.2.840.*.dcm")), ids=lambda file: file.stem)
def test_one_slice_in_each_transfer_syntax(site: DoorSite, file: Path) -> None:
    address = put(site, file)
    assert parts(get(address, DICOM))[0][1] == file.read_bytes()
    ((kind, content),) = parts(get(f"{address}/frames/1", f'{OCTETS}; transfer-syntax="*"'))
    assert kind.startswith("application/octet-stream; transfer-syntax=")
    assert content
    decoded = get(f"{address}/frames/1", OCTETS + EXPLICIT)
    picture = get(f"{address}/rendered", "image/png")
    assert {decoded.status_code, picture.status_code} <= {200, 406}
    assert picture.status_code == 200 or "cannot be decoded" in picture.text
