"""Tells the bus which chunks are in an engine's HBM: follows the engine's KV cache events in a thread of the worker's supervisor.

listen: batches in their order; what is missing is asked for again; where it is gone the worker counts as cold
tell:   open an account at the daemon, everything into it, then what changed; where the daemon does not know it (any more), again
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from cachebus.client import BusClient
from cachebus.engine.hbm_map import HbmMap, decode_batch
from cachebus.errors import BusError
from cachebus.holder import Holder
from cachebus.messages_hbm import HBM_KEYS_MAX, HbmOpened, OpenHbm, ReportHbm

log = logging.getLogger("headstart.hbm")

LISTEN_MS = 200
SAY_SECONDS = 1.0
"""Longest silence towards the daemon, which takes a supervisor that says nothing for one that knows nothing."""
BATCHES_MAX = 256
"""Batches that are taken in before the bus hears of them."""
_RETRY_SECONDS = 0.25
_ANSWER_MS_MAX = 2000
_REPLAY_MS_MAX = 1000

Replay = Callable[[int], list[tuple[int, bytes]]]


class KvEventStream(Protocol):
    """An engine's batches of KV cache events. For one thread."""

    def receive(self, wait_ms: int) -> tuple[int, bytes] | None:
        """Number and payload of the next batch; None where none comes in time."""

    def replayed(self, first: int, wait_ms: int) -> list[tuple[int, bytes]]:
        """The batches from ``first`` on that the engine still has, as far as they come in time."""

    def close(self) -> None:
        """Nobody listens any longer."""


class HbmFollower:
    """Batches by number into a map. Pure but for ``replay``, which brings those from a number on that the engine still has."""

    def __init__(self, hbm: HbmMap) -> None:
        self.hbm = hbm
        self.gaps = 0
        """How often batches were lost for good."""
        self.next = 0

    def take(self, number: int, payload: bytes, replay: Replay) -> None:
        """Takes one batch in, and before it those that are missing."""
        if number > self.next:
            self.catch_up(replay(self.next))
        if number > self.next:
            log.warning("KV events %d to %d are lost: what is in HBM has to be learnt anew", self.next, number - 1)
            self._start_over(number)
        if number == self.next:
            self._apply(payload)

    def catch_up(self, batches: list[tuple[int, bytes]]) -> None:
        """Takes in what was repeated, as far as it follows what is known."""
        for number, payload in batches:
            if number == self.next:
                self._apply(payload)

    def _apply(self, payload: bytes) -> None:
        self.next += 1
        try:
            for event in decode_batch(payload):
                self.hbm.apply(event)
        except BusError as error:
            log.error("KV events that mean nothing here: %s", error)
            self._start_over(self.next)

    def _start_over(self, number: int) -> None:
        self.gaps += 1
        self.hbm.clear()
        self.next = number


class HbmRelay(threading.Thread):
    """See the module; ``listen`` is called on its thread. Where it fails, the worker counts as cold and serves on."""

    def __init__(self, run_dir: Path, worker: str, holder: Holder, listen: Callable[[], KvEventStream]) -> None:
        super().__init__(name="headstart-hbm", daemon=True)
        self._run_dir, self._worker, self._holder, self._listen = run_dir, worker, holder, listen
        self._ending = threading.Event()

    def stop(self) -> None:
        """Ends the thread."""
        self._ending.set()
        if self.is_alive():
            self.join(timeout=_ANSWER_MS_MAX / 1000 + 1)

    def run(self) -> None:
        client = BusClient(self._run_dir, f"{self._worker} hbm", self._holder)
        stream = self._listen()
        try:
            opened = self._first_opened(client)
            if opened is not None:
                self._follow(client, stream, HbmFollower(HbmMap(opened.namespace, opened.block_size, opened.chunk_size)))
        finally:
            stream.close()
            client.close()

    def _first_opened(self, client: BusClient) -> HbmOpened | None:
        """What the daemon knows of the engine; None where the worker ends before it says."""
        while not self._ending.is_set():
            try:
                return self._open(client)
            except BusError as error:
                log.debug("%s: %s", self._worker, error)
                self._ending.wait(_RETRY_SECONDS)
        return None

    def _open(self, client: BusClient) -> HbmOpened:
        reply = client.call(OpenHbm(self._worker, self._holder.id), _ANSWER_MS_MAX)
        if not isinstance(reply, HbmOpened):
            raise BusError(f"the daemon answered with {type(reply).__name__}")
        return reply

    def _follow(self, client: BusClient, stream: KvEventStream, follower: HbmFollower) -> None:
        def replay(first: int) -> list[tuple[int, bytes]]:
            return stream.replayed(first, _REPLAY_MS_MAX)

        # The first requests may have come before this subscription.
        follower.catch_up(replay(0))
        teller = _Teller(client, self._worker, self._holder.id, follower)
        in_step, try_at = True, 0.0
        while not self._ending.is_set():
            batch = stream.receive(LISTEN_MS)
            for _ in range(BATCHES_MAX):
                if batch is None:
                    break
                follower.take(*batch, replay)
                batch = stream.receive(0)
            if not in_step and time.monotonic() < try_at:
                continue
            try:
                if not in_step:
                    self._open(client)
                    teller.begin_anew()
                teller.tell()
                in_step = True
            except BusError as error:
                if in_step:
                    log.warning("%s: what is in HBM can't be told: %s", self._worker, error)
                in_step, try_at = False, time.monotonic() + _RETRY_SECONDS


class _Teller:
    """What the daemon has been told of a map."""

    def __init__(self, client: BusClient, worker: str, holder: str, follower: HbmFollower) -> None:
        self._client, self._worker, self._holder, self._follower = client, worker, holder, follower
        self._said_at = 0.0
        self._gaps = 0

    def begin_anew(self) -> None:
        """The daemon knows nothing: all of it is to be told."""
        self._follower.hbm.forget_told()
        self._said_at = 0.0

    def tell(self) -> None:
        """Says what has changed, or that nothing has where it was silent for long. Raises BusError."""
        now = time.monotonic()
        stored, removed = self._follower.hbm.changes()
        gaps = self._follower.gaps - self._gaps
        if not (stored or removed or gaps) and now - self._said_at < SAY_SECONDS:
            return
        for fresh, gone in _pieces(stored, removed):
            self._client.call(ReportHbm(self._worker, self._holder, fresh, gone, gaps), _ANSWER_MS_MAX)
            self._gaps, gaps = self._follower.gaps, 0
        self._said_at = now


def _pieces(stored: list[bytes], removed: list[bytes]) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Both lists in parts that a message may hold; one empty part where there is nothing."""
    for start in range(0, max(len(stored), len(removed), 1), HBM_KEYS_MAX):
        yield stored[start : start + HBM_KEYS_MAX], removed[start : start + HBM_KEYS_MAX]
