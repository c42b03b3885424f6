"""What routers agree on: the state machine with a made-up clock, and the same over a real bus."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests_shared import Bus, wait_for

from cachebus.claims import CLAIMS_MAX, SILENCE_MS_MAX, Claims
from cachebus.colleagues import Colleagues
from cachebus.effects import Answer
from cachebus.errors import BusError
from cachebus.messages_routers import Claim, Claimed, EndClaim, OtherLoads, TellLoads, WorkerLoad


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


def ask(claims: Claims, router: str, number: int, run: list[bytes], now_ms: float = 0.0, seconds: float = 1.0) -> Claimed:
    (answer,) = claims.claim(b"c", 7, Claim(router, number, run, seconds), now_ms)
    assert isinstance(answer, Answer)
    assert isinstance(answer.body, Claimed)
    return answer.body


def tell(claims: Claims, router: str, now_ms: float, **loads: WorkerLoad) -> OtherLoads:
    return claims.tell(TellLoads(router, loads), now_ms)


def test_the_first_has_it_until_it_ends() -> None:
    claims = Claims()
    assert ask(claims, "a", 1, keys(1, 2, 3)) == Claimed(True)
    assert ask(claims, "b", 1, keys(1, 2, 3, 4), now_ms=400) == Claimed(False, 3, 0.6)
    assert ask(claims, "b", 1, keys(1, 9), now_ms=2000) == Claimed(False, 1, 0.0), "it is late, and still under way"
    assert ask(claims, "a", 1, keys(1, 2, 3)) == Claimed(True), "asked again"
    assert ask(claims, "a", 2, keys(1, 2)) == Claimed(False, 2, 1.0), "another claim of the same router"
    claims.end(EndClaim("a", 1))
    assert ask(claims, "b", 1, keys(1, 2, 3, 4)) == Claimed(True)
    assert claims.counts() == {"routers": 2, "claims": 1}


def test_what_another_has_of_a_runs_end_is_left_to_it() -> None:
    claims = Claims()
    assert ask(claims, "a", 1, keys(3, 4)).granted
    assert ask(claims, "b", 1, keys(1, 2, 3, 4)).granted
    claims.end(EndClaim("b", 1))
    assert not ask(claims, "c", 1, keys(3)).granted, "the end of a claim frees only what it had"
    claims.end(EndClaim("a", 1))
    assert ask(claims, "c", 1, keys(3)).granted


def test_who_is_silent_has_nothing() -> None:
    claims = Claims()
    assert ask(claims, "a", 1, keys(1)).granted
    claims.end_silent(SILENCE_MS_MAX)
    assert not ask(claims, "b", 1, keys(1), now_ms=SILENCE_MS_MAX).granted
    claims.end_silent(SILENCE_MS_MAX + 1)
    assert ask(claims, "b", 1, keys(1), now_ms=SILENCE_MS_MAX + 1).granted
    claims.end(EndClaim("a", 1))
    assert not ask(claims, "c", 1, keys(1)).granted, "a dead router's last word takes nothing from who came after it"


def test_loads_of_all_others_add_up() -> None:
    claims = Claims()
    assert tell(claims, "a", 0, d=WorkerLoad(3, 2, 0.5), e=WorkerLoad(1, 1, 0.0)) == OtherLoads(0, {})
    assert tell(claims, "b", 0, d=WorkerLoad(1, 0, 0.25)) == OtherLoads(1, {"d": WorkerLoad(3, 2, 0.5), "e": WorkerLoad(1, 1, 0.0)})
    assert tell(claims, "c", 0).loads["d"] == WorkerLoad(4, 2, 0.75)
    tell(claims, "b", 3000)
    claims.end_silent(3500)
    assert tell(claims, "c", 3500) == OtherLoads(1, {})


@pytest.mark.parametrize("run", [[], [b"short"], keys(*range(20_000))])
def test_what_can_not_be_a_claim(run: list[bytes]) -> None:
    with pytest.raises(BusError, match="a claim holds"):
        ask(Claims(), "a", 1, run)


def test_claims_are_bounded() -> None:
    claims = Claims()
    assert all(ask(claims, "a", number, keys(number)).granted for number in range(CLAIMS_MAX + 10))
    assert claims.counts()["claims"] == CLAIMS_MAX


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 5), st.integers(1, 4), st.booleans()), max_size=40))
def test_no_key_is_ever_two_claims(steps: list[tuple[str, int, int, int, bool]]) -> None:
    claims = Claims()
    granted: dict[tuple[str, int], set[bytes]] = {}
    for router, number, first, count, ends in steps:
        if ends:
            claims.end(EndClaim(router, number))
            granted.pop((router, number), None)
            continue
        run = keys(*range(first, first + count))
        free = not any(run[0] in held for owner, held in granted.items() if owner != (router, number))
        assert ask(claims, router, number, run).granted == free
        if free and (router, number) not in granted:
            granted[router, number] = {key for key in run if not any(key in held for held in granted.values())}
    assert claims.counts()["claims"] == len(granted)
    assert sum(map(len, granted.values())) == len(claims._by_key)


def test_two_routers_on_a_real_bus(bus: Bus) -> None:
    async def scenario() -> None:
        one = Colleagues(bus.run_dir, lambda: {"d": WorkerLoad(2, 1, 0.5)})
        two = Colleagues(bus.run_dir, dict)
        for colleagues in (one, two):
            await colleagues.start()
        number = one.new_number()
        assert (await one.claim(number, keys(1, 2), 5.0, b"")).granted
        theirs = await two.claim(two.new_number(), keys(1, 2, 3), 5.0, b"")
        assert (theirs.granted, theirs.chunks) == (False, 2)
        assert 4.0 < theirs.seconds <= 5.0
        await until(lambda: two.count == 1 and two.loads.get("d") == WorkerLoad(2, 1, 0.5))
        assert one.loads == {}
        one.end(number)
        await asyncio.sleep(0.05)
        assert (await two.claim(two.new_number(), keys(1, 2, 3), 5.0, b"")).granted
        await one.close()
        await until(lambda: two.loads == {}, 6)
        bus.stop()
        assert (await two.claim(two.new_number(), keys(1), 1.0, b"")).granted, "without a bus everybody is alone"
        bus.start()
        await until(lambda: bool(bus.daemon.statistics()["routers"]))
        await two.close()

    asyncio.run(scenario())
    wait_for(lambda: bus.daemon.statistics()["routers"] == 0)


async def until(condition: Any, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
