"""The DICOMweb door as a real server: dicomweb-client stores, searches, retrieves; every real file is kept or refused by name."""

from __future__ import annotations

import io
import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import data_store
import httpx
import pydicom
import pytest
import sqlalchemy as sa
from dicomweb_client.api import DICOMwebClient
from fastapi import Request
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from caregrid.domain.settings import WebSettings
from caregrid.domain.study import Incoming, Receipt
from caregrid.errors import SignInNeeded, StoreFull
from caregrid.store.database import create_all, open_engine, writing
from caregrid.store.instances import InstanceStore
from caregrid.store.tables import instance, quarantine, rejection, result
from tests.support.data import shared
from tests.support.dicomweb import BOUNDARY, STOW_TYPE, DoorSite, body, door_site, serving

pytestmark = pytest.mark.network

CT = Path(str(get_testdata_file("CT_small.dcm")))
MR = Path(str(get_testdata_file("MR_small.dcm")))

FAILURE, FAILED, KEPT, WARNING = "00081197", "00081198", "00081199", "00081196"


@pytest.fixture
def site(db: sa.Engine, tmp_path: Path) -> Iterator[DoorSite]:
    with serving(door_site(db, tmp_path / "store")) as served:
        yield served


def stow(site: DoorSite, *parts: bytes, study: str = "", content_type: str = STOW_TYPE, accept: str = "") -> httpx.Response:
    headers = {"Content-Type": content_type} | ({"Accept": accept} if accept else {})
    where = f"{site.url}/studies" + (f"/{study}" if study else "")
    return httpx.post(where, content=body(parts), headers=headers, timeout=60)


def altered(file: Path, **values: Any) -> bytes:
    """The file with elements changed."""
    dataset = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    changed = io.BytesIO()
    dataset.save_as(changed)
    return changed.getvalue()


# a real client ------------------------------------------------------------------------------------------------------


def test_dicomweb_client_stores_searches_and_retrieves(site: DoorSite) -> None:
    client = DICOMwebClient(site.url)
    sent = [pydicom.dcmread(file) for file in sorted(shared("ct-liver-seg").glob("0*.dcm"))]
    for each in sent:
        # The client writes the data sets anew, without these retired elements.
        for tag in [tag for tag in each.keys() if tag.element == 0]:  # noqa: SIM118 - a data set iterates over elements
            del each[tag]
    answer = client.store_instances(sent)
    assert len(answer.ReferencedSOPSequence) == len(sent) == 3
    study, series = sent[0].StudyInstanceUID, sent[0].SeriesInstanceUID

    (found,) = client.search_for_studies(search_filters={"PatientID": sent[0].PatientID, "StudyDate": "20000101-20101231"})
    assert pydicom.Dataset.from_json(found).NumberOfStudyRelatedInstances == 3
    assert len(client.search_for_series(study, fields=["SeriesDescription"])) == 1
    assert len(client.search_for_instances(study, series, limit=2)) == 2
    assert client.search_for_studies(search_filters={"PatientID": "nobody"}) == []

    back = {each.SOPInstanceUID: each for each in client.retrieve_study(study)}
    assert {uid: each.to_json() for uid, each in back.items()} == {each.SOPInstanceUID: each.to_json() for each in sent}
    one = client.retrieve_instance(study, series, sent[1].SOPInstanceUID, media_types=(("application/dicom", "*"),))
    assert one.PixelData == sent[1].PixelData
    (frame,) = client.retrieve_instance_frames(study, series, sent[1].SOPInstanceUID, [1])
    assert frame == sent[1].PixelData
    metadata = [pydicom.Dataset.from_json(each, lambda *_: b"") for each in client.retrieve_series_metadata(study, series)]
    assert {each.SOPInstanceUID for each in metadata} == set(back)
    picture = client.retrieve_instance_rendered(study, series, sent[1].SOPInstanceUID, media_types=("image/png",))
    assert picture.startswith(b"\x89PNG")


