"""Conditions: typed tests on decoded DICOM, levels and logic, and reasons without patient data."""

from __future__ import annotations

import struct
from datetime import date, time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from caregrid.domain.workflow import Condition
from caregrid.engine import workflows as caregrid_workflows
from caregrid.engine.attributes import attribute, read
from caregrid.engine.conditions import TESTS_BY_KIND, Judgement, Scope, choose_case, evaluate, select_series
from caregrid.engine.workflows import parse_workflow
from caregrid.errors import ConditionError, WorkflowInvalid
from tests.support.data import shared
from tests.support.studies_in_memory import header, study_of

TASKS = "tasks:\n  - {id: a, kind: run, algorithm: x}\n"


def condition(yaml: str) -> Condition:
    """The ``when`` of a workflow with this YAML under it."""
    indented = "\n".join(f"  {line}" for line in yaml.splitlines())
    found = parse_workflow(f"workflow: w\nwhen:\n{indented}\n{TASKS}").when
    assert found is not None
    return found


def judged(yaml: str, *series: list[Dataset]) -> Judgement:
    study, headers = study_of(*series)
    return evaluate(condition(yaml), Scope(study, headers))


CT = header(
    Modality="CT",
    SliceThickness="1.25",
    KVP="120",
    ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
    PixelSpacing=["0.7", "0.9"],
    StudyDate="20240131",
    StudyTime="083000.25",
    AcquisitionDateTime="20240131083000+0100",
    PatientAge="018M",
    SeriesDescription="Chest  1.25 ",
    Rows=512,
    PatientName="Grünwald^Anna",
)


@pytest.mark.parametrize(
    ("test", "holds"),
    [
        ("Modality: CT", True),
        ("Modality: ct", False),
        ("Modality: {equals: ct, ignoring_case: true}", True),
        ("Modality: [MR, CT]", True),
        ("Modality: {not_equals: CT}", False),
        ("Modality: {not_equals: MR}", True),
        ("SliceThickness: {at_most: 1.25}", True),
        ("SliceThickness: {less: 1.25}", False),
        ("SliceThickness: {greater: 1.2, less: 2}", True),
        # as text "120" < "99"; as a number it is not
        ("KVP: {greater: 99}", True),
        ("KVP: 120.0", True),
        ("Rows: {in: [256, 512]}", True),
        ("ImageType: PRIMARY", True),
        ("ImageType: {contains: AXI}", True),
        ("ImageType: {not_equals: PRIMARY}", False),
        ("ImageType: {all_values: {matches: '^[A-Z]+$'}}", True),
        ("PixelSpacing: {at_least: 0.8}", True),
        ("PixelSpacing: {all_values: {at_least: 0.8}}", False),
        # one value must lie in the range; 0.7 and 0.9 lie on either side of it
        ("PixelSpacing: {greater: 0.75, less: 0.85}", False),
        ("StudyDate: {after: 2020-01-01}", True),
        ("StudyDate: {before: 2024-01-31}", False),
        ("StudyDate: {at_most: 2024-01-31}", True),
        ("StudyDate: 2024-01-31", True),
        ("StudyTime: {after: 08:00, before: 09:00}", True),
        ("AcquisitionDateTime: {after: '2024-01-31T08:29'}", True),
        ("PatientAge: {less: 2Y}", True),
        ("PatientAge: {at_least: 1.5}", True),
        ("PatientAge: 18M", True),
        ("PatientName: {contains: Anna}", True),
        ("SeriesDescription: {contains: chest}", False),
        ("SeriesDescription: {contains: chest, ignoring_case: true}", True),
        ("SeriesDescription: {matches: '^Chest +1'}", True),
        ("SeriesDescription: Chest  1.25", True),
        ("ContrastBolusAgent: {absent: true}", True),
        ("ContrastBolusAgent: {present: true}", False),
        ("ContrastBolusAgent: {present: false}", True),
        ("ContrastBolusAgent: {not_equals: iodine}", False),
        ("not: {ContrastBolusAgent: iodine}", True),
        ("any: [{KVP: 80}, {KVP: 120}]", True),
        ("all: [{KVP: 120}, {Rows: 1}]", False),
        ("'(0018,0050)': {at_most: 2}", True),
    ],
)
def test_a_test_on_one_series(test: str, holds: bool) -> None:
    found = judged(f"any_series:\n  {test}", [CT])
    assert found.holds is holds, found.reason
    assert found.reason
    assert found.trail


