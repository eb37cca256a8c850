"""Several processes behind one port: forked before any thread runs, replaced when they die, gone when their parent is."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger()

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PAUSE_BEFORE_REPLACING = 0.5


def wait_for_end() -> None:
    """Return at SIGTERM or SIGINT."""
    end = threading.Event()
    for number in _END_SIGNALS:
        signal.signal(number, lambda *_: end.set())
    while not end.wait(3600):
        pass


def run_processes(count: int, work: Callable[[], None]) -> None:
    """Keep ``count`` forked processes doing ``work`` until this one is told to end; then end them and return."""
    lifeline = os.pipe()
    children: set[int] = set()
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True
        for child in children:
            os.kill(child, signal.SIGTERM)

    for number in _END_SIGNALS:
        signal.signal(number, end)
    while True:
        while len(children) < count and not ending:
            children.add(_fork(work, lifeline))
        if ending:
            end()  # a child born while the signal came has not heard it
        if not children:
            return
        child, status = os.wait()
        children.discard(child)
        if not ending:
            log.error("receiver process ended, another takes its place", status=os.waitstatus_to_exitcode(status))
            time.sleep(_PAUSE_BEFORE_REPLACING)


def _fork(work: Callable[[], None], lifeline: tuple[int, int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number in _END_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.close(lifeline[1])
        # When the parent dies, however it dies, its end of the pipe closes; a receiver must not outlive who watches it.
        threading.Thread(target=_follow, args=(lifeline[0],), daemon=True).start()
        work()
        code = 0
    finally:
        os._exit(code)


def _follow(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)
