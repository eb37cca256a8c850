"""Workflow files: what is read, every problem with its line, the graph, and the verdict on a study."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.misc import is_dicom

import caregrid.demo
from caregrid.domain.study import Source
from caregrid.domain.workflow import Retry, Trigger, Workflow
from caregrid.engine import workflows as caregrid_workflows
from caregrid.engine.workflows import dry_run, explain, judge, parse_workflow, priority_of, topological_order, warnings
from caregrid.errors import WorkflowInvalid
from tests.support.data import shared
from tests.support.studies_in_memory import header, study_of

GOOD = """\
workflow: lung
description: Lung volume
owner: imaging-ai@hospital.example
priority: {default: off-peak, emergency: {study: {StudyDescription: {contains: trauma, ignoring_case: true}}}}
trigger: {called_ae: [CAREGRID], source: CT*, protocol: [dimse, dicomweb]}
when:
  all:
    - any_series: {Modality: {equals: CT}, SliceThickness: {at_most: 5}}
    - study: {StudyDate: {after: 2020-01-01}}
tasks:
  - {id: tell, kind: notify, after: [send], channel: webhook, to: "https://hospital.example/hook", message: sent}
  - {id: chest, kind: select, series: {Modality: CT}, choose: most_instances, frames: [1-3, 7]}
  - {id: lung, kind: run, algorithm: x, input: chest, timeout: 5m, retry: {attempts: 4, backoff: 10}, parameters: {t: 0.5, n: 2}}
  - {id: size, kind: branch, cases: {small: {result: {task: lung, lung_volume_ml: {less: 1500}}}}, otherwise: usual}
  - {id: look, kind: review, of: [lung], after: [size.small], roles: [clinician], question: Is it right}
  - {id: either, kind: join, wait_for: [look, size.usual]}
  - {id: send, kind: deliver, after: [either], results: [lung], formats: [dicom_sr], destinations: [PACS]}
