"""OHIF as we ship it, in real Chromium, on our DICOMweb: it draws a CT, puts the segmentation over it, calls nobody else."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import httpx
import numpy as np
import pydicom
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from pydicom.data import get_testdata_file
from pydicom.sr.codedict import codes

from caregrid.web import viewer
from tests.support.browser import ARGUMENTS, CHROMIUM
from tests.support.data import SHARED
from tests.support.dicomweb import STOW_TYPE, DoorSite, body, door_site, serving

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed"),
]

#: WebGL without a graphics card.
SOFTWARE_GL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]


@pytest.fixture
def site(db: sa.Engine, tmp_path: Path) -> Iterator[DoorSite]:
    with serving(door_site(db, tmp_path / "store")) as served:
        yield served


class Watched:
    """A page and what it asked for. off_origin: addresses on other hosts; failed: answers of 400 and above, and script errors."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.off_origin: list[str] = []
        self.failed: list[str] = []
        page.on("request", lambda request: self._asked(request.url, origin))
        page.on("response", lambda answer: self.failed.append(answer.url) if answer.status >= 400 else None)
        page.on("pageerror", lambda error: self.failed.append(str(error)))

    def _asked(self, url: str, origin: str) -> None:
        if not url.startswith((f"{origin}/", "data:", f"blob:{origin}/")):
            self.off_origin.append(url)

    def picture(self) -> NDArray[np.int16]:
        """The image area as the clinician sees it, (rows, columns, 3)."""
        shot = self.page.locator(".cornerstone-canvas").first.screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).astype(np.int16)


@pytest.fixture
def watched(site: DoorSite) -> Iterator[Watched]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=[*ARGUMENTS, *SOFTWARE_GL])
        yield Watched(browser.new_page(viewport={"width": 1400, "height": 900}), site.url.removesuffix("/dicom-web"))
        browser.close()


def ct_and_segmentation() -> tuple[list[bytes], pydicom.Dataset]:
    """Real CT slices with a segmentation of them, last; without the shared data one slice and a square."""
    folder = SHARED / "ct-liver-seg"
    if folder.exists():
        files = [*sorted(folder.glob("0*.dcm")), folder / "liver.dcm"]
        return [file.read_bytes() for file in files], pydicom.dcmread(files[-1])
    slice_file = Path(str(get_testdata_file("CT_small.dcm")))
    made = square_segmentation(pydicom.dcmread(slice_file))
    written = io.BytesIO()
    made.save_as(written)
    return [slice_file.read_bytes(), written.getvalue()], made


