"""A real router and a real bus with simulated workers: hundreds of requests, clients that leave, a worker that is killed, no wrong token."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
import pytest
from router_under_test import RouterUnderTest
from sim_cluster import SimCluster, counters, metric, right
from tests_shared import Bus, wait_for

REQUESTS, AT_ONCE = 400, 24
KILL_AFTER = 150
TOKENS_MAX = 60


@dataclass
class Outcome:
    """What clients saw: how answers ended, and the requests with a wrong token."""

    ended: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    wrong: list[int] = field(default_factory=list)


def prompts(chance: random.Random) -> list[list[int]]:
    """Prompts of 20 to 2,500 tokens, most of which begin like another."""
    found: list[list[int]] = []
    for _ in range(REQUESTS):
        before = chance.choice(found) if found and chance.random() < 0.7 else []
        kept = before[: chance.randint(0, len(before))][:2000]
        found.append(kept + [chance.randrange(100_000) for _ in range(chance.randint(20, 500 if kept else 2500))])
    return found


async def drive(url: str, seed: int, sims: SimCluster) -> Outcome:
    chance = random.Random(seed)
    outcome, gate, done = Outcome(), asyncio.Semaphore(AT_ONCE), Counter[str]()

    async def one(number: int, prompt: list[int], session: aiohttp.ClientSession) -> None:
        expected = right(prompt, TOKENS_MAX)
        leaves_after = chance.randint(0, 10) if chance.random() < 0.15 else TOKENS_MAX
        count = chance.randint(1, TOKENS_MAX)
        async with gate:
            tokens, ending = await read(session, url, prompt, count, leaves_after, outcome)
        outcome.ended[ending] += 1
        if tokens != expected[: len(tokens)] or (ending == "whole" and len(tokens) != count):
            outcome.wrong.append(number)
        done["requests"] += 1
        if done["requests"] == KILL_AFTER:
            sims.processes["k"].send_signal(signal.SIGKILL)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:
        await asyncio.gather(*(one(number, prompt, session) for number, prompt in enumerate(prompts(chance))))
    return outcome


async def read(session: aiohttp.ClientSession, url: str, prompt: list[int], count: int, leaves_after: int, outcome: Outcome) -> tuple[list[int], str]:
    """The tokens that came, and how the answer ended."""
    body = {"prompt": prompt, "max_tokens": count, "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    tokens: list[int] = []
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            return tokens, str(answer.status)
        outcome.routes[answer.headers["x-headstart-route"]] += 1
        outcome.cached += int(answer.headers["x-headstart-cached-tokens"])
        events = 0
        async for line in answer.content:
            if events >= leaves_after:
                return tokens, "left"
            if line.startswith(b"data: [DONE]"):
                return tokens, "whole"
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return tokens, "broken off"
                events += 1
                tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
    return tokens, "torn"


@pytest.mark.parametrize("seed", [1])
def test_no_token_is_wrong_whoever_leaves_or_dies(bus: Bus, sims: SimCluster, seed: int) -> None:
    sims.launch("p", "prefill", 2)
    sims.launch("d", "decode", 2)
    sims.launch("k", "decode")
    urls = sims.ready(5)
    router = RouterUnderTest(bus, body_bytes_max=1 << 20)
    try:
        router.knows(5)
        outcome = asyncio.run(drive(f"http://127.0.0.1:{router.port}", seed, sims))
    finally:
        router.stop()
    print(f"seed {seed}: {outcome}")
    assert not outcome.wrong
    assert set(outcome.ended) <= {"whole", "left", "broken off"}
    assert outcome.ended["whole"] > 0.7 * REQUESTS
    assert outcome.ended["left"] > 0
    assert outcome.ended["broken off"] <= AT_ONCE
    assert outcome.routes["prefill+decode"] > 20
    assert outcome.routes["decode"] > 20
    assert outcome.cached > 20_000
    assert sims.processes["k"].wait(5) == -signal.SIGKILL
    left = [url for name, url in urls.items() if name != "k"]
    wait_for(lambda: all(metric(url, f"vllm:num_requests_{state}") == 0 for url in left for state in ("running", "waiting")))
    wait_for(lambda: counters(bus)["leases"] == 0 and counters(bus)["writing"] == 0)
    wait_for(lambda: len(sims.urls()) == 4)
    assert sum(metric(url, "headstart_integrity_failures_total") for url in left) == 0
