"""The streaming multipart reader: the same parts come out whatever way the body is cut, and broken bodies are named."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caregrid.errors import BodyBroken
from caregrid.intake import _dicomweb_multipart as multipart
from tests.support.dicomweb import body

BOUNDARIES = st.from_regex(r"[A-Za-z0-9'()+_,./:=?-]{1,70}", fullmatch=True)

#: Content that looks like what the reader searches for.
NASTY = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"\r\n", b"--", b"\r\n--", b"\r", b"\n", b"--B", b"\r\n--B", b"\r\n--B-", b"DICM"]),
    ),
    max_size=12,
).map(b"".join)


async def _stream(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def read(chunks: Sequence[bytes], boundary: str, folder: Path, cap: int = 1 << 30) -> list[tuple[dict[str, str], bytes, str]]:
    """Headers, content and trouble of every part."""

    async def run() -> list[tuple[dict[str, str], bytes, str]]:
        found = []
        async for part in multipart.read_parts(_stream(chunks), boundary, folder, cap):
            content = b"".join(bytes(chunk) for chunk in part.chunks())
            with part.open() as file:
                assert file.read() == content
            found.append((part.headers, content, part.trouble))
            part.close()
        return found

    return asyncio.run(run())


def cut(whole: bytes, places: Sequence[int]) -> list[bytes]:
    """``whole`` cut at the places (taken modulo its length)."""
    at = sorted({place % (len(whole) + 1) for place in places} | {0, len(whole)})
    return [whole[first:last] for first, last in itertools.pairwise(at)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(NASTY, min_size=1, max_size=4), boundary=BOUNDARIES, places=st.lists(st.integers(0, 5000), max_size=30))
def test_parts_come_out_as_they_went_in_however_the_body_is_cut(
    parts: list[bytes], boundary: str, places: list[int], tmp_path: Path
) -> None:
    if any(f"\r\n--{boundary}".encode() in b"\r\n" + part + b"\r\n" for part in parts):
        return  # RFC 2046: a boundary may not occur in what it separates
    found = read(cut(body(parts, boundary), places), boundary, tmp_path)
    assert [content for _, content, _ in found] == parts
    assert all(headers == {"content-type": "application/dicom"} for headers, _, _ in found)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=st.one_of(st.binary(max_size=300), NASTY), places=st.lists(st.integers(0, 300), max_size=5))
def test_any_bytes_are_parts_or_a_named_error(whole: bytes, places: list[int], tmp_path: Path) -> None:
    with_start = b"--B\r\n" + whole
    for candidate in (whole, with_start, with_start + b"\r\n--B--"):
        try:
            read(cut(candidate, places), "B", tmp_path)
        except BodyBroken:
            continue


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.binary(max_size=60), min_size=1, max_size=3), lost=st.integers(3, 400))
def test_a_body_cut_short_is_named(parts: list[bytes], lost: int, tmp_path: Path) -> None:
    whole = body(parts)
    # The last two bytes are the line end after the closing boundary, which may be missing.
    with pytest.raises(BodyBroken):
        read([whole[: max(0, len(whole) - lost)]], "a-boundary-of-ours", tmp_path)


@pytest.mark.parametrize("size", [multipart.IN_MEMORY - 1, multipart.IN_MEMORY, multipart.IN_MEMORY + 1, 3 * multipart.IN_MEMORY])
def test_a_big_part_goes_on_in_a_file_that_nobody_can_see(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    whole = body([content, b"small"])
    chunks = [whole[first : first + 65536] for first in range(0, len(whole), 65536)]
    found = read(chunks, "a-boundary-of-ours", tmp_path)
    assert [part[1] for part in found] == [content, b"small"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_held_in_memory_is_bounded(tmp_path: Path) -> None:
    """A part of 96 MiB never costs more than the bound, however long it goes on."""
    import tracemalloc

    block = b"z" * (1 << 20)

    async def run() -> int:
        async def stream() -> AsyncIterator[bytes]:
            yield b"--B\r\n\r\n"
            for _ in range(96):
                yield block
            yield b"\r\n--B--\r\n"

        async for part in multipart.read_parts(stream(), "B", tmp_path, 1 << 30):
            size = part.size
            part.close()
        return size

    tracemalloc.start()
    try:
        assert asyncio.run(run()) == 96 << 20
        assert tracemalloc.get_traced_memory()[1] < multipart.IN_MEMORY * 2 + (8 << 20)
    finally:
        tracemalloc.stop()


def test_a_part_above_the_cap_is_dropped_and_the_next_is_read(tmp_path: Path) -> None:
    found = read([body([b"a" * 100, b"b" * 10])], "a-boundary-of-ours", tmp_path, cap=50)
    assert [(content, trouble) for _, content, trouble in found] == [(b"", "too-large"), (b"b" * 10, "")]


def test_too_many_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "MAX_PARTS", 3)
    with pytest.raises(BodyBroken, match="3 parts"):
        read([body([b"x"] * 4)], "a-boundary-of-ours", tmp_path)


@pytest.mark.parametrize(
    ("value", "boundary"),
    [
        ("multipart/related; boundary=abc", "abc"),
        ('multipart/related; type="application/dicom"; boundary="a b=c"', "a b=c"),
        ("Multipart/Related;boundary=ABC;type=application/dicom", "ABC"),
        ('multipart/related; boundary="----=_Part_3;x"; type="application/dicom"', "----=_Part_3;x"),
    ],
)
def test_boundaries_are_read_quoted_or_not(value: str, boundary: str) -> None:
    media, options = multipart.boundary_of(value)
    assert media == "multipart/related"
    assert options["boundary"] == boundary


def test_what_we_send_reads_back(tmp_path: Path) -> None:
    parts = [("application/dicom", "", [b"one", b"two"]), ("image/jpeg", "http://x/y", [b"\r\n--"])]
    sent = b"".join(multipart.encode("B", ((kind, where, iter(content)) for kind, where, content in parts)))
    found = read([sent], "B", tmp_path)
    assert [content for _, content, _ in found] == [b"onetwo", b"\r\n--"]
    assert found[1][0] == {"content-type": "image/jpeg", "content-location": "http://x/y"}
    assert re.match(rb"--B\r\n", sent)