"""


@pytest.fixture(scope="module")
def good() -> Workflow:
    return parse_workflow(GOOD)


def test_a_workflow_is_read(good: Workflow) -> None:
    assert (good.name, good.owner, good.priority) == ("lung", "imaging-ai@hospital.example", "off-peak")
    assert good.trigger == Trigger(("CAREGRID",), ("CT*",), ("dimse", "dicomweb"))
    assert good.task("chest").options["frames"] == (1, 2, 3, 7)
    lung = good.task("lung")
    assert (lung.timeout_seconds, lung.retry, lung.on_error) == (300.0, Retry(4, 10.0), "fail")
    assert lung.options["parameters"] == {"t": 0.5, "n": 2}
    assert isinstance(lung.options["parameters"]["n"], int)
    assert good.task("look").timeout_seconds == 7 * 86400
    assert good.task("send").options["formats"] == ("dicom_sr",)
    assert warnings(good) == []


def test_edges_are_implied(good: Workflow) -> None:
    edges = {task.id: task.after for task in good.tasks}
    assert edges == {
        "tell": ("send",),
        "chest": (),
        "lung": ("chest",),
        "size": ("lung",),
        # lung is already above size and either, so no edge of its own
        "look": ("size.small",),
        "either": ("look", "size.usual"),
        "send": ("either",),
    }


def test_the_order_follows_the_edges_and_the_file(good: Workflow) -> None:
    assert [task.id for task in topological_order(good)] == ["chest", "lung", "size", "look", "either", "send", "tell"]


def test_the_revision_is_of_the_text() -> None:
    one, same, other = (parse_workflow(text).revision for text in (GOOD, GOOD, GOOD + "# changed\n"))
    assert one == same != other
    assert len(one) == 12
    assert set(one) <= set("0123456789abcdef")


def problems(text: str) -> list[tuple[int, str]]:
    with pytest.raises(WorkflowInvalid) as raised:
        parse_workflow(text, "w.yaml")
    first = raised.value.problems[0]
    assert str(raised.value) == f"w.yaml:{first[0]}: {first[1]}"
    return raised.value.problems


def in_task(line: str) -> str:
    """A file whose line 3 is the first task, and line 4 this one."""
    return f"workflow: w\ntasks:\n  - {{id: ct, kind: run, algorithm: x}}\n  - {line}\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "the file is empty"),
        ("a: [b", 1, "not YAML"),
        ("workflow: w\n\ttasks: []", 2, "not YAML"),
        ("- a\n", 1, "must be a mapping"),
        ("workflow: w\ntasks: []\n", 1, "no tasks"),
        ("workflow: w\ntasks: 3\n", 2, "tasks must be a list"),
        ("tasks:\n  - {id: a, kind: run, algorithm: x}\n", 1, "needs a name"),
        ("workflow: W w\ntasks:\n  - {id: a, kind: run, algorithm: x}\n", 1, "must be lower-case"),
        ("workflow: w\nworkflow: v\n", 2, "workflow is given twice (first on line 1)"),
        ("workflow: w\nprioriti: routine\n", 2, "unknown key prioriti; did you mean priority?"),
        ("workflow: w\npriority: urgent\n", 2, "unknown priority urgent"),
        ("workflow: w\nowner: &a x\ndescription: *a\n", 2, "anchors and aliases are not used"),
        ("workflow: w\ntrigger:\n  protocol: [dimse, ftp]\n", 3, "unknown protocol ftp"),
        ("workflow: w\nwhen: {result: {task: a, v: 1}}\n", 2, "only be asked in the cases of a branch"),
        ("workflow: w\nwhen:\n  any_series:\n    Modality: CT\n    Modality: MR\n", 5, "Modality is given twice"),
        ("workflow: w\nwhen:\n  any_series:\n    Modalty: CT\n", 4, "Modalty is not a DICOM keyword; did you mean Modality?"),
        ("workflow: w\nwhen:\n  Modality: CT\n", 3, "an attribute is asked of a level"),
        ("workflow: w\nwhen:\n  any_serie: {Modality: CT}\n", 3, "did you mean any_series?"),
        ("workflow: w\nwhen:\n  study: {any_series: {Modality: CT}}\n", 3, "any_series cannot stand inside study conditions"),
        ("workflow: w\nwhen:\n  study:\n    Rows: {at_least: many}\n", 4, "not a number"),
        ("workflow: w\nwhen:\n  study:\n    Rows: {after: 3}\n", 4, "after cannot judge"),
        ("workflow: w\nwhen:\n  study:\n    Rows: 12:30\n", 4, "not a number"),
        ("workflow: w\nwhen:\n  study: {StudyDate: {after: 2020-13-01}}\n", 3, "not a date"),
        ("workflow: w\nwhen:\n  study: {StudyTime: {after: 25:00}}\n", 3, "not a time"),
        ("workflow: w\nwhen:\n  study: {PatientAge: {less: young}}\n", 3, "not an age"),
        ("workflow: w\nwhen:\n  study: {PixelData: x}\n", 3, "equals cannot judge"),
        ("workflow: w\nwhen:\n  study: {StudyDescription: {matches: '(a'}}\n", 3, "not a regular expression"),
        ("workflow: w\nwhen:\n  study: {StudyDescription: {matches: '(?=a)'}}\n", 3, "not a regular expression"),
        (f"workflow: w\nwhen:\n  study: {{StudyDescription: {{matches: {'a' * 300}}}}}\n", 3, "longer than 256"),
        ("workflow: w\nwhen:\n  study: {Modality: {in: []}}\n", 3, "needs a list"),
        ("workflow: w\nwhen:\n  study: {Modality: {}}\n", 3, "asks for nothing"),
        ("workflow: w\nwhen:\n  study: {Modality: }\n", 3, "asks for nothing"),
        ("workflow: w\nwhen:\n  study: {Modality: {present: true, equals: CT}}\n", 3, "stand alone"),
        ("workflow: w\nwhen:\n  study: {Modality: {equal: CT}}\n", 3, "did you mean equals?"),
        ("workflow: w\nwhen:\n  study: {NumberOfSeriesRelatedInstances: 3}\n", 3, "counted over a series"),
        ("workflow: w\nwhen: []\n", 2, "holds no condition"),
        (f"workflow: w\nwhen: {'{not: ' * 40}1{'}' * 40}\n", 2, "nested deeper"),
        (in_task("{id: ct, kind: run, algorithm: x}"), 4, "task id ct is used twice"),
        (in_task("{id: a.b, kind: run, algorithm: x}"), 4, "task id a.b must be"),
        (in_task("{kind: run, algorithm: x}"), 4, "a task needs id"),
        (in_task("{id: a, kind: rum, algorithm: x}"), 4, "unknown task kind rum; did you mean run?"),
        (in_task("{id: a, kind: run}"), 4, "needs algorithm"),
        (in_task("{id: a, kind: run, algorithm: x, imput: b}"), 4, "unknown key imput; did you mean input?"),
        (in_task("{id: a, kind: run, algorithm: x, input: ct}"), 4, "needs a select task, but ct is a run task"),
        (in_task("{id: a, kind: run, algorithm: x, timeout: 5x}"), 4, "not a duration"),
        (in_task("{id: a, kind: run, algorithm: x, timeout: 400d}"), 4, "between 1 s and 30 days"),
        (in_task("{id: a, kind: run, algorithm: x, retry: {attempts: 0}}"), 4, "whole number from 1 to 20"),
        (in_task("{id: a, kind: run, algorithm: x, retry: {backoff: 0.1}}"), 4, "between 1 s"),
        (in_task("{id: a, kind: run, algorithm: x, on_error: ignore}"), 4, "unknown on_error ignore"),
        (in_task("{id: a, kind: run, algorithm: x, after: [ctt]}"), 4, "names ctt, which is no task; did you mean ct?"),
        (in_task("{id: a, kind: run, algorithm: x, after: [a]}"), 4, "names the task itself"),
        (in_task("{id: a, kind: run, algorithm: x, after: [ct.small]}"), 4, "only branches and reviews have cases"),
        (in_task("{id: a, kind: select, choose: biggest}"), 4, "unknown choose biggest"),
        (in_task("{id: a, kind: select, frames: [0]}"), 4, "frames are numbered from 1"),
        (in_task("{id: a, kind: branch, cases: {}}"), 4, "cases is empty"),
        (in_task("{id: a, kind: branch, cases: {b: {result: {task: cu, v: 1}}}}"), 4, "result names cu"),
        (in_task("{id: a, kind: join, wait_for: [ct]}"), 4, "needs at least 2"),
        (in_task("{id: a, kind: review, of: []}"), 4, "needs at least 1"),
        (in_task("{id: a, kind: review, of: [ct], roles: [admin]}"), 4, "may decide a review admin"),
        (in_task("{id: a, kind: deliver, results: [ct], destinations: []}"), 4, "destinations is empty"),
        (in_task("{id: a, kind: deliver, results: [ct], destinations: [P], formats: [dicom_srx]}"), 4, "did you mean dicom_sr?"),
        (in_task("{id: a, kind: notify, channel: webhook, to: x, message: m}"), 4, "http(s) address"),
    ],
)
def test_a_problem_has_its_line(text: str, line: int, said: str) -> None:
    assert [(at, True) for at, reason in problems(text) if said in reason] == [(line, True)], problems(text)


def test_every_problem_of_a_file_is_told_at_once() -> None:
    text = (
        GOOD.replace("Modality: {equals", "Modalitty: {equals")
        .replace("kind: join", "kind: joint")
        .replace("timeout: 5m", "timeout: soon")
    )
    found = problems(text)
    assert [line for line, _ in found] == [8, 13, 16, 17]
    assert "names either, which is no task" in found[-1][1]


def test_problems_in_block_style_have_their_own_lines() -> None:
    tasks = "  - id: a\n    kind: run\n    algorithm: x\n  - id: b\n    kind: join\n    wait_for:\n      - a\n      - nothing\n"
    text = f"workflow: w\ntasks:\n{tasks}"
    assert (10, "task b: wait_for names nothing, which is no task") in problems(text)


def test_a_circle_is_refused() -> None:
    text = "workflow: w\ntasks:\n" + "".join(
        f"  - {{id: {a}, kind: run, algorithm: x, after: [{b}]}}\n" for a, b in (("a", "b"), ("b", "c"), ("c", "a"))
    )
    [(line, reason)] = problems(text)
    assert line in (3, 4, 5)
    assert "in a circle" in reason


TWO_WAYS = """\
workflow: w
tasks:
  - {id: b, kind: branch, cases: {x: {any_series: {Modality: CT}}}, otherwise: y}
  - {id: one, kind: run, algorithm: x, after: [b.x]}
  - {id: two, kind: run, algorithm: x, after: [b.y]}