def test_results_of_ours_are_seen_until_they_are_withdrawn(site: DoorSite) -> None:
    files = sorted(shared("ct-liver-seg").glob("0*.dcm"))
    assert stow(site, *(file.read_bytes() for file in files)).status_code == 200
    made = shared("ct-liver-seg/liver.dcm")
    header = pydicom.dcmread(made, stop_before_pixels=True)
    study, path = str(header.StudyInstanceUID), site.store.path("results/liver.dcm")
    path.write_bytes(made.read_bytes())
    with writing(site.engine) as connection:
        connection.execute(
            result.insert().values(
                sop_instance_uid=str(header.SOPInstanceUID), run_id="r", task_id="t", study_instance_uid=study,
                series_instance_uid=str(header.SeriesInstanceUID), sop_class_uid=str(header.SOPClassUID), kind="dicom_seg",
                transfer_syntax_uid=str(header.file_meta.TransferSyntaxUID), path="results/liver.dcm", sha256="0", size=1,
                state="valid", validation={}, created_at="2024",
            )
        )  # fmt: skip
    client = DICOMwebClient(site.url)
    by_modality = {each["00080060"]["Value"][0]: each for each in client.search_for_series(study)}
    assert by_modality["SEG"]["0008103E"]["Value"] == [header.SeriesDescription]
    assert by_modality["SEG"]["00200011"]["Value"] == [header.SeriesNumber]
    assert {each.SOPInstanceUID for each in client.retrieve_study(study)} >= {header.SOPInstanceUID}
    (seg,) = client.search_for_instances(study, header.SeriesInstanceUID)
    assert seg["00280008"]["Value"] == [header.NumberOfFrames]

    with writing(site.engine) as connection:
        connection.execute(result.update().values(state="withdrawn"))
    assert [each["00080060"]["Value"] for each in client.search_for_series(study)] == [["CT"]]
    assert len(client.retrieve_study(study)) == 3
    gone = f"{site.url}/studies/{study}/series/{header.SeriesInstanceUID}/instances/{header.SOPInstanceUID}"
    assert httpx.get(gone).status_code == 404


# answers of STOW-RS -------------------------------------------------------------------------------------------------


def test_all_kept_is_200_and_again_is_200_and_kept_once(site: DoorSite) -> None:
    for _ in range(2):
        answer = stow(site, CT.read_bytes(), MR.read_bytes())
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/dicom+json"
        assert len(answer.json()[KEPT]["Value"]) == 2
        assert FAILED not in answer.json()
    assert len(site.rows(instance)) == 2


def test_some_kept_is_202_and_each_failure_has_its_reason(site: DoorSite) -> None:
    answer = stow(site, CT.read_bytes(), b"rubbish", MR.read_bytes())
    assert answer.status_code == 202
    assert len(answer.json()[KEPT]["Value"]) == 2
    (failed,) = answer.json()[FAILED]["Value"]
    assert failed[FAILURE] == {"vr": "US", "Value": [0xC000]}
    assert len(site.rows(quarantine)) == 1


def test_none_kept_is_409(site: DoorSite) -> None:
    assert stow(site, b"rubbish", b"").status_code == 409


def test_the_same_uid_with_other_bytes_is_kept_with_a_warning(site: DoorSite) -> None:
    stow(site, CT.read_bytes())
    answer = stow(site, altered(CT, PatientComments="changed"))
    assert answer.status_code == 202
    assert answer.json()[KEPT]["Value"][0][WARNING]["Value"] == [0xB000]
    assert [row["copy"] for row in site.rows(instance)] == [0, 1]


def test_an_object_of_another_study_fails(site: DoorSite) -> None:
    study = str(pydicom.dcmread(CT).StudyInstanceUID)
    answer = stow(site, CT.read_bytes(), MR.read_bytes(), study=study)
    assert answer.status_code == 202
    (failed,) = answer.json()[FAILED]["Value"]
    assert failed[FAILURE]["Value"] == [0xA900]
    assert failed["00081155"]["Value"] == [str(pydicom.dcmread(MR).SOPInstanceUID)]
    assert len(site.rows(instance)) == 1


def test_a_full_store_is_503_with_when_to_come_back(db: sa.Engine, tmp_path: Path) -> None:
    def receive(_incoming: Incoming) -> Receipt:
        raise StoreFull

    with serving(door_site(db, tmp_path / "store", receive=receive)) as site:
        answer = stow(site, CT.read_bytes())
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()[FAILED]["Value"][0][FAILURE]["Value"] == [0xA700]


def test_a_disk_that_fails_once_costs_one_object(db: sa.Engine, tmp_path: Path) -> None:
    store = InstanceStore(db, tmp_path / "store", free_bytes_floor=1 << 20)
    calls: list[int] = []

    def receive(incoming: Incoming) -> Receipt:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        return store.receive(incoming)

    with serving(door_site(db, tmp_path / "store", receive=receive)) as site:
        answer = stow(site, CT.read_bytes(), MR.read_bytes())
        assert answer.status_code == 202
        assert answer.json()[FAILED]["Value"][0][FAILURE]["Value"] == [0x0110]


def test_a_part_above_the_cap_is_413_and_smaller_ones_are_kept(db: sa.Engine, tmp_path: Path) -> None:
    with serving(door_site(db, tmp_path / "store", WebSettings(max_part_bytes=20_000))) as site:
        assert stow(site, CT.read_bytes()).status_code == 413
        assert stow(site, CT.read_bytes(), MR.read_bytes()).status_code == 202
        assert len(site.rows(instance)) == 1


