"""Where requests wait until they may run (``router.admission``), and what their headers say of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from router.admission import Admission, Full, Ticket
from router.errors import ApiError
from router.timeline import phase

PRIORITY_HEADER, DEADLINE_HEADER = "x-headstart-priority", "x-headstart-deadline-ms"
PRIORITY_MAX = 100
_DIGITS_MAX = 12


@dataclass(frozen=True)
class Urgency:
    """``priority``: -100 to 100, higher ones first; ``deadline``: when the answer must have ended (monotonic seconds)."""

    priority: int
    deadline: float


def urgency_of(headers: dict[bytes, bytes], seconds_max: float, now: float) -> Urgency:
    """What a request says of itself; without a word it has ``seconds_max``. Raises ApiError (400)."""
    priority, deadline = headers.get(PRIORITY_HEADER.encode(), b"0"), headers.get(DEADLINE_HEADER.encode())
    if not priority.removeprefix(b"-").isdigit() or len(priority) > _DIGITS_MAX or abs(int(priority)) > PRIORITY_MAX:
        raise ApiError(400, f"{PRIORITY_HEADER} is a number from -{PRIORITY_MAX} to {PRIORITY_MAX}", code="invalid_header", param=PRIORITY_HEADER)
    if deadline is None:
        return Urgency(int(priority), now + seconds_max)
    if not deadline.isdigit() or len(deadline) > _DIGITS_MAX or not int(deadline):
        raise ApiError(400, f"{DEADLINE_HEADER} is a number of milliseconds, 1 or more", code="invalid_header", param=DEADLINE_HEADER)
    return Urgency(int(priority), now + min(seconds_max, int(deadline) / 1000))


class Door:
    """``limit`` says how many may run at the moment; no more than ``requests_max`` may be here at all."""

    def __init__(self, admission: Admission, limit: Callable[[], int], requests_max: int) -> None:
        self._admission, self._limit, self._requests_max = admission, limit, requests_max
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def running(self) -> int:
        """Requests under way."""
        return self._admission.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def check(self, urgency: Urgency, requests: int) -> None:
        """Raises ApiError (503) where there is no room whatever the request is; ``requests``: how many are here, read or not."""
        if requests > self._requests_max:
            raise _refusal(1)
        try:
            self._admission.check(urgency.priority, self._limit())
        except Full as full:
            raise _refusal(full.seconds) from full

    @asynccontextmanager
    async def inside(self, urgency: Urgency) -> AsyncIterator[None]:
        """Waits for a place and holds it. Raises ApiError (503) where there is none in time."""
        try:
            ticket, lost = self._admission.arrive(urgency.priority, urgency.deadline, self._limit(), time.monotonic())
        except Full as full:
            raise _refusal(full.seconds) from full
        if lost is not None:
            self._waiting.pop(lost).set_exception(_refusal(1))
        well = False
        try:
            if ticket.began is None:
                self._waiting[ticket] = asyncio.get_running_loop().create_future()
                with phase("queue"):
                    await self._waiting[ticket]
            yield
            well = True
        finally:
            self._waiting.pop(ticket, None)
            self._admission.leave(ticket, time.monotonic(), well=well)
            self.look()

    def look(self) -> None:
        """Somebody left, or there are more workers: others may run."""
        begun, lost = self._admission.begin(self._limit(), time.monotonic())
        for ticket in begun:
            # One that was cancelled just now leaves by itself.
            if (waiting := self._waiting.pop(ticket, None)) is not None and not waiting.done():
                waiting.set_result(None)
        for ticket in lost:
            if (waiting := self._waiting.pop(ticket, None)) is not None and not waiting.done():
                waiting.set_exception(_refusal(1))


def _refusal(seconds: int) -> ApiError:
    text = "the router is full (router.requests_max, router.worker_requests_max), and its queue, too, or too long for the request's deadline"
    return ApiError(503, text, code="router_full", retry_seconds=seconds)
