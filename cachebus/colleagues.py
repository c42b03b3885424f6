"""A router's side of what routers agree on through the bus, for asyncio: claims, and each other's loads.

The bus is asked only so that nothing is computed twice and queues are seen: where it does not answer in time, a router goes on alone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cachebus import zeromq
from cachebus.codec import decode_reply, encode_request
from cachebus.errors import ProtocolError
from cachebus.messages import Reply, Request, Stat, StatReply
from cachebus.messages_routers import CLAIM_KEYS_MAX, Claim, Claimed, EndClaim, OtherLoads, Spent, TellLoads, WorkerLoad

log = logging.getLogger("headstart.colleagues")

ANSWER_SECONDS_MAX = 0.05
TELL_SECONDS = 0.1


class Limits(Protocol):
    """What a router lets its tenants take."""

    def own(self) -> dict[str, Spent] | None:
        """What they took here, by name; None where no tenants are limited."""

    def others(self, spent: Mapping[str, Mapping[str, Spent]]) -> None:
        """What they took at other routers."""


class Colleagues:
    """The routers of this bus, as one of them sees the others. ``loads`` are all others' together, by worker, at most 0.1 s old."""

    def __init__(self, run_dir: Path, own: Callable[[], Mapping[str, WorkerLoad]], limits: Limits | None = None) -> None:
        self.loads: Mapping[str, WorkerLoad] = {}
        self.count = 0
        self._run_dir, self._own, self._limits = run_dir, own, limits
        self._name = secrets.token_hex(8)
        self._number = self._ticket = 0
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        # The loop alone would let go of them before they are done.
        self._sending: set[asyncio.Future[int]] = set()

    async def start(self) -> None:
        """Connects; does not wait for an answer."""
        self._socket = zeromq.AsyncRequests(f"ipc://{self._run_dir / zeromq.REQUESTS}")
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._tell())]

    async def close(self) -> None:
        """Lets go; the bus forgets this router when it has been silent for a while."""
        ending: list[asyncio.Future[Any]] = [*self._tasks, *self._sending]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._socket.close()

    def new_number(self) -> int:
        """A number for a claim."""
        self._number += 1
        return self._number

    async def claim(self, number: int, keys: Sequence[bytes], seconds: float, prompt: bytes) -> Claimed:
        """Asks for a run of keys of the prompt whose first chunk is ``prompt``; granted where nobody says otherwise in time."""
        reply = await self._ask(Claim(self._name, number, list(keys[:CLAIM_KEYS_MAX]), seconds, prompt))
        return reply if isinstance(reply, Claimed) else Claimed(True)

    def end(self, number: int) -> None:
        """Gives a claim up; the message goes when the socket takes it."""
        sending = asyncio.ensure_future(self._send(EndClaim(self._name, number)))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def statistics(self) -> Mapping[str, float] | None:
        """The daemon's counters; None where it does not answer in time."""
        reply = await self._ask(Stat())
        return reply.values if isinstance(reply, StatReply) else None

    async def _tell(self) -> None:
        while True:
            reply = await self._ask(TellLoads(self._name, dict(self._own()), self._limits.own() if self._limits else None))
            if isinstance(reply, OtherLoads):
                self.loads, self.count = reply.loads, reply.routers
                if self._limits:
                    self._limits.others(reply.spent)
            else:
                # What nobody confirms is not held against a worker.
                self.loads = {}
            await asyncio.sleep(TELL_SECONDS)

    async def _ask(self, request: Request) -> Reply | None:
        ticket = await self._send(request)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = answer
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._waiting[ticket]

    async def _send(self, request: Request) -> int:
        self._ticket += 1
        ticket = self._ticket
        await self._socket.send(encode_request(ticket, request))
        return ticket

    async def _receive(self) -> None:
        while True:
            try:
                reply = decode_reply(await self._socket.receive())
            except ProtocolError as error:
                log.warning("dropped a reply: %s", error)
                continue
            waiting = self._waiting.get(reply.ticket)
            if waiting is not None and not waiting.done():
                waiting.set_result(reply.body)
