"""QIDO-RS matching (PS3.4 C.2.2.2) on both databases, judged by an oracle that knows no SQL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from caregrid.errors import QueryInvalid
from caregrid.intake import _dicomweb_query as qido
from caregrid.store.database import create_all, open_engine, reading, writing
from caregrid.store.tables import instance, result, series
from tests.support.postgres import new_database
from tests.support.rows import put_run, put_study

SOURCE = {"protocol": "dimse", "calling_ae": "CT1", "called_ae": "CAREGRID", "address": "127.0.0.1"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """An engine with three studies and a result of ours, on each database."""
    folder = tmp_path_factory.mktemp("query")
    if request.param == "sqlite":
        yield from _filled(f"sqlite:///{folder}/site.db")
    else:
        yield from _filled(new_database(request.getfixturevalue("postgres_server")))


def _filled(url: str) -> Iterator[sa.Engine]:
    engine = open_engine(url)
    create_all(engine)
    put_study(
        engine, "1.1", patient_name="Ärla^Eva=山田", patient_id="ID_1", study_date="20240115", study_time="101500.5",
        accession_number="A%1", modalities="CT\\SR", study_description="Head [thin]", number_of_series=2, number_of_instances=3,
    )  # fmt: skip
    put_study(
        engine, "1.2", patient_name="Berg^Jan", patient_id="id_1", study_date="20240320", study_time="1200",
        accession_number="B2", modalities="MR", number_of_series=1, number_of_instances=1,
    )  # fmt: skip
    put_study(engine, "1.3", modalities="", number_of_series=0, number_of_instances=0)
    _put_series(engine, "1.1", "1.1.1", "CT", 2, ["1.1.1.1", "1.1.1.2"], "Axial")
    _put_series(engine, "1.1", "1.1.2", "SR", 5, ["1.1.2.1"], "Report")
    _put_series(engine, "1.2", "1.2.1", "MR", 1, ["1.2.1.1"], "T1")
    run = put_run(engine, "1.1", "lungs")
    for uid, state, kind in (
        ("1.1.9.1", "valid", "dicom_seg"),
        ("1.1.8.1", "withdrawn", "dicom_sc"),
        ("1.1.7.1", "invalid", "dicom_sr"),
    ):
        _put_made(engine, run, uid, state, kind)
    yield engine
    engine.dispose()


def _put_series(engine: sa.Engine, study_uid: str, uid: str, modality: str, number: int, objects: list[str], text: str) -> None:
    with writing(engine) as connection:
        connection.execute(
            series.insert().values(
                series_instance_uid=uid, study_instance_uid=study_uid, modality=modality, series_number=number,
                series_description=text, number_of_instances=len(objects), first_received_at="2024",
            )
        )  # fmt: skip
        for place, each in enumerate(objects):
            # A second copy with other bytes is kept, but not shown.
            for copy in (0, 1) if place == 0 else (0,):
                connection.execute(
                    instance.insert().values(
                        sop_instance_uid=each, copy=copy, study_instance_uid=study_uid, series_instance_uid=uid,
                        sop_class_uid="1.2.3", transfer_syntax_uid="1.2.840.10008.1.2.1", instance_number=place + 1, sha256="0",
                        size=1, path=f"{each}-{copy}", received_at="2024", **SOURCE,
                    )
                )  # fmt: skip


def _put_made(engine: sa.Engine, run: str, uid: str, state: str, kind: str) -> None:
    with writing(engine) as connection:
        connection.execute(
            result.insert().values(
                sop_instance_uid=uid, run_id=run, task_id="t", study_instance_uid="1.1", sop_class_uid="1.2.4",
                series_instance_uid=uid.rpartition(".")[0], transfer_syntax_uid="1.2.840.10008.1.2.1", kind=kind,
                path=f"results/{uid}", sha256="0", size=1, state=state, validation={}, created_at="2024",
            )
        )  # fmt: skip


def ask(engine: sa.Engine, level: str, *parameters: tuple[str, str], study: str = "", series: str = "") -> list[dict[str, Any]]:
    """The rows that match."""
    with reading(engine) as connection:
        return qido.search(connection, qido.parse(level, parameters, study, series))


def studies(engine: sa.Engine, *parameters: tuple[str, str]) -> list[str]:
    """UIDs of the matching studies, sorted."""
    return sorted(row["StudyInstanceUID"] for row in ask(engine, "study", *parameters))


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (("PatientID", "ID_1"), ["1.1"]),
        (("00100020", "id_1"), ["1.2"]),
        (("PatientID", "id*"), ["1.2"]),
        (("PatientID", "??_1"), ["1.1", "1.2"]),
        (("PatientID", "ID?1?"), []),
        (("PatientID", ""), ["1.1", "1.2", "1.3"]),
        (("PatientID", "*"), ["1.1", "1.2", "1.3"]),
        (("PatientName", "berg^jan"), ["1.2"]),
        (("PatientName", "BERG*"), ["1.2"]),
        (("AccessionNumber", "A%1"), ["1.1"]),
        (("AccessionNumber", "%*"), []),
        (("StudyDescription", "Head [[]thin]"), []),
        (("StudyDescription", "Head [thin*"), ["1.1"]),
        (("StudyDate", "20240115"), ["1.1"]),
        (("StudyDate", "20240101-20240201"), ["1.1"]),
        (("StudyDate", "20240115-"), ["1.1", "1.2"]),
        (("StudyDate", "-20240115"), ["1.1"]),
        (("StudyTime", "1015-1200"), ["1.1", "1.2"]),
        (("StudyTime", "-1015"), ["1.1"]),
        (("ModalitiesInStudy", "CT"), ["1.1"]),
        (("ModalitiesInStudy", "SR,MR"), ["1.1", "1.2"]),
        (("ModalitiesInStudy", "SEG"), ["1.1"]),
        (("ModalitiesInStudy", "OT"), []),
        (("ModalitiesInStudy", "C"), []),
        (("StudyInstanceUID", "1.1,1.3"), ["1.1", "1.3"]),
        (("0020000D", "1.1\\1.2"), ["1.1", "1.2"]),
    ],
)
def test_studies_match(engine: sa.Engine, parameter: tuple[str, str], expected: list[str]) -> None:
    assert studies(engine, parameter) == expected


def test_counts_and_modalities_take_in_valid_results_only(engine: sa.Engine) -> None:
    query = qido.parse("study", [("StudyInstanceUID", "1.1")])
    with reading(engine) as connection:
        (row,) = qido.search(connection, query)
    shown = qido.as_json(query, row, "http://here/dicom-web")
    assert shown["00080061"] == {"vr": "CS", "Value": ["CT", "SEG", "SR"]}
    assert (shown["00201206"]["Value"], shown["00201208"]["Value"]) == ([3], [4])
    assert shown["00081190"]["Value"] == ["http://here/dicom-web/studies/1.1"]
    assert shown["00100010"]["Value"] == [{"Alphabetic": "Ärla^Eva", "Ideographic": "山田"}]
    assert shown["00080090"] == {"vr": "PN"}


def test_series_of_a_study_with_the_result_of_ours(engine: sa.Engine) -> None:
    rows = ask(engine, "series", study="1.1")
    assert {(row["SeriesInstanceUID"], row["Modality"], row["NumberOfSeriesRelatedInstances"]) for row in rows} == {
        ("1.1.1", "CT", 2),
        ("1.1.2", "SR", 1),
        ("1.1.9", "SEG", 1),
    }
    assert [row["SeriesInstanceUID"] for row in ask(engine, "series", ("Modality", "SEG"))] == ["1.1.9"]
    assert [row["SeriesInstanceUID"] for row in ask(engine, "series", ("SeriesNumber", "2"), study="1.1")] == ["1.1.1"]
    assert [row["SeriesInstanceUID"] for row in ask(engine, "series", ("PatientID", "id_1"))] == ["1.2.1"]


def test_instances_are_first_copies_and_valid_results(engine: sa.Engine) -> None:
    assert sorted(row["SOPInstanceUID"] for row in ask(engine, "instance", study="1.1")) == [
        "1.1.1.1",
        "1.1.1.2",
        "1.1.2.1",
        "1.1.9.1",
    ]
    rows = ask(engine, "instance", ("InstanceNumber", "2"), study="1.1", series="1.1.1")
    assert [row["SOPInstanceUID"] for row in rows] == ["1.1.1.2"]
    assert [row["SOPInstanceUID"] for row in ask(engine, "instance", ("SOPClassUID", "1.2.4"))] == ["1.1.9.1"]


def test_limit_and_offset_page_through_all(engine: sa.Engine) -> None:
    pages = [studies(engine, ("limit", "2"), ("offset", str(offset))) for offset in (0, 2)]
    assert [len(page) for page in pages] == [2, 1]
    assert sorted(pages[0] + pages[1]) == ["1.1", "1.2", "1.3"]
    query = qido.parse("study", [("limit", "1")])
    with reading(engine) as connection:
        qido.search(connection, query)
    assert query.notes == ["There are additional results that can be requested."]


@pytest.mark.parametrize(
    "parameter",
    [("NoSuchAttribute", "1"), ("limit", "-1"), ("offset", "x"), ("includefield", "nonsense"), ("limit", "١")],
)
def test_what_cannot_be_asked_is_named_without_its_value(parameter: tuple[str, str]) -> None:
    with pytest.raises(QueryInvalid) as refused:
        qido.parse("study", [parameter])
    assert "nonsense" not in str(refused.value)


def test_numbers_are_checked(engine: sa.Engine) -> None:
    for value in ("two", "99999999999"):
        with pytest.raises(QueryInvalid):
            ask(engine, "series", ("SeriesNumber", value))


def test_what_was_not_done_as_asked_is_told() -> None:
    notes = qido.parse("study", [("fuzzymatching", "true"), ("PatientAge", "040Y"), ("includefield", "all")]).notes
    assert any("fuzzymatching" in note for note in notes)
    assert any("00101010" in note for note in notes)
    assert len(notes) == 2


TEXT = st.text(alphabet="aAbB%_[]*?^\\-/é", max_size=6)


@settings(max_examples=300, deadline=None)
@given(value=TEXT, pattern=TEXT)
def test_wildcards_match_as_the_standard_says(value: str, pattern: str) -> None:
    clause = qido.condition(sa.literal(value), "LO", pattern, "sqlite")
    with _memory().connect() as connection:
        found = bool(connection.execute(sa.select(clause)).scalar())
    assert found == _oracle(value, pattern)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(TEXT, min_size=30, max_size=30), patterns=st.lists(TEXT, min_size=30, max_size=30))
def test_both_databases_agree(engine: sa.Engine, values: list[str], patterns: list[str]) -> None:
    if engine.dialect.name == "sqlite":
        return
    clauses = [
        qido.condition(sa.literal(value), "LO", pattern, engine.dialect.name)
        for value, pattern in zip(values, patterns, strict=True)
    ]
    with engine.connect() as connection:
        row = connection.execute(sa.select(*(clause.label(f"c{place}") for place, clause in enumerate(clauses)))).one()
    assert [bool(each) for each in row] == [_oracle(value, pattern) for value, pattern in zip(values, patterns, strict=True)]


def _memory(engines: list[sa.Engine] = []) -> sa.Engine:  # noqa: B006 - one engine for all examples
    if not engines:
        engines.append(sa.create_engine("sqlite://"))
    return engines[0]


def _oracle(value: str, pattern: str) -> bool:
    parts = {"*": ".*", "?": "."}
    return re.fullmatch("".join(parts.get(letter, re.escape(letter)) for letter in pattern), value, re.DOTALL) is not None


def test_the_path_of_a_file_is_never_shown(engine: sa.Engine, tmp_path: Path) -> None:
    query = qido.parse("instance", [], "1.1")
    with reading(engine) as connection:
        rows = qido.search(connection, query)
    assert "results/" not in str([qido.as_json(query, row, "") for row in rows])