def square_segmentation(image: pydicom.Dataset) -> pydicom.Dataset:
    """A segmentation of the middle of an image."""
    mask = np.zeros((1, image.Rows, image.Columns), bool)
    mask[:, image.Rows // 4 : image.Rows * 3 // 4, image.Columns // 4 : image.Columns * 3 // 4] = True
    algorithm = hd.AlgorithmIdentificationSequence("square", codes.DCM.ArtificialIntelligence, "1")
    segment = hd.seg.SegmentDescription(
        1, "Square", codes.SCT.Organ, codes.SCT.Liver, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, algorithm
    )
    return hd.seg.Segmentation(
        [image], mask, hd.seg.SegmentationTypeValues.BINARY, [segment], hd.UID(), 99, hd.UID(), 1, "caregrid", "test", "1", "1"
    )


def store(site: DoorSite, objects: list[bytes]) -> None:
    answer = httpx.post(f"{site.url}/studies", content=body(objects), headers={"Content-Type": STOW_TYPE}, timeout=60)
    assert answer.status_code == 200, answer.text


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    """The first value that counts as true; the last one after ``seconds``."""
    end = time.monotonic() + seconds
    value = true()
    while not value and time.monotonic() < end:
        time.sleep(0.5)
        value = true()
    return value


def coloured(picture: NDArray[np.int16]) -> float:
    """The part of the picture that is not grey."""
    return float((np.ptp(picture, axis=2) > 25).mean())


def middle(picture: NDArray[np.int16]) -> NDArray[np.int16]:
    """The inner half of the picture, where no text is written."""
    rows, columns = picture.shape[:2]
    return picture[rows // 4 : rows * 3 // 4, columns // 4 : columns * 3 // 4]


def test_a_ct_is_drawn_with_its_segmentation_and_nobody_else_is_called(site: DoorSite, watched: Watched, tmp_path: Path) -> None:
    objects, segmentation = ct_and_segmentation()
    store(site, objects)
    study, origin = str(segmentation.StudyInstanceUID), site.url.removesuffix("/dicom-web")

    watched.page.goto(origin + viewer.address(study))
    watched.page.wait_for_selector(".cornerstone-canvas", timeout=60_000)
    watched.page.get_by_text("Confirm and hide").click()
    assert until(lambda: watched.picture().std() > 30), "the CT is drawn"
    plain = watched.picture()
    assert coloured(plain) < 0.02

    watched.page.goto(origin + viewer.address(study, str(segmentation.SeriesInstanceUID)))
    watched.page.wait_for_selector(".cornerstone-canvas", timeout=60_000)
    assert until(lambda: coloured(watched.picture()) > 0.05), "the segmentation lies over it"
    assert watched.picture().std() > 30

    watched.page.get_by_test_id("panelSegmentation-btn").or_(
        watched.page.locator("[data-cy='panelSegmentation-btn'], [data-cy='panelSegmentationWithToolsLabelMap-btn']")
    ).first.click()
    label = str(segmentation.SegmentSequence[0].SegmentLabel)
    watched.page.get_by_text(label, exact=True).first.wait_for(timeout=20_000)
    watched.page.screenshot(path=tmp_path / "viewer.png")
    assert watched.off_origin == []
    assert watched.failed == []


@pytest.mark.parametrize(
    "name",
    [
        "color3d_jpeg_baseline.dcm",
        "JPEG2000.dcm",
        "MR_small_RLE.dcm",
        "emri_small_jpeg_ls_lossless.dcm",
        "examples_palette.dcm",
    ],
)
def test_what_scanners_send_is_drawn(site: DoorSite, watched: Watched, tmp_path: Path, name: str) -> None:
    file = Path(str(get_testdata_file(name)))
    store(site, [file.read_bytes()])
    study = str(pydicom.dcmread(file, stop_before_pixels=True).StudyInstanceUID)
    watched.page.goto(site.url.removesuffix("/dicom-web") + viewer.address(study))
    watched.page.wait_for_selector(".cornerstone-canvas", timeout=60_000)
    watched.page.get_by_text("Confirm and hide").click()
    assert until(lambda: middle(watched.picture()).std() > 10, 120), "the image is drawn"
    watched.page.screenshot(path=tmp_path / "viewer.png")
    assert watched.off_origin == []
    assert watched.failed == []


def test_a_study_is_found_in_the_viewers_list(site: DoorSite, watched: Watched) -> None:
    store(site, [Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()])
    watched.page.goto(site.url.removesuffix("/dicom-web") + "/viewer/")
    watched.page.get_by_text("CompressedSamples").first.wait_for(timeout=60_000)
    assert watched.off_origin == []
    assert watched.failed == []


def test_files_are_served_whole_with_their_policy(site: DoorSite) -> None:
    origin = site.url.removesuffix("/dicom-web")
    page = httpx.get(f"{origin}/viewer/viewer?StudyInstanceUIDs=1.2")
    assert page.headers["content-security-policy"] == viewer.CONTENT_SECURITY_POLICY
    assert page.headers["cross-origin-embedder-policy"] == "require-corp"
    assert "<script>" not in page.text
    bundle = next(part.split('"')[0] for part in page.text.split('src="')[1:] if "app.bundle" in part)
    packed = httpx.get(origin + bundle)
    plain = httpx.get(origin + bundle, headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content
    assert "immutable" in packed.headers["cache-control"]
    assert httpx.get(f"{origin}/viewer/LICENSE").text.startswith("The MIT License")
    for missing in ("nothing.js", "../__init__.py", "%2e%2e/__init__.py", "ort/x.wasm"):
        assert httpx.get(f"{origin}/viewer/{missing}").status_code == 404
    assert httpx.get(f"{origin}/viewer/app-config.js").text.count("/dicom-web") == 3
