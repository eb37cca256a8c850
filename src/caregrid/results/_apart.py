"""Checks results in a process beside this one, so that a large SEG is judged while the report about it is still being written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

from pydicom.dataset import Dataset

from caregrid.results._validation import Validation, source_header, validate

#: Headers read ahead in the process beside; a run's sources at most a few thousand, of twenty elements each.
_ahead: dict[Path, Dataset] = {}


class Apart:
    """One process that checks results one after the other; started at the first use, ended by ``close`` or with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def expect(self, sources: Sequence[Path]) -> None:
        """These files will be the sources of a result soon: their headers can be read already."""
        try:
            self._open().submit(_read_ahead, list(sources))
        except BrokenProcessPool:
            self.close()

    def validate(self, result: Path, sources: Sequence[Path] = (), ours: bool = True) -> Validation:
        """As ``results.validate``. Checked here when the process beside is gone: the kernel may have taken it for its memory."""
        try:
            asked: Future[Validation] = self._open().submit(_validate, result, list(sources), ours)
            return asked.result()
        except BrokenProcessPool:
            self.close()
            return validate(result, sources, ours=ours)

    def _open(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Not forked: this process has threads, and locks that they hold would stay locked there for ever.
                beside = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=beside, initializer=_begin)
            return self._pool

    def close(self) -> None:
        """End the process."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """Leave when the process that started us is gone, killed or not; and load what the first check would wait for."""
    from caregrid.results import warm_up

    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us, which lets us end our work
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    warm_up()


def _leave_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(0)


def _read_ahead(sources: list[Path]) -> None:
    _ahead.clear()
    for path in sources:
        _ahead[path] = source_header(path)


def _validate(result: Path, sources: list[Path], ours: bool) -> Validation:
    headers = [_ahead[path] if path in _ahead else source_header(path) for path in sources]
    return validate(result, headers, ours=ours)