def test_a_float_sent_in_32_bits_equals_the_decimal_it_was_written_as() -> None:
    narrow = struct.unpack("<f", struct.pack("<f", 1.2))[0]
    made = header(Modality="CT", DataCollectionDiameter=str(narrow))
    assert judged("any_series: {DataCollectionDiameter: 1.2}", [made]).holds
    assert judged("any_series: {DataCollectionDiameter: {at_most: 1.2}}", [made]).holds
    assert not judged("any_series: {DataCollectionDiameter: {greater: 1.2}}", [made]).holds


def test_any_and_all_series() -> None:
    mr = header(Modality="MR")
    assert judged("any_series: {Modality: MR}", [CT], [mr]).holds
    assert not judged("all_series: {Modality: MR}", [CT], [mr]).holds
    assert judged("all_series: {Modality: [MR, CT]}", [CT], [mr]).holds
    # both tests must be passed by the same series
    assert not judged("any_series: {Modality: MR, KVP: {present: true}}", [CT], [mr]).holds


def test_a_study_without_series_holds_nothing() -> None:
    for level in ("any_series", "all_series", "study", "any_instance", "all_instances"):
        found = judged(f"{level}: {{Modality: CT}}")
        assert not found.holds, level


def test_series_look_at_the_first_instance_and_instances_at_each() -> None:
    frames = [header(Modality="US"), header(Modality="US", NumberOfFrames="40")]
    assert not judged("any_series: {NumberOfFrames: {at_least: 2}}", frames).holds
    assert judged("any_series: {Modality: US, any_instance: {NumberOfFrames: {at_least: 2}}}", frames).holds
    assert judged("any_instance: {NumberOfFrames: {at_least: 2}}", frames).holds
    assert not judged("all_instances: {NumberOfFrames: {at_least: 2}}", frames).holds


def test_instances_are_not_read_when_the_answer_is_already_known() -> None:
    study, headers = study_of([header(Modality="US")] * 50)
    seen = []

    def counting(ref):  # type: ignore[no-untyped-def]
        seen.append(ref)
        return headers(ref)

    yaml = "all:\n  - any_series: {Modality: CT}\n  - any_instance: {NumberOfFrames: {at_least: 2}}"
    found = evaluate(condition(yaml), Scope(study, counting))
    assert not found.holds
    assert len(seen) == 1
    assert any("already decided" in line for line in found.trail)


def test_counts_are_taken_over_what_was_received() -> None:
    series = [header(Modality="CT")] * 3
    assert judged("any_series: {NumberOfSeriesRelatedInstances: 3}", series).holds
    assert judged(
        "study: {NumberOfStudyRelatedSeries: 2, NumberOfStudyRelatedInstances: 4}", series, [header(Modality="SR")]
    ).holds
    assert judged("study: {ModalitiesInStudy: SR}", series, [header(Modality="SR")]).holds


def test_study_attributes_come_from_the_first_series_that_has_them() -> None:
    report = header(Modality="SR")
    assert judged("study: {PatientAge: {less: 2}}", [report], [CT]).holds


def test_paths_go_into_sequences() -> None:
    item, other = header(ScheduledProcedureStepDescription="CT head"), header(ScheduledProcedureStepDescription="CT chest")
    made = header(Modality="CT", RequestAttributesSequence=[item, other])
    path = "RequestAttributesSequence.ScheduledProcedureStepDescription"
    assert judged(f"study: {{{path}: {{contains: chest}}}}", [made]).holds
    assert not judged(f"study: {{{path}: {{contains: knee}}}}", [made]).holds
    assert not judged(f"study: {{{path}: {{contains: chest}}}}", [CT]).holds
    assert judged("study: {RequestAttributesSequence: {present: true}}", [made]).holds


def test_private_attributes_by_tag_and_by_creator() -> None:
    made = header(Modality="MR")
    made.private_block(0x0029, "SCANNER MAKER", create=True).add_new(0x10, "LO", "fast")
    made.private_block(0x0029, "SCANNER MAKER").add_new(0x11, "DS", "2.5")
    made.add_new(0x00311020, "UN", b"7 ")
    assert judged('study: {"(0029,1010)": fast}', [made]).holds
    assert judged('study: {"(0029,xx10,SCANNER MAKER)": fast}', [made]).holds
    assert judged('study: {"(0029,xx11,SCANNER MAKER)": {greater: 2}}', [made]).holds
    assert not judged('study: {"(0029,xx10,OTHER MAKER)": fast}', [made]).holds
    assert judged('study: {"(0031,1020)": "7"}', [made]).holds


