"""MONAI Deploy and AIDE workflows become ours, and what is lost on the way is told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caregrid.domain.workflow import Workflow
from caregrid.engine.conditions import choose_case
from caregrid.engine.monai_conditions import Untranslatable, translate
from caregrid.engine.monai_import import MonaiImport, import_monai
from caregrid.engine.workflows import judge, parse_workflow
from caregrid.errors import WorkflowInvalid
from tests.support.data import shared
from tests.support.studies_in_memory import header, study_of

LUNG = "{{context.dicom.series.any('0008','103E')}} == 'Axial Chest CT'"


def task(task_id: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"id": task_id, "type": kind, **more}


def to(*targets: str, **conditional: list[str]) -> list[dict[str, Any]]:
    return [{"name": each} for each in targets] + [{"name": name, "conditions": how} for name, how in conditional.items()]


def reads(*tasks: str) -> dict[str, Any]:
    return {"input": [{"name": "in", "value": f"{{{{ context.executions.{each}.artifacts.out }}}}"} for each in tasks]}


def imported(*tasks: dict[str, Any], **head: Any) -> tuple[Workflow, MonaiImport]:
    found = import_monai(json.dumps({"name": "made", "tasks": list(tasks), **head}))
    return parse_workflow(found.yaml), found


def told(found: MonaiImport, kind: str) -> str:
    return "\n".join(f"{line.what}: {line.why}" for line in found.report if line.kind == kind)


# the real files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "edges"),
    [
        ("monai-hello-world.json", {"print-file-list": ()}),
        ("monai-lung-seg.json", {"router": (), "lung": ("router.go",), "export-lung-seg": ("lung",)}),
        (
            "monai-liver-lung-seg.json",
            {
                "router-ailiver": (),
                "ailiver": ("router-ailiver.go",),
                "export-ailiver-seg": ("ailiver",),
                "router-ailung": (),
                "ailung": ("router-ailung.go",),
                "export-ailung-seg": ("ailung",),
            },
        ),
        (
            "aide-totalsegmentator-review.json",
            {
                "totalsegmentator-task": (),
                "clinical-review-task": ("totalsegmentator-task",),
                "export-rt-struct": ("clinical-review-task",),
            },
        ),
    ],
)
def test_real_workflows(file: str, edges: dict[str, tuple[str, ...]]) -> None:
    found = import_monai(shared(f"workflows/{file}").read_text("utf-8"))
    assert {each.id: each.after for each in parse_workflow(found.yaml).tasks} == edges
    assert told(found, "changed")


def test_the_real_review_is_kept_and_its_mode_is_not() -> None:
    found = import_monai(shared("workflows/aide-totalsegmentator-review.json").read_text("utf-8"))
    flow = parse_workflow(found.yaml)
    assert flow.task("clinical-review-task").options["of"] == ("totalsegmentator-task",)
    assert flow.task("export-rt-struct").options == {
        "results": ("totalsegmentator-task",),
        "formats": ("dicom_seg", "dicom_sr", "dicom_sc"),
        "destinations": ("PACS",),
        "only_if_accepted": False,
    }
    assert "mode QA" in told(found, "no equivalent")
    assert "to be packaged" in told(found, "changed")
    assert "# no equivalent: task clinical-review-task: mode QA" in found.yaml


def test_the_real_router_takes_the_way_the_series_asks_for() -> None:
    flow = parse_workflow(import_monai(shared("workflows/monai-liver-lung-seg.json").read_text("utf-8")).yaml)
    study, headers = study_of([header(Modality="CT", SeriesDescription="Axial Chest CT COVID-19")])
    taken = {}
    for each in flow.tasks:
        if each.kind == "branch":
            taken[each.id] = choose_case(each.options["cases"], each.options["otherwise"], study, headers, {})[0]
    assert taken == {"router-ailiver": "stay", "router-ailung": "go"}


# made ones ----------------------------------------------------------------------------------------------------------


def test_the_gateway_is_the_trigger_and_the_predicate_the_condition() -> None:
    flow, _ = imported(
        task("a", "docker"),
        informatics_gateway={"ae_title": "AIDE", "data_origins": ["CT1", "CT2"]},
        predicate=["{{ context.dicom.series.all('0008','0060') }} == 'CT'", "{{ context.input.patient_details.age }} >= '018Y'"],
    )
    assert flow.trigger.called_ae == ("AIDE",)
    assert flow.trigger.source == ("CT1", "CT2")
    study, headers = study_of([header(Modality="CT", PatientAge="040Y")])
    assert flow.when is not None
    assert not judge(flow, study, headers).applies  # from another AE
    plain, _ = imported(task("a", "docker"), predicate=["{{ context.input.patient_details.age }} >= '018Y'"])
    assert judge(plain, study, headers).applies
    assert not judge(plain, *study_of([header(Modality="CT", PatientAge="010Y")])).applies


def test_a_condition_on_a_result_waits_for_the_task() -> None:
    flow, _ = imported(
        task(
            "seg",
            "argo",
            args={"workflow_template_name": "seg"},
            task_destinations=to(export=["{{ context.executions.seg.result.vol }} > '10'"]),
        ),
        task("export", "export", export_destinations=[{"name": "PACS"}], artifacts=reads("seg")),
    )
    branch = flow.task("to-export")
    assert branch.after == ("seg",)
    assert flow.task("export").after == ("to-export.go",)
    study, headers = study_of()
    assert choose_case(branch.options["cases"], "stay", study, headers, {"seg": {"vol": 11.0}})[0] == "go"
    assert choose_case(branch.options["cases"], "stay", study, headers, {"seg": {"vol": 9.0}})[0] == "stay"


def test_a_condition_that_cannot_be_said_never_holds() -> None:
    flow, found = imported(
        task("router", "router", task_destinations=to(a=["{{ context.workflow.name }} == 'made'"])),
        task("a", "docker"),
    )
    study, headers = study_of([header(Modality="CT")])
    assert choose_case(flow.task("router").options["cases"], "stay", study, headers, {})[0] == "stay"
    assert "context.workflow.name has no counterpart; it never holds until you write it" in told(found, "no equivalent")


def test_what_lives_on_a_task_without_equivalent_is_left_out() -> None:
    flow, found = imported(
        task("a", "docker", task_destinations=to("remote")),
        task("remote", "remote_app_execution", task_destinations=to("export")),
        task("export", "export", export_destinations=[{"name": "PACS"}], artifacts=reads("remote")),
        task("orphan", "docker"),
    )
    assert [each.id for each in flow.tasks] == ["a"]
    lost = told(found, "no equivalent")
    for name in ("task remote", "task export", "task orphan"):
        assert name in lost


def test_an_algorithm_that_reads_another_ones_output_is_left_out() -> None:
    flow, found = imported(
        task("a", "docker", task_destinations=to("b")),
        task("b", "docker", artifacts=reads("a")),
    )
    assert [each.id for each in flow.tasks] == ["a"]
    assert "it reads what a wrote" in told(found, "no equivalent")


def test_two_ways_to_one_task_meet_in_a_join() -> None:
    flow, _ = imported(
        task("router", "router", task_destinations=to("a", "b")),
        task("a", "docker", task_destinations=to("mail")),
        task("b", "docker", task_destinations=to("mail")),
        task(
            "mail",
            "email",
            description="Done",
            args={"recipient_emails": "a@b.example, c@d.example", "metadata_values": "PatientID"},
        ),
    )
    assert flow.task("mail-join").options["wait_for"] == ("a", "b")
    assert flow.task("mail").after == ("mail-join",)
    assert flow.task("mail").options["to"] == "a@b.example, c@d.example"


def test_a_test_task_is_stepped_over() -> None:
    flow, _ = imported(task("t", "test", task_destinations=to("a")), task("a", "docker"))
    assert [(each.id, each.after) for each in flow.tasks] == [("a", ())]


def test_ids_and_names_are_made_fit() -> None:
    flow, found = imported(
        task("My Task", "docker", args={"container_image": "registry:5000/Team/My_App@sha256:00"}), name="Überwachung 1"
    )
    assert flow.name == "berwachung-1"
    assert [(each.id, each.options["algorithm"]) for each in flow.tasks] == [("my-task", "my-app")]
    assert "is called my-task" in told(found, "changed")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [({"timeout_minutes": 5}, 300), ({"timeout_minutes": -1}, 600), ({"args": {"task_timeout_minutes": "2"}}, 120), ({}, 600)],
)
def test_timeouts(given: dict[str, Any], seconds: float) -> None:
    assert imported(task("a", "docker", **given))[0].task("a").timeout_seconds == seconds


def test_the_revision_wrapper_of_the_manager_is_taken_off() -> None:
    inner = {"name": "w", "tasks": [task("a", "docker")]}
    assert "workflow: w" in import_monai(json.dumps({"revision": 3, "workflow": inner})).yaml


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{\n'a': 1}", "not JSON"),
        ("[]", "not a MONAI Deploy workflow"),
        ('{"tasks": [{"id": "a"}]}', "not a MONAI Deploy workflow"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({"tasks": [task("a", "docker"), task("a", "docker")]}), "must be different"),
        (
            json.dumps(
                {"tasks": [task("a", "docker", task_destinations=to("b")), task("b", "docker", task_destinations=to("a"))]}
            ),
            "circle",
        ),
        (json.dumps({"tasks": [task("a", "export")]}), "cannot be expressed here"),
    ],
)
def test_what_is_no_workflow(text: str, said: str) -> None:
    with pytest.raises(WorkflowInvalid) as raised:
        import_monai(text)
    assert said in str(raised.value)


def test_a_json_error_has_its_line() -> None:
    with pytest.raises(WorkflowInvalid) as raised:
        import_monai('{\n"name": "x",\n"tasks": [,]}')
    assert raised.value.details["line"] == 3


# expressions --------------------------------------------------------------------------------------------------------

ANY = "{{ context.dicom.series.any('0008','103E') }}"


@pytest.mark.parametrize(
    ("expression", "condition"),
    [
        (LUNG, {"any_series": {"SeriesDescription": "Axial Chest CT"}}),
        (f"'x' == {ANY}", {"any_series": {"SeriesDescription": "x"}}),
        (f"{ANY} CONTAINS 'chest'", {"any_series": {"SeriesDescription": {"contains": "chest"}}}),
        (f"{ANY} NOT_CONTAINS 'chest'", {"not": {"any_series": {"SeriesDescription": {"contains": "chest"}}}}),
        (f"{ANY} not contains 'chest'", {"not": {"any_series": {"SeriesDescription": {"contains": "chest"}}}}),
        (f'{ANY} CONTAINS [“a”, "b", c]', {"any_series": {"SeriesDescription": {"in": ["a", "b", "c"]}}}),
        (f"['a'] CONTAINS {ANY}", {"any_series": {"SeriesDescription": {"in": ["a"]}}}),
        (f"{ANY} == NULL", {"any_series": {"SeriesDescription": {"absent": True}}}),
        (f"{ANY} != NULL", {"any_series": {"SeriesDescription": {"present": True}}}),
        (f"{ANY} != 'a'", {"any_series": {"SeriesDescription": {"not_equals": "a"}}}),
        ("{{ context.dicom.series.all('0018','0050') }} <= '5.0'", {"all_series": {"SliceThickness": {"at_most": "5.0"}}}),
        ("'5' > {{ context.dicom.series.any('0018','0050') }}", {"any_series": {"SliceThickness": {"less": "5"}}}),
        ("{{ context.dicom.series.any('0008','0020') }} => '20200101'", {"any_series": {"StudyDate": {"at_least": "20200101"}}}),
        ("{{ context.dicom.series.any('0008','0020') }} > '20200101'", {"any_series": {"StudyDate": {"after": "20200101"}}}),
        ("{{context.input.patient_details.sex}} == 'F'", {"study": {"PatientSex": "F"}}),
        ("{{ context.executions.a.result.k }} == 'true'", {"result": {"task": "a", "k": True}}),
        ("{{ context.executions.a.result['k'] }} =< 3", {"result": {"task": "a", "k": {"at_most": 3.0}}}),
    ],
)
def test_one_comparison(expression: str, condition: dict[str, Any]) -> None:
    found = translate(expression).condition
    if "result" in condition and not isinstance(condition["result"]["k"], dict):
        condition = {"result": {"task": "a", "k": {"equals": condition["result"]["k"]}}}
    assert found == condition


def test_and_or_and_brackets() -> None:
    a, b, c = ({"any_series": {"SeriesDescription": name}} for name in "abc")
    one, two, three = (f"{ANY} == '{name}'" for name in "abc")
    assert translate(f"{one} AND {two} AND {three}").condition == {"all": [a, b, c]}
    assert translate(f"{one} or {two}").condition == {"any": [a, b]}
    assert translate(f"({one} OR {two}) AND {three}").condition == {"all": [{"any": [a, b]}, c]}
    mixed = translate(f"{one} OR {two} AND {three}")
    assert mixed.condition == {"any": [a, {"all": [b, c]}]}
    assert any("AND is taken before OR" in note for note in mixed.notes)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "'the end' stands where a value"),
        ("'a' == 'b'", "two fixed values"),
        (f"{ANY} == {ANY}", "two references"),
        (f"{ANY} > 'a'", "no order"),
        (f"{ANY} > NULL", "NULL cannot be compared"),
        (f"{ANY} ~ 'a'", "cannot be read from"),
        (f"({ANY} == 'a'", "not closed"),
        (f"{ANY} == 'a' 'b'", "something follows"),
        ("{{ context.dicom.series.any('0018','0050') }} CONTAINS '5'", "cannot contain"),
        ("{{ context.input.patient_details.hospital_id }} == '5'", "no counterpart"),
        ("(" * 50 + f"{ANY} == 'a'" + ")" * 50, "too deeply"),
        ("import('os').system('x') == 'a'", "cannot be read from"),
    ],
)
def test_expressions_that_cannot_be_said(expression: str, said: str) -> None:
    with pytest.raises(Untranslatable, match=re.escape(said)):
        translate(expression)


# whatever is thrown at it ---------------------------------------------------------------------------------------------

TOKENS = st.sampled_from(
    [
        ANY,
        "{{ context.executions.a.result.k }}",
        "'a'",
        "5",
        "NULL",
        "==",
        "!=",
        "<",
        "CONTAINS",
        "NOT",
        "AND",
        "OR",
        "(",
        ")",
        "[",
        "]",
        ",",
        "{{",
    ]
)
EXPRESSIONS = st.lists(TOKENS, max_size=10).map(" ".join) | st.text(max_size=30) | st.just(LUNG)
NAMES = st.sampled_from(["a", "b", "A b", "router", "x-y", "-", "1"]) | st.text(max_size=10)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
DESTINATIONS = st.lists(
    st.fixed_dictionaries({"name": NAMES}, optional={"conditions": st.lists(EXPRESSIONS, max_size=2) | JUNK}) | JUNK, max_size=3
)
ARGS = {
    "reviewed_task_id": NAMES,
    "reviewer_roles": st.just("clinician") | JUNK,
    "container_image": NAMES,
    "recipient_emails": NAMES,
    "mode": NAMES,
    "task_timeout_minutes": JUNK,
}
TASK = st.fixed_dictionaries(
    {
        "id": NAMES,
        "type": st.sampled_from(["router", "argo", "docker", "export", "aide_clinical_review", "email", "test", "export_hl7"])
        | st.text(max_size=5),
    },
    optional={
        "description": JUNK,
        "args": st.fixed_dictionaries({}, optional=ARGS) | JUNK,
        "task_destinations": DESTINATIONS | JUNK,
        "export_destinations": DESTINATIONS | JUNK,
        "artifacts": st.lists(NAMES, max_size=2).map(lambda names: reads(*names)) | JUNK,
        "timeout_minutes": JUNK,
    },
)
WORKFLOW = st.fixed_dictionaries(
    {"name": NAMES | JUNK, "tasks": st.lists(TASK, max_size=5, unique_by=lambda each: each["id"].strip())},
    optional={
        "predicate": st.lists(EXPRESSIONS, max_size=2) | JUNK,
        "informatics_gateway": JUNK,
        "version": JUNK,
        "description": JUNK,
    },
)


@settings(max_examples=300, deadline=None)
@given(WORKFLOW | JUNK)
def test_any_json_is_imported_or_a_named_error(source: Any) -> None:
    try:
        found = import_monai(json.dumps(source))
    except WorkflowInvalid:
        return
    assert parse_workflow(found.yaml).tasks
    assert all(line.kind in ("kept", "changed", "no equivalent") for line in found.report)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_any_expression_is_a_condition_or_untranslatable(expression: str) -> None:
    try:
        assert translate(expression).condition
    except Untranslatable as error:
        told_why = str(error)
    else:
        told_why = "translated"
    assert told_why