def test_an_object_larger_than_memory_holds_goes_through(site: DoorSite) -> None:
    big = altered(CT, NumberOfFrames=600, PixelData=bytes(128 * 128 * 2 * 600))
    assert stow(site, big).status_code == 200
    (row,) = site.rows(instance)
    assert site.store.path(row["path"]).read_bytes() == big
    assert not list((site.store.folder / "tmp").iterdir())


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 415),
        ("", 415),
        ('multipart/related; type="application/dicom+json"; boundary=x', 415),
        ('multipart/related; type="application/dicom"', 400),
        ("multipart/related; boundary=another", 400),
        (f"multipart/related; boundary={'b' * 300}", 400),
        (f"multipart/related; boundary={BOUNDARY}", 200),
        (f'Multipart/Related; Boundary="{BOUNDARY}"; Type="Application/DICOM"', 200),
    ],
)
def test_content_types(site: DoorSite, content_type: str, status: int) -> None:
    answer = stow(site, CT.read_bytes(), content_type=content_type)
    assert answer.status_code == status
    assert len(site.rows(instance)) == (status == 200)
    assert len(site.rows(rejection)) == (status != 200)


def test_an_object_alone_without_multipart_is_taken(site: DoorSite) -> None:
    answer = httpx.post(f"{site.url}/studies", content=CT.read_bytes(), headers={"Content-Type": "application/dicom"})
    assert answer.status_code == 200
    assert site.rows(instance)[0]["protocol"] == "dicomweb"


def test_the_answer_can_be_xml(site: DoorSite) -> None:
    answer = stow(site, CT.read_bytes(), b"rubbish", accept="application/dicom+xml")
    assert answer.headers["content-type"] == "application/dicom+xml"
    root = ElementTree.fromstring(answer.content)
    assert (
        root.find('DicomAttribute[@keyword="FailedSOPSequence"]/Item/DicomAttribute[@keyword="FailureReason"]/Value').text
        == "49152"
    )  # type: ignore[union-attr]
    kept = root.find('DicomAttribute[@tag="00081199"]/Item/DicomAttribute[@keyword="ReferencedSOPInstanceUID"]/Value')
    assert kept is not None
    assert kept.text == str(pydicom.dcmread(CT).SOPInstanceUID)
    assert stow(site, CT.read_bytes(), accept="text/html").status_code == 406


def test_a_client_that_goes_away_leaves_whole_objects_and_nothing_else(site: DoorSite) -> None:
    host, port = site.url.removeprefix("http://").split("/")[0].split(":")
    whole = body([MR.read_bytes(), CT.read_bytes()])
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /dicom-web/studies HTTP/1.1\r\nHost: x\r\nContent-Type: {STOW_TYPE}\r\nContent-Length: {len(whole)}\r\n\r\n"
        connection.sendall(head.encode() + whole[:-20_000])
    assert stow(site, CT.read_bytes()).status_code == 200, "the door goes on"
    kept = {site.store.path(row["path"]).read_bytes() for row in site.rows(instance)}
    assert kept <= {MR.read_bytes(), CT.read_bytes()}
    assert not site.rows(quarantine)


def test_who_may_not_is_turned_away_and_noted(db: sa.Engine, tmp_path: Path) -> None:
    def authorise(request: Request) -> object:
        if request.headers.get("authorization") != "Bearer right":
            raise SignInNeeded
        return object()

    made = door_site(db, tmp_path / "store", authorise=authorise)
    made.app.add_exception_handler(SignInNeeded, lambda _request, _error: JSONResponse({}, 401))
    with serving(made) as site:
        assert stow(site, CT.read_bytes()).status_code == 401
        assert httpx.get(f"{site.url}/studies").status_code == 401
        (noted,) = site.rows(rejection)
        assert (noted["protocol"], noted["what"], noted["address"]) == ("dicomweb", "STOW-RS", "127.0.0.1")
        assert not site.rows(instance)
        assert httpx.get(f"{site.url}/studies", headers={"Authorization": "Bearer right"}).status_code == 200


# all real files -----------------------------------------------------------------------------------------------------


def real_files() -> list[Path]:
    """Every file of pydicom's and pydicom-data's test sets, DICOM or not."""
    roots = [Path(pydicom.__file__).parent / "data", Path(data_store.__file__).parent]
    return [file for root in roots for file in sorted(root.rglob("*")) if file.is_file() and file.suffix not in (".py", ".pyc")]


