"""Five times as many requests as the workers can answer: what they can answer is answered in time, the rest is refused at once.

The router is a process of its own, as it is for users: beside the clients in one process it would answer when those let it.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import aiohttp
import pytest
from sim_cluster import PROFILE, SimCluster
from tests_shared import Bus

from cachebus.ports import free_port
from deploy.bench.quiet import quietest
from deploy.bench.sim_cluster import await_true, headstart, process
from deploy.launcher import answers

WORKERS, TOKENS = 2, 16
AT_ONCE = WORKERS * PROFILE.max_num_seqs
DEADLINE = 3.0
WARM_SECONDS, SECONDS = 2.0, 6.0
SPEED = 0.2
"""Slow workers, so that five times their rate is no load for the machine: an answer takes a good second."""
GOODPUT_SHARE_MIN, REFUSAL_SECONDS_MAX = 0.95, 0.05


@dataclass
class Seen:
    """When answers ended in time, and how long refusals took, in seconds."""

    started: float = field(default_factory=time.monotonic)
    good: list[float] = field(default_factory=list)
    late: int = 0
    refused: list[float] = field(default_factory=list)
    other: list[int] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Answers a second, once it has settled."""
        return sum(WARM_SECONDS <= ended - self.started < WARM_SECONDS + SECONDS for ended in self.good) / SECONDS


async def ask(session: aiohttp.ClientSession, url: str, chance: random.Random, seen: Seen) -> None:
    body = {"prompt": [chance.randrange(100_000) for _ in range(20)], "max_tokens": chance.randint(TOKENS // 2, 2 * TOKENS)}
    headers = {"x-headstart-deadline-ms": str(int(DEADLINE * 1000))}
    started = time.monotonic()
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        await answer.read()
        ended = time.monotonic()
        if answer.status == 200 and ended - started <= DEADLINE:
            seen.good.append(ended)
        elif answer.status in (200, 504):
            seen.late += 1
        elif answer.status == 503:
            assert int(answer.headers["retry-after"]) >= 1
            seen.refused.append(ended - started)
        else:
            seen.other.append(answer.status)


async def as_many_as_run(url: str, chance: random.Random) -> Seen:
    """The peak: always as many requests as run at once."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        seen = Seen()

        async def client() -> None:
            while time.monotonic() < seen.started + WARM_SECONDS + SECONDS:
                await ask(session, url, chance, seen)

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return seen


async def so_many_a_second(url: str, chance: random.Random, rate: float) -> Seen:
    """Requests that come whether others were answered or not."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        seen, asked = Seen(), []
        while (now := time.monotonic()) < seen.started + WARM_SECONDS + SECONDS:
            asked += [asyncio.create_task(ask(session, url, chance, seen)) for _ in range(int((now - seen.started) * rate) - len(asked))]
            await asyncio.sleep(0.01)
        await asyncio.gather(*asked)
    return seen


@pytest.mark.parametrize("policy", ["cost", "least_loaded"])
def test_five_times_the_peak_costs_little_of_it(bus: Bus, sims: SimCluster, policy: str) -> None:
    sims.launch("d", "decode", WORKERS, speed=SPEED)
    sims.ready(WORKERS)
    port, chance = free_port("127.0.0.1"), random.Random(5)
    settings = [f"cache.run_dir={bus.run_dir}", f"router.port={port}", f"router.policy={policy}", "router.queue_max=1000"]
    settings += [f"router.worker_requests_max={PROFILE.max_num_seqs}"]
    url = f"http://127.0.0.1:{port}"

    def measure(_: int) -> tuple[Seen, Seen]:
        peak = asyncio.run(as_many_as_run(url, chance))
        return peak, asyncio.run(so_many_a_second(url, chance, 5 * peak.goodput))

    with process([*headstart("router"), *(part for one in settings for part in ("--set", one))], None, "router"):
        await_true("the router", lambda: answers(f"{url}/ready"))
        (peak, flooded), disturbed = quietest(measure)
    refused = sorted(flooded.refused)
    share, waited = flooded.goodput / peak.goodput, refused[int(0.99 * len(refused))]
    middle = refused[len(refused) // 2]
    print(f"peak {peak.goodput:.1f}/s; at five times that {flooded.goodput:.1f}/s in time ({share:.1%}), {flooded.late} late; disturbed: {disturbed}")
    print(f"{len(refused)} refused, p50 {middle * 1e3:.1f} ms, p99 {waited * 1e3:.1f} ms")
    assert not peak.other
    assert not flooded.other
    assert flooded.late < 0.05 * len(flooded.good)
    # A router that waits for a core itself can't refuse at once, and workers that do can't answer as many.
    assert share > (0.85 if disturbed else GOODPUT_SHARE_MIN)
    assert waited < (0.5 if disturbed else REFUSAL_SECONDS_MAX)
