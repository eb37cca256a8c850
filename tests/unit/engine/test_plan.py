"""Which task may go."""

from __future__ import annotations

from caregrid.domain.workflow import Task, Trigger, Workflow
from caregrid.engine.plan import TaskStand, outcome, readiness


def stand(state: str, **output: object) -> TaskStand:
    return TaskStand(state, dict(output))


def test_task_without_needs_is_ready() -> None:
    assert readiness(Task("a", "run"), {}).action == "ready"


def test_waits_for_what_has_not_ended() -> None:
    assert readiness(Task("b", "run", after=("a",)), {"a": stand("running")}).action == "blocked"


def test_failed_need_skips() -> None:
    answer = readiness(Task("b", "run", after=("a",)), {"a": stand("failed")})
    assert (answer.action, answer.reason) == ("skip", "a was failed")


def test_case_not_taken_skips_and_taken_goes() -> None:
    stands = {"size": stand("done", case="small")}
    assert readiness(Task("b", "run", after=("size.small",)), stands).action == "ready"
    assert readiness(Task("b", "run", after=("size.usual",)), stands).action == "skip"


def test_rejected_review_skips_what_follows_but_not_its_own_case() -> None:
    stands = {"look": stand("done", decision="rejected")}
    assert readiness(Task("b", "deliver", after=("look",)), stands).action == "skip"
    assert readiness(Task("b", "notify", after=("look.rejected",)), stands).action == "ready"


def test_join_goes_on_with_one_done_and_waits_for_all() -> None:
    join = Task("j", "join", options={"wait_for": ("a", "b")})
    assert readiness(join, {"a": stand("done"), "b": stand("running")}).action == "blocked"
    assert readiness(join, {"a": stand("done"), "b": stand("skipped")}).action == "ready"
    assert readiness(join, {"a": stand("failed"), "b": stand("skipped")}).action == "skip"


def flow(*tasks: Task) -> Workflow:
    return Workflow("w", "", "", "routine", Trigger(), None, tasks, "r", "")


def test_outcome_prefers_failure_then_review_then_done() -> None:
    run, look = Task("run", "run"), Task("look", "review")
    assert outcome(flow(run, look), {"run": stand("failed"), "look": stand("running")})[0] == "failed"
    assert outcome(flow(run, look), {"run": stand("done"), "look": stand("running")})[0] == "awaiting-review"
    assert outcome(flow(run, look), {"run": stand("done"), "look": stand("done")})[0] == "done"


def test_failure_that_may_be_passed_over_does_not_fail_the_run() -> None:
    assert outcome(flow(Task("run", "run", on_error="continue")), {"run": stand("failed")})[0] == "done"