@pytest.mark.slow
def test_every_real_file_is_kept_byte_for_byte_or_refused_by_name(site: DoorSite) -> None:
    statuses: Counter[int] = Counter()
    sent: dict[str, set[bytes]] = {}
    with httpx.Client(timeout=60) as client:
        for file in real_files():
            content = file.read_bytes()
            answer = client.post(f"{site.url}/studies", content=body([content]), headers={"Content-Type": STOW_TYPE})
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 202, 409), file.name
            if answer.status_code == 409:
                (failed,) = answer.json()[FAILED]["Value"]
                assert failed[FAILURE]["Value"][0] in (0xC000, 0xA900), file.name
            else:
                (kept,) = answer.json()[KEPT]["Value"]
                sent.setdefault(kept["00081155"]["Value"][0], set()).add(content)
        rows = site.rows(instance)
        assert {row["sop_instance_uid"] for row in rows} == set(sent)
        for row in rows:
            assert site.store.path(row["path"]).read_bytes() in sent[row["sop_instance_uid"]]
        _everything_can_be_asked_for(client, site, [row for row in rows if row["copy"] == 0])
    assert statuses[200] > 150
    assert len(site.rows(quarantine)) > 20


def _everything_can_be_asked_for(client: httpx.Client, site: DoorSite, rows: list[dict[str, Any]]) -> None:
    """Metadata and whole objects always; frames and pictures are given or refused, never a server error."""
    for row in rows:
        where = f"{site.url}/studies/{row['study_instance_uid']}/series/{row['series_instance_uid']}"
        where += f"/instances/{row['sop_instance_uid']}"
        (metadata,) = client.get(f"{where}/metadata").json()
        assert metadata["00080018"]["Value"] == [row["sop_instance_uid"]]
        assert client.get(where).status_code == 200
        decoded = {"Accept": 'multipart/related; type="application/octet-stream"; transfer-syntax=1.2.840.10008.1.2.1'}
        for end, headers in (("/frames/1", {}), ("/frames/1", decoded), ("/thumbnail", {}), ("/bulkdata/7FE00010", {})):
            assert client.get(where + end, headers=headers).status_code in (200, 404, 406), (end, row["path"])


# any bytes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorSite]:
    """One site for all examples."""
    folder = tmp_path_factory.mktemp("fuzz")
    engine = open_engine(f"sqlite:///{folder}/site.db")
    create_all(engine)
    with serving(door_site(engine, folder / "store")) as served:
        yield served
    engine.dispose()


HEADERS = st.lists(
    st.sampled_from(
        [
            "Content-Type: application/dicom\r\n",
            "Content-Type: text/html\r\n",
            "X\r\n",
            ": \r\n",
            "A: " + "b" * 5000 + "\r\n",
            "\x00: 1\r\n",
        ]
    ),
    max_size=3,
).map("".join)
PARTS = st.lists(
    st.sampled_from([CT.read_bytes()[:3000], CT.read_bytes(), MR.read_bytes(), b"", b"DICM", b"\0" * 128 + b"DICM"]), max_size=4
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=PARTS,
    headers=HEADERS,
    keep=st.integers(0, 100),
    flip=st.lists(st.integers(0, 1 << 20), max_size=4),
    pieces=st.integers(1, 9),
)
def test_no_body_makes_a_server_error(
    kept_site: DoorSite, parts: list[bytes], headers: str, keep: int, flip: list[int], pieces: int
) -> None:
    whole = bytearray(body(parts, headers=headers))
    for place in flip:
        whole[place % len(whole)] ^= 0x55
    cut = bytes(whole[: len(whole) * keep // 100]) if keep < 90 else bytes(whole)
    size = max(1, len(cut) // pieces)
    chunks = (cut[first : first + size] for first in range(0, len(cut), size))
    answer = httpx.post(f"{kept_site.url}/studies", content=chunks, headers={"Content-Type": STOW_TYPE}, timeout=60)
    assert answer.status_code in (200, 202, 400, 409), answer.text
    json.loads(answer.content)
    assert httpx.get(f"{kept_site.url}/studies").status_code == 200


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content_type=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80))
def test_no_content_type_makes_a_server_error(kept_site: DoorSite, content_type: str) -> None:
    answer = httpx.post(
        f"{kept_site.url}/studies", content=b"--x\r\n\r\n\r\n--x--", headers={"Content-Type": content_type.strip()}
    )
    assert answer.status_code in (400, 409, 415)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(
        [
            "PatientID",
            "StudyDate",
            "StudyTime",
            "ModalitiesInStudy",
            "StudyInstanceUID",
            "limit",
            "offset",
            "includefield",
            "00081030",
        ]
    ),
    value=st.text(max_size=30),
    level=st.sampled_from(["studies", "series", "instances"]),
    accept=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
)
def test_no_search_makes_a_server_error(kept_site: DoorSite, name: str, value: str, level: str, accept: str) -> None:
    answer = httpx.get(f"{kept_site.url}/{level}", params={name: value}, headers={"Accept": accept.strip()})
    assert answer.status_code in (200, 400), answer.text
