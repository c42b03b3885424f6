"""Several router processes behind one port, for machines with cores to spare: each is a router of its own, as replicas are.

They take connections from one queue and agree through the bus. One that ends by itself is started again; where they end again and again, so does
the whole.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("headstart.router")

Serve = Callable[[int, Callable[[], None]], int]
"""Serves in a process of the number given, calls what else it is given once it does, and returns the exit code."""

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.1
_AGAIN_SECONDS = 1.0
_SHORT_SECONDS, _SHORT_MAX = 10.0, 5
"""So many lives in a row that are shorter than this are no accident."""
_KILL_SECONDS = 5.0
"""After its drain a process has this long to end."""


def serve_together(count: int, serve: Serve, drain_seconds: float) -> int:
    """Serves in ``count`` processes until SIGTERM or SIGINT. Returns in this process when all have ended, and in each of them what ``serve`` returns.

    The first one serves before others are begun, so that what keeps a router from starting is said once.
    """
    family = _Family(count, drain_seconds)
    with asked_to_end(family.end):
        while (number := family.next_number()) is not None:
            if family.fork(number):
                break
    return family.code if number is None else serve(number, family.said)


@contextmanager
def asked_to_end(end: Callable[[], None]) -> Iterator[None]:
    """Has SIGTERM and SIGINT call ``end`` and do nothing else."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        end()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Family:
    """The processes. ``code``: what this one ends with."""

    def __init__(self, count: int, drain_seconds: float) -> None:
        self.code = 0
        self._drain_seconds = drain_seconds
        self._alive: dict[int, tuple[int, float]] = {}
        self._due = [(0.0, 0)]
        self._waiting = list(range(1, count))
        self._reading, self._writing = os.pipe()
        self._short = 0
        self._ending_at = float("inf")

    def next_number(self) -> int | None:
        """Waits until a process is to be forked, and says which; None once all have ended and none is to follow."""
        while True:
            self._reap()
            now = time.monotonic()
            if self._ending_at < float("inf"):
                if not self._alive:
                    return None
                if now > self._ending_at:
                    self._signal(signal.SIGKILL)
            elif self._due and self._due[0][0] <= now:
                return self._due.pop(0)[1]
            if self._waiting and select.select([self._reading], [], [], 0)[0]:
                self._due += [(now, number) for number in self._waiting]
                self._waiting = []
            time.sleep(_POLL_SECONDS)

    def fork(self, number: int) -> bool:
        """Whether this is the new process."""
        pid = os.fork()
        if pid:
            self._alive[pid] = number, time.monotonic()
            return False
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        os.close(self._reading)
        return True

    def said(self) -> None:
        """Called in a process that serves."""
        os.write(self._writing, b"1")

    def end(self) -> None:
        """Has all end, running answers first."""
        if self._ending_at == float("inf"):
            self._ending_at = time.monotonic() + self._drain_seconds + _KILL_SECONDS
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for pid in self._alive:
            os.kill(pid, number)

    def _reap(self) -> None:
        for pid in list(self._alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._ended(*self._alive.pop(pid), os.waitstatus_to_exitcode(status))

    def _ended(self, number: int, since: float, code: int) -> None:
        if self._ending_at < float("inf"):
            return
        if self._waiting and not select.select([self._reading], [], [], 0)[0]:
            # The first one, before it served: it has said why.
            self.code = code if code > 0 else 1
            self.end()
            return
        now = time.monotonic()
        self._short = self._short + 1 if now - since < _SHORT_SECONDS else 0
        if self._short < _SHORT_MAX:
            log.warning("router process %d ended with %d; it is started again", number, code)
            self._due.append((now + _AGAIN_SECONDS, number))
        else:
            log.error("router processes end as soon as they start, %d now with %d; the router ends", number, code)
            self.code = 1
            self.end()
