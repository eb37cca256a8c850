"""The DIMSE door against PS3.7 and PS3.8, byte by byte: negotiation, refusals, broken peers, time limits."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file

from caregrid.domain.settings import AllowedSender, DimseSettings
from caregrid.domain.study import Incoming, Receipt, Source
from caregrid.errors import MalformedObject, StoreFull
from caregrid.intake.dimse import DimseDoor
from tests.support.scu import CT, IMPLICIT, VERIFICATION, Raw, Scu, associated, command, connected, item, pdu, raw, request, value

LOCAL = DimseSettings(host="127.0.0.1", port=0, idle_seconds=10, artim_seconds=10)
EXPLICIT, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50"
OBJECT = Raw(CT, "1.2.3.4", IMPLICIT, b"not looked at by the door" * 1000)


@dataclass
class Kept:
    """Stands in for the store: what was handed over, and what was rejected."""

    objects: list[tuple[Incoming, bytes]] = field(default_factory=list)
    rejected: list[tuple[Source, str, str]] = field(default_factory=list)
    error: Exception | None = None

    def receive(self, incoming: Incoming) -> Receipt:
        if self.error:
            raise self.error
        self.objects.append((incoming, b"".join(incoming.chunks)))
        return Receipt("stored", incoming.sop_class_uid, incoming.sop_instance_uid, "1.2.3")

    def reject(self, source: Source, what: str, reason: str) -> None:
        self.rejected.append((source, what, reason))


@contextmanager
def door(kept: Kept | None = None, **changes: object) -> Iterator[DimseDoor]:
    kept = kept or Kept()
    opened = DimseDoor(replace(LOCAL, **changes), kept.receive, rejected=kept.reject)  # type: ignore[arg-type]
    opened.start()
    try:
        yield opened
    finally:
        opened.stop(1)


def wait_for(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


# negotiation


def contexts_of(body: bytes) -> dict[int, tuple[int, str]]:
    """Presentation context id → (result, transfer syntax) of an A-ASSOCIATE-AC."""
    return {content[0]: (content[2], content[8:].rstrip(b"\0").decode()) for kind, content in items(body[68:]) if kind == 0x21}


def items(body: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(body):
        kind, _, length = struct.unpack_from(">BBH", body, place)
        yield kind, body[place + 4 : place + 4 + length]
        place += 4 + length


def user_of(body: bytes) -> dict[int, bytes]:
    (user,) = [content for kind, content in items(body[68:]) if kind == 0x50]
    return dict(items(user))


def test_titles_and_limits_are_given_back() -> None:
    with door(max_pdu=65536) as opened, connected(opened.port) as scu:
        kind, body = scu.associate(called="CAREGRID", calling="CT 1")
        assert kind == 2
        assert body[4:36] == b"CAREGRID        CT 1            "
        user = user_of(body)
        assert struct.unpack(">I", user[0x51]) == (65536,)
        assert user[0x52].decode().startswith("2.25.")
        assert next(iter(dict(items(body[68:])))) == 0x10
        assert scu.echo() == 0
        scu.release()
        assert scu.read() == (0, b"")


@pytest.mark.parametrize(
    ("abstract", "syntaxes", "expected"),
    [
        pytest.param(CT, [JPEG, IMPLICIT], (0, JPEG), id="the first offered"),
        pytest.param(CT, [IMPLICIT, JPEG], (0, IMPLICIT), id="the first offered again"),
        pytest.param("1.2.840.10008.5.1.4.1.1.2", ["1.2.3.4.5"], (0, "1.2.3.4.5"), id="a private transfer syntax"),
        pytest.param("1.2.826.0.1.3680043.2.1", [IMPLICIT], (0, IMPLICIT), id="a private class"),
        pytest.param("1.2.840.10008.5.1.4.1.1.999.9", [IMPLICIT], (0, IMPLICIT), id="a class newer than our dictionary"),
        pytest.param("1.2.840.10008.5.1.4.34.7", [IMPLICIT], (0, IMPLICIT), id="RT Beams Delivery Instruction Storage"),
        pytest.param("1.2.840.10008.5.1.4.1.1.88.67", [EXPLICIT], (0, EXPLICIT), id="dose SR"),
        pytest.param("1.2.840.10008.5.1.4.1.2.1.1", [IMPLICIT], (3, IMPLICIT), id="patient root FIND"),
        pytest.param("1.2.840.10008.5.1.4.31", [IMPLICIT], (3, IMPLICIT), id="worklist FIND"),
        pytest.param("1.2.840.10008.1.20.1", [IMPLICIT], (3, IMPLICIT), id="storage commitment"),
        pytest.param("1.2.840.10008.5.1.1.1", [IMPLICIT], (3, IMPLICIT), id="print"),
        pytest.param("1.2.840.10008.1.3.10", [IMPLICIT], (3, IMPLICIT), id="media storage directory"),
        pytest.param("not a UID", [IMPLICIT], (3, IMPLICIT), id="no UID"),
        pytest.param(CT, [], (4, IMPLICIT), id="no transfer syntax"),
    ],
)
def test_presentation_contexts(abstract: str, syntaxes: list[str], expected: tuple[int, str]) -> None:
    with door() as opened, connected(opened.port) as scu:
        kind, body = scu.associate([(1, VERIFICATION, (IMPLICIT,)), (5, abstract, syntaxes)])
        assert kind == 2
        assert contexts_of(body)[1] == (0, IMPLICIT)
        result, syntax = contexts_of(body)[5]
        assert result == expected[0]
        if result == 0:
            assert syntax == expected[1]


def test_all_128_contexts_of_a_scanner_are_answered() -> None:
    contexts = [(number, f"1.2.840.10008.5.1.4.1.1.{number}", [EXPLICIT, IMPLICIT]) for number in range(1, 256, 2)]
    with door() as opened, connected(opened.port) as scu:
        kind, body = scu.associate(contexts)
        assert kind == 2
        assert contexts_of(body).keys() == {each[0] for each in contexts}


def test_asynchronous_operations_are_one_at_a_time() -> None:
    with door() as opened, connected(opened.port) as scu:
        _, body = scu.associate(user=item(0x53, struct.pack(">HH", 0, 8)))
        assert user_of(body)[0x53] == struct.pack(">HH", 1, 1)


def test_we_take_the_storing_role_only() -> None:
    role = struct.pack(">H", len(CT)) + CT.encode()
    with door() as opened, connected(opened.port) as scu:
        _, body = scu.associate(user=item(0x54, role + b"\x01\x01"))
        assert user_of(body)[0x54] == role + b"\x01\x00"


@pytest.mark.parametrize(("wanted", "answered"), [(1, True), (0, False)])
def test_user_identity_is_answered_when_asked(wanted: int, answered: bool) -> None:
    identity = bytes([2, wanted]) + struct.pack(">H", 4) + b"user" + struct.pack(">H", 6) + b"secret"
    with door() as opened, connected(opened.port) as scu:
        kind, body = scu.associate(user=item(0x58, identity))
        assert kind == 2
        assert (user_of(body).get(0x59) == b"\0\0") is answered


def test_extended_negotiation_is_passed_over() -> None:
    extended = struct.pack(">H", len(CT)) + CT.encode() + bytes([2, 0, 0, 0, 0, 0])
    with door() as opened, associated(opened.port, user=item(0x56, extended) + item(0x57, extended) + item(0x77, b"?")) as scu:
        assert scu.echo() == 0


# refusals


@pytest.mark.parametrize(
    ("changes", "codes", "words"),
    [
        pytest.param({"version": 2}, (1, 2, 2), "version", id="protocol version"),
        pytest.param({"application": "1.2.3"}, (1, 1, 2), "application context", id="application context"),
        pytest.param({"called": "OTHER"}, (1, 1, 7), "called AE title", id="called AE title"),
        pytest.param({"calling": "STRANGER"}, (1, 1, 3), "allow-list", id="calling AE title"),
    ],
)
def test_refused_with_the_right_codes_and_made_visible(changes: dict[str, object], codes: tuple[int, ...], words: str) -> None:
    kept = Kept()
    with door(kept, allow=(AllowedSender("CT*", "127.0.0.0/8"),)) as opened, connected(opened.port) as scu:
        kind, body = scu.associate(**({"calling": "CT1"} | changes))
        assert kind == 3
        assert tuple(body[1:]) == codes
        ((source, what, reason),) = kept.rejected
        assert what == "association"
        assert words in reason
        assert (source.protocol, source.address) == ("dimse", "127.0.0.1")
        assert source.calling_ae == changes.get("calling", "CT1")


@pytest.mark.parametrize(
    ("allow", "calling", "welcome"),
    [
        ((), "ANYONE", True),  # nothing listed: this machine only
        ((AllowedSender("*", "10.0.0.0/8"),), "ANYONE", False),  # a list holds for this machine too
        ((AllowedSender("CT1", "127.0.0.1"),), "CT1", True),
        ((AllowedSender("CT1", "127.0.0.1"),), "ct1", False),
        ((AllowedSender("CT1", "127.0.0.2"), AllowedSender("MR?", "127.0.0.0/24")), "MR7", True),
    ],
)
def test_allow_list(allow: tuple[AllowedSender, ...], calling: str, welcome: bool) -> None:
    with door(allow=allow) as opened, connected(opened.port) as scu:
        assert scu.associate(calling=calling)[0] == (2 if welcome else 3)


def test_an_operator_can_let_a_sender_in() -> None:
    kept, let_in = Kept(), {("MR_NEW", "127.0.0.1")}
    opened = DimseDoor(
        replace(LOCAL, allow=(AllowedSender("CT1", "10.1.1.1"),)), kept.receive, lambda ae, ip: (ae, ip) in let_in, kept.reject
    )
    opened.start()
    try:
        with connected(opened.port) as scu:
            assert scu.associate(calling="MR_NEW")[0] == 2
        with connected(opened.port) as scu:
            assert scu.associate(calling="MR_OLD")[0] == 3
    finally:
        opened.stop(1)


def test_several_called_titles() -> None:
    with door(ae_titles=("CAREGRID", "URGENT")) as opened:
        for called, kind in (("CAREGRID", 2), ("URGENT", 2), ("PACS", 3)):
            with connected(opened.port) as scu:
                assert scu.associate(called=called)[0] == kind


def test_association_limit() -> None:
    kept = Kept()
    with door(kept, max_associations=2) as opened:
        with associated(opened.port) as first, associated(opened.port) as second:
            with connected(opened.port) as third:
                kind, body = third.associate()
                assert (kind, tuple(body[1:])) == (3, (2, 3, 2))
            assert first.echo() == second.echo() == 0
            second.release()
            wait_for(lambda: _welcome(opened.port))
        assert kept.rejected[0][2] == "too many associations are open"


def _welcome(port: int) -> bool:
    with connected(port) as scu:
        return scu.associate()[0] == 2


# broken peers

ECHO = value(1, 3, command(0x30))
STORE = value(3, 3, command(1, sop_class=CT.encode(), sop_instance=b"1.2.3.4", data=b"1"))


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", b"", 1, id="another protocol"),
        pytest.param(pdu(4, ECHO), b"", 2, id="data before the request"),
        pytest.param(pdu(1, b"short"), b"", 6, id="a request too short"),
        pytest.param(request().replace(b"R\0\0\x07", b"R\0\0\xff"), b"", 6, id="an item too long"),
        pytest.param(request([(2, CT, (IMPLICIT,))]), b"", 6, id="an even context id"),
        pytest.param(request([(1, CT, (IMPLICIT,)), (1, CT, (IMPLICIT,))]), b"", 6, id="a context id twice"),
        pytest.param(struct.pack(">BBI", 1, 0, 0xFFFFFFFF), b"", 6, id="a request of four gigabytes"),
        pytest.param(request(), pdu(9, b""), 1, id="an unknown PDU"),
        pytest.param(request(), request(), 2, id="a second request"),
        pytest.param(request(), pdu(6, bytes(4)), 2, id="a release response nobody asked for"),
        pytest.param(request(), pdu(4, value(9, 3, command(0x30))), 5, id="a context that was not agreed"),
        pytest.param(request(), pdu(4, struct.pack(">IBB", 5000, 1, 3) + b"xx"), 6, id="a value longer than its PDU"),
        pytest.param(request(), pdu(4, b"\0\0\0"), 6, id="a value cut short"),
        pytest.param(request(), struct.pack(">BBI", 4, 0, 0x7FFFFFFF), 6, id="a PDU longer than agreed"),
        pytest.param(request(), pdu(4, value(3, 2, b"data")), 5, id="a data set without a command"),
        pytest.param(request(), pdu(4, STORE + ECHO), 5, id="a command inside a data set"),
        pytest.param(request(), pdu(4, STORE + value(1, 2, b"data")), 5, id="a data set in another context"),
        pytest.param(request(), pdu(4, value(1, 3, b"\x01\x02")), 6, id="a command cut short"),
        pytest.param(request(), pdu(4, value(1, 3, struct.pack("<HHI", 0, 0, 999))), 6, id="a command element too long"),
        pytest.param(request(), pdu(4, value(1, 3, command(0x8030))), 5, id="a response nobody waits for"),
    ],
)
def test_a_broken_peer_is_told_why_and_others_go_on(first: bytes, then: bytes, reason: int) -> None:
    kept = Kept()
    with door(kept) as opened, associated(opened.port, calling="OTHER") as other:
        with connected(opened.port) as scu:
            scu.send(first)
            if then:
                assert scu.read()[0] == 2
                scu.send(then)
            kind, body = scu.read()
            assert kind == 7
            assert (body[2], body[3]) == (2, reason)
            assert scu.read() == (0, b"")
        assert other.echo() == 0
        assert [what for _, what, _ in kept.rejected] == ["association aborted"]
        assert not kept.objects


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_never_takes_the_door_down(shared_door: tuple[DimseDoor, Kept], data: st.DataObject) -> None:
    opened, kept = shared_door
    good = request() + pdu(4, ECHO) + pdu(4, STORE) + pdu(4, value(3, 0, b"abc")) + pdu(4, value(3, 2, b"def")) + pdu(5, bytes(4))
    broken = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(broken)))
    with connected(opened.port) as scu:
        scu.send(bytes(broken[:cut]))
        scu.peer.shutdown(1)
        while scu.read()[0]:
            pass
    for _, content in kept.objects:
        assert len(content) <= 6
    kept.objects.clear()
    with associated(opened.port) as scu:
        assert scu.echo() == 0


@pytest.fixture(scope="module")
def shared_door() -> Iterator[tuple[DimseDoor, Kept]]:
    kept = Kept()
    with door(kept, artim_seconds=3, idle_seconds=3) as opened:
        yield opened, kept


# commands


def test_unknown_commands_are_answered_and_the_association_lives_on() -> None:
    kept = Kept()
    with door(kept) as opened, associated(opened.port) as scu:
        scu.send(pdu(4, value(1, 3, command(0x0150, 5))))
        answer = scu.answer()
        assert (answer[0x0100], answer[0x0120], answer[0x0900]) == (0x8150, 5, 0x0211)
        scu.send(pdu(4, value(3, 3, command(0x0020, 6, data=b"1"))) + pdu(4, value(3, 2, b"identifier")))
        answer = scu.answer()
        assert (answer[0x0100], answer[0x0120], answer[0x0900]) == (0x8020, 6, 0x0211)
        scu.send(pdu(4, value(1, 3, command(0x0FFF))))  # C-CANCEL: nothing to cancel, no answer
        assert scu.echo() == 0
        assert scu.store(OBJECT) == 0
        assert [content for _, content in kept.objects] == [OBJECT.content]


def test_c_store_where_only_echo_was_agreed() -> None:
    kept = Kept()
    with door(kept) as opened, associated(opened.port) as scu:
        assert scu.store(OBJECT, context=1) == 0x0122
        assert scu.echo() == 0
        assert not kept.objects


def test_c_store_without_a_data_set() -> None:
    with door() as opened, associated(opened.port) as scu:
        scu.send(pdu(4, value(3, 3, command(1, sop_class=CT.encode(), sop_instance=b"1.2.3"))))
        assert scu.answer()[0x0900] == 0x0212
        assert scu.echo() == 0


@pytest.mark.parametrize("fragment", [1, 1000, 4096 - 12, 200_000])
def test_fragments_of_any_size(fragment: int) -> None:
    kept = Kept()
    sent = replace(OBJECT, content=OBJECT.content[: 2000 if fragment == 1 else None])
    with door(kept) as opened, associated(opened.port) as scu:
        assert scu.store(sent, fragment=fragment) == 0
        ((incoming, content),) = kept.objects
        assert content == sent.content
        assert incoming.source == Source("dimse", "SCU", "CAREGRID", "127.0.0.1")
        assert (incoming.sop_class_uid, incoming.sop_instance_uid, incoming.transfer_syntax_uid) == (CT, "1.2.3.4", IMPLICIT)


def test_values_may_share_a_pdu_and_be_split_over_packets() -> None:
    kept = Kept()
    asked = command(1, sop_class=CT.encode(), sop_instance=b"1.2.3.4", data=b"1")
    body = value(3, 1, asked[:20]) + value(3, 3, asked[20:]) + value(3, 0, b"abc") + value(3, 0, b"") + value(3, 2, b"def")
    with door(kept) as opened, associated(opened.port) as scu:
        for byte in pdu(4, body):
            scu.send(bytes([byte]))
        assert scu.answer()[0x0900] == 0
        scu.send(pdu(4, STORE + value(3, 0, b"ghi")) + pdu(4, value(3, 2, b"")))
        assert scu.answer()[0x0900] == 0
        assert [content for _, content in kept.objects] == [b"abcdef", b"ghi"]


@pytest.mark.parametrize(
    ("error", "status"), [(MalformedObject(reason="test"), 0xC000), (StoreFull(), 0xA700), (RuntimeError("disk gone"), 0x0110)]
)
def test_what_is_not_kept_is_not_acknowledged(error: Exception, status: int) -> None:
    kept = Kept(error=error)
    with door(kept) as opened, associated(opened.port) as scu:
        assert scu.store(OBJECT) == status
        kept.error = None
        assert scu.store(OBJECT) == 0


def test_nothing_is_said_before_the_object_is_kept() -> None:
    go_on, entered = threading.Event(), threading.Event()

    def slowly(incoming: Incoming) -> Receipt:
        entered.set()
        assert go_on.wait(10)
        return Receipt("stored", "", "", "")

    opened = DimseDoor(LOCAL, slowly)
    opened.start()
    try:
        with associated(opened.port) as scu:
            scu.send(pdu(4, STORE) + pdu(4, value(3, 2, b"abc")))
            assert entered.wait(5)
            scu.peer.settimeout(0.3)
            with pytest.raises(TimeoutError):
                scu.read()
            go_on.set()
            scu.peer.settimeout(5)
            assert scu.answer()[0x0900] == 0
    finally:
        opened.stop(1)


def test_an_object_over_the_limit_is_refused_and_the_next_is_taken() -> None:
    kept = Kept()
    with door(kept, max_object_bytes=100_000) as opened, associated(opened.port) as scu:
        assert scu.store(replace(OBJECT, content=bytes(300_000))) == 0xC000
        assert scu.store(replace(OBJECT, content=bytes(100_000))) == 0
        assert [len(content) for _, content in kept.objects] == [100_000]
        assert any("larger" in reason for _, _, reason in kept.rejected)


def test_a_large_object_arrives_whole() -> None:
    kept = Kept()
    content = bytes(range(256)) * (70 << 12)  # 70 MiB: more than is held in memory
    with door(kept) as opened, associated(opened.port) as scu:
        assert scu.store(replace(OBJECT, content=content), fragment=200_000) == 0
        assert kept.objects.pop()[1] == content
        assert scu.store(OBJECT) == 0
        assert kept.objects.pop()[1] == OBJECT.content


# time


def test_who_says_nothing_is_let_go() -> None:
    with door(artim_seconds=0.5) as opened, connected(opened.port) as scu:
        started = time.monotonic()
        assert scu.read() == (0, b"")
        assert 0.3 < time.monotonic() - started < 5


def test_a_request_that_trickles_in_is_let_go() -> None:
    with door(artim_seconds=1) as opened, connected(opened.port) as scu:
        started = time.monotonic()
        with pytest.raises(OSError):
            for byte in request():
                scu.send(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - started < 8


def test_silence_in_an_association_ends_it() -> None:
    kept = Kept()
    with door(kept, idle_seconds=0.5) as opened, associated(opened.port) as scu:
        assert scu.echo() == 0
        kind, body = scu.read()
        assert (kind, body[2]) == (7, 0)
        assert scu.read() == (0, b"")
        assert kept.rejected[0][1:] == ("association aborted", "nothing was heard for too long")


def test_silence_in_the_middle_of_an_object_leaves_nothing() -> None:
    kept = Kept()
    with door(kept, idle_seconds=0.5) as opened, associated(opened.port) as scu:
        scu.send(pdu(4, STORE) + pdu(4, value(3, 0, b"half")))
        assert scu.read()[0] == 7
        assert not kept.objects


def test_a_lost_connection_leaves_nothing() -> None:
    kept = Kept()
    with door(kept) as opened:
        with associated(opened.port) as scu:
            scu.send(pdu(4, STORE) + pdu(4, value(3, 0, b"half")))
        with associated(opened.port) as scu:
            assert scu.store(OBJECT) == 0
        assert [content for _, content in kept.objects] == [OBJECT.content]


def test_closing_time() -> None:
    kept = Kept()
    opened = DimseDoor(LOCAL, kept.receive, rejected=kept.reject)
    opened.start()
    with associated(opened.port) as idle, associated(opened.port) as busy:
        assert idle.echo() == busy.echo() == 0
        busy.send(pdu(4, STORE) + pdu(4, value(3, 0, b"under ")))
        time.sleep(0.2)
        closing = threading.Thread(target=opened.stop, args=(5.0,))
        closing.start()
        time.sleep(0.3)
        busy.send(pdu(4, value(3, 2, b"way")))
        assert busy.answer()[0x0900] == 0
        closing.join(10)
        assert not closing.is_alive()
        assert idle.read()[0] in (0, 7)
    assert [content for _, content in kept.objects] == [b"under way"]
    with pytest.raises(ConnectionRefusedError):
        Scu(opened.port)


def test_a_real_slice_is_handed_over_as_it_is() -> None:
    kept, slice_ = Kept(), raw(Path(str(get_testdata_file("CT_small.dcm"))))
    with door(kept) as opened, associated(opened.port, [(3, slice_.sop_class, (slice_.transfer_syntax,))]) as scu:
        assert scu.store(slice_) == 0
        assert kept.objects[0][1] == slice_.content
