"""Keeps a replica in step with the daemon, for asyncio: events, gaps, snapshots, a daemon's restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from cachebus import zeromq
from cachebus.codec import EventBatch, decode_events, decode_reply, encode_request
from cachebus.errors import BusUnavailable, ProtocolError
from cachebus.messages import Event, Snapshot, SnapshotReply, Stored, WorkerDown, WorkerUp
from cachebus.messages_peers import Missed
from cachebus.replica import Replica

log = logging.getLogger("headstart.watch")

SILENCE_SECONDS_MAX = 3.0
_SNAPSHOT_SECONDS_MAX = 2.0
_CONFIRM_SECONDS_MAX = 5.0
"""How long a worker of the daemon before may take to tell a new one of itself; workers look for it every second."""


class Watch:
    """A replica and the task that feeds it. ``on_event`` hears of every event after the replica applied it.

    After a snapshot it hears of every worker and of all keys again.
    """

    def __init__(self, run_dir: Path, on_event: Callable[[Event], None] | None = None) -> None:
        self.replica = Replica()
        self._run_dir = run_dir
        self._on_event = on_event or (lambda event: None)
        self._heard_at = float("-inf")
        self._synced = asyncio.Event()
        self._ticket = 0
        self._confirmed: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        """Whether the replica is in step with a daemon that was heard in the last three seconds."""
        return self._synced.is_set() and time.monotonic() - self._heard_at < SILENCE_SECONDS_MAX

    async def start(self, timeout_seconds: float) -> None:
        """Connects and waits for the first snapshot. Raises BusUnavailable where none comes in time."""
        self._peer = zeromq.AsyncPeer(f"ipc://{self._run_dir / zeromq.REQUESTS}", f"ipc://{self._run_dir / zeromq.EVENTS}")
        self._task = asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._resync()
        except TimeoutError as error:
            await self.close()
            raise BusUnavailable(
                f"no cachebus answers at {self._run_dir} within {timeout_seconds:g} s: start one there with `headstart cachebus`, "
                "or correct cache.run_dir"
            ) from error

    async def close(self) -> None:
        """Stops following."""
        if self._confirmed is not None:
            self._confirmed.cancel()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._peer.close()

    async def _follow(self) -> None:
        while True:
            frame = await self._peer.event()
            self._heard_at = time.monotonic()
            if not self._synced.is_set():
                continue
            try:
                batch = decode_events(frame)
            except ProtocolError as error:
                log.warning("dropped a batch of events: %s", error)
                continue
            if not self._apply(batch):
                log.warning("events are missing or the cachebus restarted: asking for them")
                self._synced.clear()
                await self._resync()

    def _apply(self, batch: EventBatch) -> bool:
        known = batch.epoch == self.replica.position[0] and batch.seq <= self.replica.position[1]
        if not self.replica.apply(batch):
            return False
        for event in [] if known else batch.events:
            self._on_event(event)
        return True

    async def _resync(self) -> None:
        """Asks for what is missing until it comes; batches that overtake it are passed over, and the next gap shows."""
        while not self._synced.is_set():
            self._ticket += 1
            await self._peer.send(encode_request(self._ticket, Snapshot(*self.replica.position)))
            try:
                async with asyncio.timeout(_SNAPSHOT_SECONDS_MAX):
                    reply = decode_reply(await self._peer.receive())
            except TimeoutError:
                continue
            if reply.ticket != self._ticket:
                continue
            self._heard_at = time.monotonic()
            if isinstance(reply.body, Missed):
                for missed in map(decode_events, reply.body.batches):
                    self._apply(missed)
                self._synced.set()
            elif isinstance(reply.body, SnapshotReply):
                self.replica.load(reply.body, keep_workers=True)
                self._synced.set()
                self._await_confirmation()
                for worker in reply.body.workers:
                    self._on_event(WorkerUp(worker))
                for tier, keys in reply.body.keys.items():
                    self._on_event(Stored(keys, tier))

    def _await_confirmation(self) -> None:
        if self._confirmed is not None:
            self._confirmed.cancel()
        self._confirmed = asyncio.get_running_loop().call_later(_CONFIRM_SECONDS_MAX, self._forget) if self.replica.unconfirmed else None

    def _forget(self) -> None:
        for worker in self.replica.forget_unconfirmed():
            self._on_event(WorkerDown(worker))
