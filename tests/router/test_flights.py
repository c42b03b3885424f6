import asyncio
import gc
from collections.abc import Sequence
from typing import Any

from router.flights import Flights

KEYS = [b"a", b"b", b"c"]


class Stored:
    """The part of a replica that flights look at."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def known_prefix(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.keys), len(keys))


async def hanging() -> None:
    await asyncio.Event().wait()


def run(scenario: Any) -> None:
    """Runs a scenario; what asyncio would only log fails it."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(5):
            await scenario()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(watched())
    assert complaints == []


def test_a_computation_lives_as_long_as_anybody_waits_for_it() -> None:
    async def scenario() -> None:
        flights = Flights(Stored())
        flight = flights.start(KEYS, hanging(), 0.0, 0)
        assert flight.task is not None
        follower = asyncio.create_task(flights.wait(flight, KEYS, 3, 5))
        await asyncio.sleep(0)
        flight.leave()
        await asyncio.sleep(0)
        assert not flight.task.cancelling()
        follower.cancel()
        await asyncio.wait([flight.task, follower])
        assert flight.task.cancelled()
        await asyncio.sleep(0)
        assert flights.covering(KEYS, 0) is None
        assert (flight.ended, flight.computed) == (True, False)

    run(scenario)


def test_waiters_wake_when_their_chunks_are_stored_before_the_flight_ends() -> None:
    async def scenario() -> None:
        stored = Stored()
        flights = Flights(stored)
        flight = flights.start(KEYS, None, 0.0, 0)
        two = asyncio.create_task(flights.wait(flight, KEYS, 2, 5))
        three = asyncio.create_task(flights.wait(flight, KEYS, 3, 5))
        await asyncio.sleep(0)
        stored.keys |= {b"a", b"b"}
        flights.wake()
        await two
        assert not three.done()
        flights.end(flight, computed=True)
        await three

    run(scenario)


def test_a_failure_nobody_is_left_to_hear_of_is_no_complaint() -> None:
    async def failing() -> None:
        raise RuntimeError("the worker died")

    async def scenario() -> None:
        flights = Flights(Stored())
        flight = flights.start(KEYS, failing(), 0.0, 0)
        await flights.wait(flight, KEYS, 3, 5)
        assert not flight.computed
        del flight

    run(scenario)


def test_only_the_first_word_on_a_flight_counts() -> None:
    async def scenario() -> None:
        flights = Flights(Stored())
        flight = flights.start(KEYS, None, 0.0, 0)
        flights.end(flight, computed=True)
        flights.end(flight, computed=False)
        assert flight.computed

    run(scenario)


def test_covering_says_how_far_a_flight_goes() -> None:
    async def scenario() -> None:
        flights = Flights(Stored())
        first = flights.start(KEYS[:2], None, 0.0, 0)
        second = flights.start(KEYS, None, 0.0, 0)
        assert flights.covering([*KEYS, b"d"], 0) == (first, 2)
        assert flights.covering(KEYS, 2) == (second, 1)
        assert flights.covering(KEYS, 3) is None
        flights.end(first, computed=True)
        assert flights.covering([b"x"], 0) is None

    run(scenario)


def test_waits_are_bounded() -> None:
    async def scenario() -> None:
        flights = Flights(Stored())
        flight = flights.start(KEYS, None, 0.0, 0)
        await flights.wait(flight, KEYS, 3, 0.01)
        await flights.settled(KEYS, 0.01)
        assert not flight.ended

    run(scenario)
