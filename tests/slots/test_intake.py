"""The promise of the intake slot, run on every plug: each payload once; none lost; none acknowledged that was not kept."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from caregrid.errors import MalformedObject, StoreFull
from caregrid.plugs import load, names
from tests.support.doors import SENDERS, Receiver, uid_of
from tests.support.scanner import new_study

PLUGS = names("intake")


def pixels(receiver: Receiver, uid: str) -> bytes:
    (incoming,) = [each for each in receiver.kept if uid_of(each) == uid]
    content = BytesIO(b"".join(incoming.chunks))
    if incoming.part10:
        return bytes(pydicom.dcmread(content).PixelData)
    implicit = incoming.transfer_syntax_uid == "1.2.840.10008.1.2"
    return bytes(pydicom.filereader.read_dataset(content, implicit, True).PixelData)


@pytest.mark.parametrize("plug", PLUGS)
def test_every_plug_has_a_sender_and_explains_itself(plug: str) -> None:
    assert plug in SENDERS, f"add a sender for {plug} to tests/support/doors.py"
    assert load("intake", plug).__doc__


@pytest.mark.parametrize("plug", PLUGS)
def test_each_payload_is_handed_over_once_and_whole(plug: str, tmp_path: Path) -> None:
    receiver, study = Receiver(), new_study(5)
    assert SENDERS[plug](receiver, study, tmp_path) == [True] * 5
    assert sorted(map(uid_of, receiver.kept)) == sorted(str(each.SOPInstanceUID) for each in study)
    for each in study:
        assert pixels(receiver, str(each.SOPInstanceUID)) == each.PixelData
    assert {each.source.protocol for each in receiver.kept} == {plug}


@pytest.mark.parametrize("plug", PLUGS)
@pytest.mark.parametrize("error", [MalformedObject(reason="test"), StoreFull(), RuntimeError("the disk is gone")], ids=repr)
def test_nothing_is_acknowledged_that_was_not_kept(plug: str, error: Exception, tmp_path: Path) -> None:
    study = new_study(4)
    bad = str(study[1].SOPInstanceUID)
    receiver = Receiver(failing=lambda incoming: error if uid_of(incoming) == bad else None)
    told = SENDERS[plug](receiver, study, tmp_path)
    kept = set(map(uid_of, receiver.kept))
    assert bad not in kept
    for each, acknowledged in zip(study, told, strict=True):
        assert not acknowledged or str(each.SOPInstanceUID) in kept
    assert told[1] is False
