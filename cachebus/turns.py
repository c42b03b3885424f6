"""The order of writes and wipes in the shared tier, where several threads carry them out.

A wipe that overtakes the write of a chunk that was asked for after it takes parts of that chunk along, and leaves a header that promises them.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator

from cachebus.effects import Wipe, Write


class Turns:
    """A write waits for the wipes of its key that were asked for before it, a wipe for the writes of its keys that are under way.

    Any thread may call. Whoever hands jobs to the threads must hand out a wipe before the writes that were asked for after it: then no write waits
    for a wipe that nobody works on.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._wipes: dict[int, Wipe] = {}
        self._before: dict[int, list[int]] = {}
        self._written: Counter[bytes] = Counter()

    def asked(self, job: Wipe | Write) -> None:
        """Says that a job is about to be queued."""
        with self._changed:
            if isinstance(job, Wipe):
                self._wipes[next(self._order)] = job
            else:
                self._before[job.number] = [order for order, wipe in self._wipes.items() if _covers(wipe, job.header.key)]

    def is_next(self, job: Write) -> bool:
        """Whether nothing that was asked for before the write is left for it to wait for."""
        with self._changed:
            return not any(order in self._wipes for order in self._before.get(job.number, []))

    @contextlib.contextmanager
    def writing(self, job: Write) -> Iterator[None]:
        """For as long as a write takes, once it is its turn."""
        key = job.header.key
        with self._changed:
            before = self._before.pop(job.number, [])
            self._changed.wait_for(lambda: not any(order in self._wipes for order in before))
            self._written[key] += 1
        try:
            yield
        finally:
            with self._changed:
                self._written[key] -= 1
                self._written += Counter()
                self._changed.notify_all()

    @contextlib.contextmanager
    def wiping(self, job: Wipe) -> Iterator[None]:
        """For as long as a wipe takes, once it is its turn."""
        with self._changed:
            self._changed.wait_for(lambda: not any(_covers(job, key) for key in self._written))
        try:
            yield
        finally:
            with self._changed:
                self._wipes = {order: wipe for order, wipe in self._wipes.items() if wipe is not job}
                self._changed.notify_all()


def _covers(wipe: Wipe, key: bytes) -> bool:
    """Whether the key is among those that are wiped; none named means all."""
    return not wipe.keys or key in wipe.keys
