"""The outbox: claimed, sent, retried with back-off, parked, resent; a dead carrier's claims come free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from caregrid.domain.settings import Destination
from caregrid.engine.outbox import Courier, backoff_seconds, put, resend
from caregrid.errors import DeliveryFailed, NotFound, TransitionRefused
from caregrid.store.database import reading, writing
from caregrid.store.studies import run_row
from caregrid.store.tables import delivery
from tests.support.rows import ago, deliveries, put_result, put_run, put_study, state_of

PACS = Destination(name="PACS", kind="cstore", first_backoff_seconds=60, give_up_seconds=3600)


@dataclass
class Answer:
    sop_instance_uid: str
    accepted: bool = True
    status: str = "0000"
    transient: bool = False


class Receiver:
    """Stands where results/cstore.py's send stands; keeps what it was given."""

    def __init__(self, *scripted: object) -> None:
        self.scripted, self.got = list(scripted), []

    def __call__(self, destination: Destination, paths: Sequence[Path]) -> list[Answer]:
        self.got.append([path.stem for path in paths])
        step = self.scripted.pop(0) if self.scripted else "ok"
        if isinstance(step, Exception):
            raise step
        if isinstance(step, dict):
            return [Answer(path.stem, **step) for path in paths]
        return [Answer(path.stem) for path in paths]


@pytest.fixture
def run_id(db: sa.Engine) -> str:
    put_study(db, "1.2.3", state="processing")
    key = put_run(db, "1.2.3", "w", state="delivering")
    put_result(db, key, "1.2.3", "1.5", "1.5.dcm")
    with writing(db) as connection:
        put(connection, run_row(connection, key), "1.5", "PACS")
    return key


def courier(db: sa.Engine, receiver: Receiver, owner: str = "me", destination: Destination = PACS) -> Courier:
    return Courier(db, Path("/store"), destination, receiver, owner)


def test_delivered_settles_run_and_study(db: sa.Engine, run_id: str) -> None:
    assert courier(db, Receiver()).tick() == 1
    (row,) = deliveries(db)
    assert (row["state"], row["receiver_said"], row["attempts"]) == ("delivered", "0000", 1)
    assert state_of(db, "1.2.3") == "done"
    assert courier(db, Receiver()).tick() == 0


def test_same_object_is_put_once(db: sa.Engine, run_id: str) -> None:
    with writing(db) as connection:
        assert not put(connection, run_row(connection, run_id), "1.5", "PACS")
    assert len(deliveries(db)) == 1


def test_unreachable_waits_with_backoff_and_the_run_stays_on_its_way(db: sa.Engine, run_id: str) -> None:
    receiver = Receiver(DeliveryFailed(destination="PACS", reason="connection refused"))
    carrier = courier(db, receiver)
    assert carrier.tick() == 0
    (row,) = deliveries(db)
    assert row["state"] == "pending"
    assert "connection refused" in row["last_error"]
    assert carrier.tick() == 0
    assert len(receiver.got) == 1, "not tried again before it is due"
    with writing(db) as connection:
        connection.execute(delivery.update().values(next_attempt_at=ago(1)))
    assert carrier.tick() == 1
    assert receiver.got[0] == receiver.got[1] == ["1.5"]
    assert state_of(db, "1.2.3") == "done"


def test_refusal_parks_and_resend_sends_the_same_object(db: sa.Engine, run_id: str) -> None:
    receiver = Receiver({"accepted": False, "status": "0122"})
    carrier = courier(db, receiver)
    carrier.tick()
    (row,) = deliveries(db)
    assert (row["state"], row["last_error"]) == ("parked", "refused: 0122")
    assert state_of(db, "1.2.3") == "failed"
    resend(db, row["id"], "ann", "the PACS was mended")
    assert carrier.tick() == 1
    assert receiver.got == [["1.5"], ["1.5"]]
    assert state_of(db, "1.2.3") == "done"


def test_out_of_resources_is_tried_again(db: sa.Engine, run_id: str) -> None:
    courier(db, Receiver({"accepted": False, "status": "A700", "transient": True})).tick()
    assert deliveries(db)[0]["state"] == "pending"


def test_given_up_after_its_time(db: sa.Engine, run_id: str) -> None:
    with writing(db) as connection:
        connection.execute(delivery.update().values(created_at=ago(3601)))
    courier(db, Receiver(DeliveryFailed(destination="PACS", reason="away"))).tick()
    (row,) = deliveries(db)
    assert row["state"] == "parked"
    assert "given up after 3600 s" in row["last_error"]


def test_object_without_an_answer_is_not_called_delivered(db: sa.Engine, run_id: str) -> None:
    carrier = courier(db, Receiver())
    carrier.send = lambda _destination, _paths: []  # type: ignore[method-assign]
    assert carrier.tick() == 0
    assert deliveries(db)[0]["state"] == "pending"


def test_live_lease_is_respected_and_a_dead_one_comes_free(db: sa.Engine, run_id: str) -> None:
    assert courier(db, Receiver(), "dead")._claim()
    other = courier(db, Receiver(), "alive")
    assert other.tick() == 0
    with writing(db) as connection:
        connection.execute(delivery.update().values(lease_until=ago(1)))
    assert other.tick() == 1


def test_answer_of_one_that_lost_its_lease_is_ignored(db: sa.Engine, run_id: str) -> None:
    slow = courier(db, Receiver(), "slow")
    claimed = slow._claim()
    with writing(db) as connection:
        connection.execute(delivery.update().values(lease_until=ago(1)))
    other = courier(db, Receiver({"accepted": False, "status": "A700", "transient": True}), "other")
    other.tick()
    assert slow._record(claimed, {"1.5": Answer("1.5")}) == []
    assert deliveries(db)[0]["state"] == "pending"


def test_backoff_doubles_and_is_capped() -> None:
    pauses = [backoff_seconds(PACS, attempts) for attempts in (1, 2, 3, 30)]
    assert 54 <= pauses[0] <= 66
    assert 108 <= pauses[1] <= 132
    assert 216 <= pauses[2] <= 264
    assert 3240 <= pauses[3] <= 3960


def test_resend_of_nothing_and_of_what_is_under_way_is_refused(db: sa.Engine, run_id: str) -> None:
    with pytest.raises(NotFound):
        resend(db, 999, "ann", "?")
    with pytest.raises(TransitionRefused):
        resend(db, deliveries(db)[0]["id"], "ann", "?")


def test_urgent_results_go_first(db: sa.Engine, run_id: str) -> None:
    put_study(db, "1.2.4", state="processing")
    urgent = put_run(db, "1.2.4", "w", state="delivering", priority="emergency")
    put_result(db, urgent, "1.2.4", "1.6", "1.6.dcm")
    with writing(db) as connection:
        put(connection, run_row(connection, urgent), "1.6", "PACS")
    receiver = Receiver()
    courier(db, receiver).tick()
    assert receiver.got == [["1.6", "1.5"]]
    with reading(db) as connection:
        assert connection.scalar(sa.text("select count(*) from audit where what = 'result delivered'")) == 2