@pytest.mark.parametrize(
    ("vr", "keyword", "raw", "test"),
    [
        ("DS", "SliceThickness", b"thin", "{at_most: 5}"),
        ("DS", "SliceThickness", b"NaN ", "{at_most: 5}"),
        ("IS", "SeriesNumber", b"\xff\xfe", "{at_least: 1}"),
        ("DA", "StudyDate", b"yesterda", "{after: 2020-01-01}"),
        ("TM", "StudyTime", b"2561", "{after: 01:00}"),
        ("AS", "PatientAge", b"old ", "{at_least: 18}"),
        ("US", "Rows", b"\x01", "{at_least: 1}"),
        ("FD", "SpacingBetweenSlices", b"abc", "{at_least: 1}"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_decoded_is_false_with_the_reason(vr: str, keyword: str, raw: bytes, test: str) -> None:
    made = Dataset()
    tag = Tag(keyword)
    made[tag] = RawDataElement(tag, vr, len(raw), raw, 0, False, True)
    found = judged(f"study: {{{keyword}: {test}}}", [made])
    assert not found.holds
    assert "not readable" in found.reason


def test_empty_is_not_present() -> None:
    made = header(Modality="CT", AccessionNumber="", BodyPartExamined=None)
    assert judged("study: {AccessionNumber: {absent: true}, BodyPartExamined: {absent: true}}", [made]).holds


def test_a_file_that_cannot_be_read_is_no_verdict() -> None:
    study, _ = study_of([CT])

    def broken(_ref):  # type: ignore[no-untyped-def]
        raise OSError("input/output error")

    with pytest.raises(OSError, match="input/output"):
        evaluate(condition("any_series: {Modality: CT}"), Scope(study, broken))


def test_a_slow_pattern_for_backtracking_is_not_slow() -> None:
    made = header(StudyDescription="a" * 60 + "!")
    assert not judged("study: {StudyDescription: {matches: '^(a+)+$'}}", [made]).holds


# results ------------------------------------------------------------------------------------------------------------


def cases(yaml: str) -> tuple[tuple[str, Condition], ...]:
    text = (
        f"workflow: w\ntasks:\n  - {{id: lung, kind: run, algorithm: x}}\n  - id: b\n    kind: branch\n    cases:\n      {yaml}\n"
    )
    return parse_workflow(text).task("b").options["cases"]


@pytest.mark.parametrize(
    ("values", "case"),
    [
        ({"volume": 1200.0}, "small"),
        ({"volume": 1500}, "otherwise"),
        ({"volume": "1200"}, "otherwise"),
        ({"volume": float("nan")}, "otherwise"),
        ({"volume": None}, "otherwise"),
        ({}, "otherwise"),
    ],
)
def test_a_branch_on_a_result(values: dict[str, object], case: str) -> None:
    study, headers = study_of([CT])
    made = cases("small: {result: {task: lung, volume: {less: 1500}}}")
    name, reason = choose_case(made, "otherwise", study, headers, {"lung": values})
    assert name == case
    assert "volume less 1500" in reason
    assert "1200" not in reason


def test_texts_and_flags_of_results() -> None:
    study, headers = study_of([CT])
    made = cases("bad: {result: {task: lung, quality: poor, complete: false, count: [1, 2]}}")
    good = {"quality": "poor", "complete": False, "count": 2}
    assert choose_case(made, "o", study, headers, {"lung": good})[0] == "bad"
    assert choose_case(made, "o", study, headers, {"lung": {**good, "complete": 0}})[0] == "o"
    assert choose_case(made, "o", study, headers, {})[0] == "o"


# select -------------------------------------------------------------------------------------------------------------


def series_tests(yaml: str) -> Condition:
    return parse_workflow(f"workflow: w\ntasks:\n  - {{id: s, kind: select, series: {yaml}}}\n").task("s").options["series"]


def test_select_narrows_to_what_is_asked() -> None:
    old = [header(Modality="CT", SeriesDate="20200101", SliceThickness="5")] * 3
    new = [header(Modality="CT", SeriesDate="20210101", SliceThickness="1")] * 2
    mr = [header(Modality="MR", SeriesDate="20220101")]
    study, headers = study_of(old, mr, new)
    tests = series_tests("{Modality: CT}")
    uids = {
        how: [s.series_instance_uid for s in select_series(tests, how, study, headers).series]
        for how in ("all", "first", "newest")
    }
    assert uids == {"all": ["1.2.3.1", "1.2.3.3"], "first": ["1.2.3.1"], "newest": ["1.2.3.3"]}
    assert len(select_series(tests, "most_instances", study, headers).series[0].instances) == 3
    assert len(select_series(None, "all", study, headers).series) == 3


def test_select_says_why_nothing_fits() -> None:
    study, headers = study_of([header(Modality="MR", PatientName="Canary^Bird")], [])
    series, reason = select_series(series_tests("{Modality: CT, PatientName: Canary}"), "all", study, headers)
    assert series == []
    assert reason == "no series fits: line 3: Modality equals CT does not hold in series 1 (it is MR)"


# real files ---------------------------------------------------------------------------------------------------------


def test_a_real_ct_head() -> None:
    files = sorted(shared("ct-head-tilt").rglob("*.dcm"))
    if not files:
        files = sorted(
            each for each in shared("ct-head-tilt").rglob("*") if each.is_file() and each.suffix not in (".json", ".md", ".txt")
        )
    headers = [dcmread(each, stop_before_pixels=True) for each in files]
    assert judged("any_series: {Modality: CT, GantryDetectorTilt: {present: true}, SliceThickness: {at_most: 10}}", headers).holds


def test_nested_items_of_an_enhanced_image() -> None:
    path = get_testdata_file("eCT_Supplemental.dcm")
    if path is None:
        pytest.skip("pydicom's eCT_Supplemental.dcm is not on this machine")
    made = dcmread(path, stop_before_pixels=True)
    name = "SharedFunctionalGroupsSequence.PixelMeasuresSequence.SliceThickness"
    assert judged(f"any_series: {{{name}: {{greater: 0}}}}", [made]).holds


# names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SliceThicknes", "did you mean SliceThickness?"),
        ("modality", "did you mean Modality?"),
        ("(0018,50)", "is not a tag like"),
        ("Modality.KVP", "Modality is not a sequence"),
        ("", "is not a DICOM keyword"),
        (".", "is not a DICOM keyword"),
        ("(0008,xx10,MAKER)", "only private"),
    ],
)
def test_names_that_are_none(name: str, said: str) -> None:
    with pytest.raises(ConditionError, match="cannot be judged") as raised:
        attribute(name)
    assert said in str(raised.value)


def test_names_are_one_spelling() -> None:
    assert attribute("(0018,0050)").name == "SliceThickness"
    assert read(CT, attribute("StudyDate")).values == (date(2024, 1, 31),)
    assert read(CT, attribute("StudyTime")).values == (time(8, 30, 0, 250000),)


# never an exception, never a patient ----------------------------------------------------------------------------------

CANARY = "CANARY77"
PERSONAL = {
    "PatientName": f"{CANARY}^{CANARY}",
    "PatientID": CANARY,
    "PatientBirthDate": "19770707",
    "PatientAge": "077Y",
    "PatientWeight": "77.77",
    "PatientSex": "O",
    "AccessionNumber": CANARY,
    "StudyID": CANARY,
    "StudyDescription": f"knee of {CANARY}",
    "SeriesDescription": CANARY,
    "ProtocolName": CANARY,
    "InstitutionName": CANARY,
    "ReferringPhysicianName": CANARY,
    "PatientComments": CANARY,
    "OtherPatientIDs": CANARY,
    "BodyPartExamined": "CANARY77^X",
    "StudyDate": "19770707",
    "StudyTime": "070707",
    "StudyInstanceUID": "7.7.7",
    "RequestedProcedureDescription": CANARY,
}


@pytest.mark.parametrize("test", ["equals", "contains", "matches", "in", "not_equals", "at_least", "before", "present"])
def test_no_patient_value_is_in_a_reason(test: str) -> None:
    wanted = {"present": "true", "in": "[x]", "at_least": "1", "before": "x"}.get(test, "x")
    made = header(Modality="CT", **PERSONAL)
    made.private_block(0x0029, "MAKER", create=True).add_new(0x10, "LO", CANARY)
    judged_some = 0
    for name in [*PERSONAL, '"(0029,1010)"', '"(0029,xx10,MAKER)"']:
        kind = attribute(name.strip('"')).kind
        if test not in TESTS_BY_KIND[kind]:
            continue
        value = (
            wanted if kind in ("text", "unknown") else {"date": "2001-01-01", "time": "01:01"}.get(kind, wanted.replace("x", "1"))
        )
        value = f"[{value.strip('[]')}]" if test == "in" else "true" if test == "present" else value
        for level in ("study", "any_series", "all_instances"):
            found = judged(f"{level}: {{{name}: {{{test}: {value}}}}}", [made])
            told = "\n".join((found.reason, *found.trail))
            for secret in (CANARY, "1977", "7707", "77.77", "7.7.7", "(it is 77", "070707", "07:07", "it is O"):
                assert secret not in told, (name, told)
            judged_some += 1
    assert judged_some


def test_a_wanted_value_of_a_person_is_not_told_either() -> None:
    found = judged(f"study: {{PatientID: [{CANARY}, B], PatientName: {{matches: {CANARY}}}}}", [header(**PERSONAL)])
    told = "\n".join((found.reason, *found.trail))
    assert CANARY not in told
    assert "PatientID in …" in told


LEAVES = st.sampled_from(
    [
        "Modality: CT",
        "Modality: {matches: '^C'}",
        "SliceThickness: {at_most: 5, at_least: 1}",
        "PixelSpacing: {all_values: {greater: 0.1}}",
        "StudyDate: {after: 2020-01-01}",
        "StudyTime: {before: 12:00}",
        "PatientAge: {at_least: 18Y}",
        "ImageType: {contains: ORIG}",
        "Rows: {in: [1, 2]}",
        "PatientName: {present: true}",
        "RequestAttributesSequence.ScheduledProcedureStepDescription: {contains: a}",
        "'(0029,1010)': {less: 3}",
        "'(0029,xx10,MAKER)': {matches: 'x+'}",
    ]
)
LEVELS = st.sampled_from(["study", "any_series", "all_series", "any_instance", "all_instances"])
TREES = st.recursive(
    st.builds(lambda level, leaf: f"{{{level}: {{{leaf}}}}}", LEVELS, LEAVES),
    lambda inner: st.builds(
        lambda op, parts: f"{{{op}: [{', '.join(parts)}]}}",
        st.sampled_from(["all", "any", "not"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)
RAW = st.tuples(
    st.sampled_from(
        ["Modality", "SliceThickness", "PixelSpacing", "StudyDate", "StudyTime", "PatientAge", "ImageType", "Rows", "PatientName"]
    ).map(Tag)
    | st.just(Tag(0x00291010))
    | st.just(Tag(0x00290010))
    | st.just(Tag("RequestAttributesSequence")),
    st.sampled_from(["CS", "DS", "DA", "TM", "AS", "US", "PN", "LO", "UN", "FD", "IS", "UI", "DT", "AT", "OB"]),
    st.binary(max_size=12) | st.sampled_from([b"MAKER ", b"CT", b"1\\2", b"20240101", b"045Y", b"0800"]),
)


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    implicit = draw(st.booleans())
    raws = {tag: RawDataElement(tag, vr, len(raw), raw, 0, implicit, True) for tag, vr, raw in draw(st.lists(RAW, max_size=6))}
    # As a reader leaves them: not decoded yet (assigning them one by one would decode some).
    made = Dataset(raws)
    if draw(st.booleans()):
        items = Sequence([Dataset(), header(ScheduledProcedureStepDescription="a")])
        made[Tag("RequestAttributesSequence")] = DataElement(Tag("RequestAttributesSequence"), "SQ", items)
    return made


@settings(max_examples=150, deadline=None)
@given(TREES, st.lists(st.lists(datasets(), max_size=2), max_size=3))
@pytest.mark.filterwarnings("ignore")
def test_any_condition_on_any_data_set_gives_a_bool_and_a_reason(tree: str, series: list[list[Dataset]]) -> None:
    study, headers = study_of(*series)
    found = evaluate(condition(tree), Scope(study, headers))
    assert isinstance(found.holds, bool)
    assert found.reason
    for made in (each for instances in series for each in instances):
        assert isinstance(caregrid_workflows.test_file(CT_ONLY, made).applies, bool)


CT_ONLY = parse_workflow(f"workflow: w\nwhen: {{any_series: {{Modality: CT}}}}\n{TASKS}")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["study", "any_series"]), st.text(max_size=40), st.text(max_size=40))
def test_any_name_and_value_is_a_condition_or_a_named_error(level: str, name: str, value: str) -> None:
    study, headers = study_of([CT])
    try:
        found = condition(f"{level}: {{{name!r}: {value!r}}}")
    except WorkflowInvalid:
        return
    assert isinstance(evaluate(found, Scope(study, headers)).holds, bool)


def test_the_trail_of_a_study_with_very_many_series_is_cut() -> None:
    found = judged("any_series: {Modality: CT}", *[[header(Modality="MR")]] * 500)
    assert not found.holds
    assert len(found.trail) == 201
    assert found.trail[-1] == "… more steps left out"
