"""Multipart bodies as they stream in and out (RFC 2046, PS3.18 8.6). The grammar is python-multipart's; here a part is kept.

A part stays in memory up to IN_MEMORY bytes and goes on in an unnamed file after that, so that a request never holds more
than one instance, nor more than a little of it.
"""

from __future__ import annotations

import io
import mmap
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO

from fastapi.concurrency import run_in_threadpool
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from caregrid.errors import BodyBroken

#: Bytes of one part kept in memory before the rest goes to a file.
IN_MEMORY = 8 << 20
MAX_PARTS = 10_000


class Part:
    """One part: headers (names lower case) and the content, until ``close``.

    trouble: "" while whole; ``too-large`` when the cap was passed, ``no-space`` when the disk was full (content is dropped then).
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.headers: dict[str, str] = {}
        self.trouble = ""
        self.size = 0
        self._folder = folder
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None

    @property
    def on_disk(self) -> bool:
        """Whether writing touches the disk."""
        return self._file is not None

    def write(self, data: bytes) -> None:
        """Add data; never raises for a part that is too large or a disk that is full (see ``trouble``)."""
        if self.trouble:
            return
        self.size += len(data)
        if self.size > self._max_bytes:
            self._drop("too-large")
        elif self.size <= IN_MEMORY:
            self._pieces.append(data)
        else:
            self._write_file(data)

    def _write_file(self, data: bytes) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed with the part
                for piece in self._pieces:
                    _write_all(self._file, piece)
                self._pieces = []
            _write_all(self._file, data)
        except OSError:
            self._drop("no-space")

    def _drop(self, trouble: str) -> None:
        self.close()
        self.trouble = trouble

    def chunks(self) -> list[bytes | bytearray | memoryview]:
        """The content in order; valid until ``close``."""
        if self._file is None:
            self._pieces = [b"".join(self._pieces)]
            return list(self._pieces)
        self._map = self._map or mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return [memoryview(self._map)]

    def open(self) -> IO[bytes]:
        """The content as a file to read, from its start; the caller closes it."""
        if self._file is None:
            return io.BytesIO(b"".join(self._pieces))
        file = os.fdopen(os.dup(self._file.fileno()), "rb")
        file.seek(0)
        return file

    def close(self) -> None:
        """Let memory and file go."""
        self._pieces = []
        # A view handed out may still be alive in a traceback; the map then goes with it.
        self._map = None
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class _Collector:
    """Parser callbacks that fill parts; finished ones wait in ``finished``."""

    def __init__(self, folder: Path, max_part_bytes: int) -> None:
        self._folder, self._max = folder, max_part_bytes
        self.current: Part | None = None
        self.finished: list[Part] = []
        self.ended = False
        self._name = self._value = b""

    def on_part_begin(self) -> None:
        self.current = Part(self._folder, self._max)

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        assert self.current is not None
        self.current.headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1").strip()
        self._name = self._value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self.current is not None
        self.current.write(data[start:end])

    def on_part_end(self) -> None:
        assert self.current is not None
        self.finished.append(self.current)
        self.current = None

    def on_end(self) -> None:
        self.ended = True

    def take(self) -> list[Part]:
        taken, self.finished = self.finished, []
        return taken

    def close(self) -> None:
        for part in [*self.finished, *([self.current] if self.current else [])]:
            part.close()


def boundary_of(content_type: str) -> tuple[str, dict[str, str]]:
    """The media type, lower case, and the parameters of a Content-Type value, quoted or not."""
    media, options = parse_options_header(content_type)
    return media.decode("latin-1"), {key.decode("latin-1"): value.decode("latin-1") for key, value in options.items()}


async def read_parts(stream: AsyncIterator[bytes], boundary: str, folder: Path, max_part_bytes: int) -> AsyncIterator[Part]:
    """The parts of a multipart body, each as soon as it is whole; the caller closes them.

    Raises BodyBroken where the body stops being well-formed, and when it ends before its closing boundary.
    """
    collector = _Collector(folder, max_part_bytes)
    names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
    count = 0
    try:
        parser = MultipartParser(boundary.encode("latin-1"), {f"on_{name}": getattr(collector, f"on_{name}") for name in names})  # type: ignore[arg-type, misc]
        async for chunk in stream:
            if collector.current is not None and collector.current.on_disk:
                await run_in_threadpool(parser.write, chunk)
            else:
                parser.write(chunk)
            for part in collector.take():
                count += 1
                if count > MAX_PARTS:
                    raise BodyBroken(reason=f"it has more than {MAX_PARTS} parts")
                yield part
    except FormParserError as error:
        raise BodyBroken(reason="it is not multipart with the boundary announced") from error
    finally:
        collector.close()
    if not collector.ended:
        raise BodyBroken(reason="it ends before its closing boundary")


async def read_single(stream: AsyncIterator[bytes], folder: Path, max_part_bytes: int) -> AsyncIterator[Part]:
    """The whole body as one part."""
    part = Part(folder, max_part_bytes)
    async for chunk in stream:
        if part.on_disk:
            await run_in_threadpool(part.write, chunk)
        else:
            part.write(chunk)
    yield part


def part_start(boundary: str, content_type: str, location: str = "") -> bytes:
    """What goes before the content of a part that is sent."""
    where = f"Content-Location: {location}\r\n" if location else ""
    return f"--{boundary}\r\nContent-Type: {content_type}\r\n{where}\r\n".encode()


def body_end(boundary: str) -> bytes:
    """What closes a multipart body that is sent."""
    return f"--{boundary}--\r\n".encode()


def encode(boundary: str, parts: Iterator[tuple[str, str, Iterator[bytes]]]) -> Iterator[bytes]:
    """A multipart body from (content type, location, content) of each part."""
    for content_type, location, content in parts:
        yield part_start(boundary, content_type, location)
        yield from content
        yield b"\r\n"
    yield body_end(boundary)
