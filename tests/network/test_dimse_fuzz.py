"""Nothing a peer sends brings the DIMSE door down, leaves a thread behind, or is taken for an object it is not."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caregrid.intake.dimse import DimseDoor
from tests.support.doors import (
    LOCAL,
    Receiver,
    association_request,
    connected,
    data_value,
    dimse,
    pdu,
    read_pdu,
    store_request,
    threads_of_the_door,
)
from tests.support.scanner import Scanner, new_study
from tests.support.site import wait_for

pytestmark = pytest.mark.network

CT = "1.2.840.10008.5.1.4.1.1.2"
HONEST = [
    association_request(),
    store_request(CT, "1.2.3.4"),
    data_value(b"\x08\0\x18\0\x08\0\0\x001.2.3.4\0", 2),
    pdu(5, bytes(4)),
]


@pytest.fixture(scope="module")
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture(scope="module")
def door(receiver: Receiver) -> Iterator[DimseDoor]:
    with dimse(receiver) as opened:
        yield opened
        assert Scanner(opened.port).send(new_study(1)) == [0], "the door still serves an honest sender"
        wait_for(lambda: threads_of_the_door() == 0, 10, "every thread gone")


def hang_up(door: DimseDoor, *messages: bytes) -> None:
    """Send, and read until the door closes or falls silent."""
    with connected(door.port) as peer:
        try:
            for each in messages:
                peer.sendall(each)
            peer.shutdown(1)
            while read_pdu(peer)[0]:
                pass
        except OSError:
            return


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(content=st.binary(max_size=300))
def test_random_bytes(door: DimseDoor, content: bytes) -> None:
    hang_up(door, content)


@FUZZ
@given(kind=st.integers(0, 9), body=st.binary(max_size=200), after=st.booleans())
def test_any_pdu_with_any_body(door: DimseDoor, kind: int, body: bytes, after: bool) -> None:
    hang_up(door, *([association_request()] if after else []), pdu(kind, body), pdu(5, bytes(4)))


@FUZZ
@given(flags=st.integers(0, 255), context=st.integers(0, 255), data=st.binary(max_size=100))
def test_any_presentation_data_value(door: DimseDoor, flags: int, context: int, data: bytes) -> None:
    hang_up(door, association_request(), data_value(data, flags, context), data_value(data, flags ^ 1, context), HONEST[3])


@FUZZ
@given(seed=st.integers(0, 1 << 30), changes=st.integers(1, 12))
def test_an_honest_conversation_with_bytes_changed_lost_or_doubled(door: DimseDoor, seed: int, changes: int) -> None:
    rng = random.Random(seed)
    talk = bytearray(b"".join(HONEST))
    for _ in range(changes):
        place = rng.randrange(len(talk))
        match rng.randrange(4):
            case 0:
                talk[place] = rng.randrange(256)
            case 1:
                del talk[place : place + rng.randrange(1, 40)]
            case 2:
                talk[place:place] = talk[place : place + rng.randrange(1, 40)]
            case _:
                talk[place : place + 4] = struct.pack(">I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF]))
    hang_up(door, bytes(talk))


@FUZZ
@given(elements=st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=20)), max_size=12))
def test_any_command_set(door: DimseDoor, elements: list[tuple[int, int, bytes]]) -> None:
    body = b"".join(struct.pack("<HHI", group, number, len(value)) + value for group, number, value in elements)
    hang_up(door, association_request(), data_value(body, 3), data_value(b"ab", 2), HONEST[3])


def test_settings_of_these_tests_are_the_usual_ones(door: DimseDoor) -> None:
    assert door.settings is LOCAL