"""


def test_a_task_after_both_cases_of_a_branch_can_never_run() -> None:
    send = "  - {id: send, kind: deliver, results: [one, two], destinations: [PACS]}\n"
    [(line, reason)] = problems(TWO_WAYS + send)
    assert (line, reason) == (6, "task send can never run: it needs two cases of b at once; put a join before it")


def test_behind_a_join_the_results_of_both_ways_may_be_named() -> None:
    join = "  - {id: j, kind: join, wait_for: [one, two]}\n"
    send = "  - {id: send, kind: deliver, after: [j], results: [one, two], destinations: [PACS]}\n"
    assert parse_workflow(TWO_WAYS + join + send).task("send").after == ("j",)


def test_a_review_has_cases_too() -> None:
    text = (
        in_task("{id: look, kind: review, of: [ct]}") + "  - {id: no, kind: notify, after: [look.rejected], message: rejected}\n"
    )
    assert parse_workflow(text).task("no").after == ("look.rejected",)


# warnings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ("  - {id: a, kind: run, algorithm: x}\n", "the result of a is never delivered"),
        ("  - {id: a, kind: select}\n", "no run task takes the series that a selects"),
        (
            "  - {id: a, kind: run, algorithm: x}\n  - {id: r, kind: review, of: [a]}\n"
            "  - {id: d, kind: deliver, results: [a], destinations: [P]}\n",
            "d sends the result of a without waiting for review r",
        ),
    ],
)
def test_warnings_about_tasks(tasks: str, said: str) -> None:
    assert any(said in each for each in warnings(parse_workflow(f"workflow: w\ntasks:\n{tasks}")))


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("{Modality: ct}", "can never be ct"),
        ("{SliceThickness: {at_least: 5, less: 1}}", "above 5.0 and below 1.0"),
        ("{all: [{Modality: CT}, {Modality: MR}]}", "two different values"),
        ("{all: [{Rows: {present: true}}, {Rows: {absent: true}}]}", "present and absent"),
    ],
)
def test_warnings_about_conditions_that_never_hold(test: str, said: str) -> None:
    text = f"workflow: w\nwhen: {{any_series: {test}}}\ntasks:\n  - {{id: a, kind: run, algorithm: x}}\n"
    assert any(said in each and each.startswith("line 2") for each in warnings(parse_workflow(text)))


def test_no_warning_where_several_values_can_hold_both() -> None:
    text = (
        "workflow: w\nwhen: {any_series: {all: [{ImageType: ORIGINAL}, {ImageType: AXIAL}]}}\n"
        + "tasks:\n  - {id: a, kind: select}\n"
    )
    assert not any("never hold" in each for each in warnings(parse_workflow(text)))


# verdicts -----------------------------------------------------------------------------------------------------------

CT = header(Modality="CT", SliceThickness="1", StudyDate="20240101", StudyDescription="Polytrauma", PatientName="Canary^Bird")


def test_a_study_that_fits(good: Workflow) -> None:
    study, headers = study_of([CT])
    verdict = judge(good, study, headers)
    assert verdict.applies
    assert verdict.revision == good.revision
    assert verdict.trail[0] == "trigger: yes"
    assert priority_of(good, study, headers) == "emergency"


def test_a_study_that_does_not_fit_says_why(good: Workflow) -> None:
    study, headers = study_of([header(Modality="CT", SliceThickness="7", StudyDate="20240101", PatientName="Canary^Bird")])
    verdict = judge(good, study, headers)
    assert not verdict.applies
    assert verdict.reason == "line 8: no series of 1 fits: line 8: SliceThickness at_most 5 does not hold in series 1 (it is 7)"
    assert "Canary" not in "\n".join(verdict.trail)
    assert priority_of(good, study, headers) == "off-peak"


@pytest.mark.parametrize(
    ("source", "names", "reason"),
    [
        (Source("dimse", "CT1", "OTHER", ""), (), "called AE is OTHER, not CAREGRID"),
        (Source("dimse", "MR1", "CAREGRID", ""), (), "source is MR1, not CT*"),
        (Source("dimse", "MR1", "CAREGRID", ""), ("CT-room-2",), None),
        (Source("folder", "CT9", "CAREGRID", ""), (), "protocol is folder, not dimse or dicomweb"),
        (Source("dicomweb", "CT9", "CAREGRID", ""), (), None),
    ],
)
def test_the_trigger(good: Workflow, source: Source, names: tuple[str, ...], reason: str | None) -> None:
    study, headers = study_of([CT], source=source)
    verdict = judge(good, study, headers, names)
    assert verdict.applies is (reason is None)
    assert reason is None or verdict.reason == reason


def test_a_trigger_that_fails_reads_no_file(good: Workflow) -> None:
    study, _ = study_of([CT], source=Source("dimse", "MR1", "CAREGRID", ""))

    def untouched(_ref):  # type: ignore[no-untyped-def]
        raise AssertionError("a header was read")

    assert not judge(good, study, untouched).applies


def test_a_dry_run_counts_and_explains(good: Workflow) -> None:
    fits, headers = study_of([CT])
    empty, _ = study_of()
    found = dry_run(good, [fits, empty, fits], headers)
    assert (found.total, found.would_fire) == (3, 2)
    lines = explain(verdict for _, verdict in found.verdicts)
    assert lines[0].startswith(f"lung ({good.revision}) applies")
    assert any("does not apply: line 8: the study has no series" in line for line in lines)


def test_one_real_file() -> None:
    path = get_testdata_file("CT_small.dcm")
    assert path
    made = dcmread(path, stop_before_pixels=True)
    flow = parse_workflow(
        "workflow: w\ntrigger: {called_ae: [A]}\nwhen: {any_series: {Modality: CT, SliceThickness: {at_most: 5}}}\n"
        "tasks:\n  - {id: a, kind: run, algorithm: x}\n"
    )
    assert caregrid_workflows.test_file(flow, made).applies
    assert not caregrid_workflows.test_file(flow, made, called_ae="B", calling_ae="C").applies
    assert not caregrid_workflows.test_file(flow, Dataset()).applies


# the demonstration's own ----------------------------------------------------------------------------------------------

DEMO = sorted((Path(caregrid.demo.__file__).parent / "workflows").glob("*.yaml"))


@pytest.mark.parametrize("path", DEMO, ids=lambda path: path.stem)
def test_the_demonstration_workflows_are_valid(path: Path) -> None:
    flow = parse_workflow(path.read_text("utf-8"), path.name)
    assert flow.name == path.stem
    assert warnings(flow) == []
    assert [task.options["algorithm"] for task in flow.tasks if task.kind == "run"] == [path.stem]


@pytest.mark.parametrize(
    ("folder", "applies"),
    [
        ("ct-chest", {"ct-lung-volume"}),
        ("ct-head-tilt", set()),
        ("mr-acr-phantom/Siemens", {"mr-phantom-quality"}),
        ("mr-ge-16", set()),
    ],
)
def test_the_demonstration_workflows_on_real_studies(folder: str, applies: set[str]) -> None:
    headers = [
        dcmread(path, stop_before_pixels=True) for path in sorted(shared(folder).rglob("*")) if path.is_file() and is_dicom(path)
    ]
    study, read = study_of(headers)
    flows = [parse_workflow(path.read_text("utf-8")) for path in DEMO]
    assert {flow.name for flow in flows if judge(flow, study, read).applies} == applies


@pytest.mark.parametrize(
    ("name", "applies"), [("RG1_UNCR.dcm", {"chest-xray-quality"}), ("color3d_jpeg_baseline.dcm", {"ultrasound-cine-quality"})]
)
def test_the_demonstration_workflows_on_single_real_files(name: str, applies: set[str]) -> None:
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is not on this machine")
    made = dcmread(path, stop_before_pixels=True)
    flows = [parse_workflow(each.read_text("utf-8")) for each in DEMO]
    assert {flow.name for flow in flows if caregrid_workflows.test_file(flow, made).applies} == applies


def test_the_workflow_in_the_guide_is_valid() -> None:
    guide = Path(__file__).parents[3] / "docs/how-to/write-a-workflow.md"
    [text] = re.findall(r"```yaml\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    assert warnings(parse_workflow(text)) == []
    broken = text.replace("SliceThickness", "SliceThicknes", 1)
    [(line, reason)] = problems(broken)
    assert f":{line}: {reason}" in guide.read_text("utf-8")


def test_there_are_four_of_them() -> None:
    assert {path.stem for path in DEMO} == {
        "ct-lung-volume",
        "chest-xray-quality",
        "ultrasound-cine-quality",
        "mr-phantom-quality",
    }


# whatever is thrown at it ---------------------------------------------------------------------------------------------

ODD = (
    "workflow:",
    "tasks:",
    "  - ",
    "{",
    "}",
    "[",
    "]",
    ": ",
    "? ",
    "| ",
    "> ",
    "!!python/object:os.system x",
    "&a",
    "*a",
    "<<: ",
)
ODDER = (
    "---",
    "...",
    "%YAML 1.1",
    '"\\UFFFFFFFF"',
    "\x00",
    "\ud800",
    "\t",
    "- - -",
    "0x1F",
    "1e999",
    "~",
    "when:",
    "{id: a, kind: branch,",
)
PIECES = st.sampled_from([*GOOD.splitlines(), *ODD, *ODDER])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.lists(PIECES, max_size=12).map("\n".join) | st.lists(PIECES, max_size=12).map(" ".join))
def test_any_text_is_a_workflow_or_a_named_error(text: str) -> None:
    try:
        found = parse_workflow(text)
    except WorkflowInvalid as error:
        lines_told = [line for line, _ in error.problems]
    else:
        lines_told = []
        assert topological_order(found)
    assert all(line >= 1 for line in lines_told)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_good_file_with_a_line_broken_or_moved_is_never_a_crash(data: st.DataObject) -> None:
    lines = GOOD.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        start, end = sorted((data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))))
        lines[number] = (
            lines[number][:start] + data.draw(st.sampled_from(["", "x", "[", "}", "a.b", ": ", "0"])) + lines[number][end:]
        )
    try:
        found = parse_workflow("\n".join(lines))
    except WorkflowInvalid:
        return
    study, headers = study_of([CT])
    assert isinstance(judge(found, study, headers).applies, bool)
    assert isinstance(warnings(found), list)


def test_the_trail_reads_from_the_whole_to_its_parts(good: Workflow) -> None:
    study, headers = study_of([header(Modality="MR")], [CT])
    assert judge(good, study, headers).trail == (
        "trigger: yes",
        "line 7: all: yes",
        "  line 8: any_series: yes: series 2 fits",
        "    line 8: Modality equals CT in series 1: no (it is MR)",
        "    line 8: Modality equals CT in series 2: yes (it is CT)",
        "    line 8: SliceThickness at_most 5 in series 2: yes (it is 1)",
        "  line 9: StudyDate after 2020-01-01 in the study: yes",
    )
