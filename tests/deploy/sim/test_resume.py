"""Decode workers killed with SIGKILL in the middle of streams: their clients read on as if nothing had been, on a real router and a real bus."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from router_under_test import RouterUnderTest
from sim_cluster import SimCluster, counters, metric, right
from tests_shared import Bus, wait_for

from deploy.sim.vocabulary import chat_prompt, text_of

VICTIMS, STREAMS, TOKENS_MAX = 6, 12, 300
STEPS_PER_SECOND = 3.0
"""How many times faster than its profile: an answer takes about a second, so that a death finds it under way."""


@dataclass
class Wish:
    """A request, and what is right for it."""

    path: str
    body: dict[str, Any]
    tokens: list[int]
    text: str
    finish: str


@dataclass
class Heard:
    """What came."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    usage: dict[str, int] = field(default_factory=dict)
    error: str = ""
    done: bool = False


def wish(chance: random.Random) -> Wish:
    count = chance.randint(TOKENS_MAX // 2, TOKENS_MAX)
    body: dict[str, Any] = {"max_tokens": count, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if chance.random() < 0.5:
        content = "".join(chance.choices("ABCdef ", k=chance.randint(20, 900)))
        path, messages = "/v1/chat/completions", [{"role": "user", "content": content}]
        body["messages"], prompt = messages, chat_prompt(messages)
    else:
        path, prompt = "/v1/completions", [chance.randrange(100_000) for _ in range(chance.randint(20, 1200))]
        body["prompt"] = prompt
    tokens = right(prompt, count)
    text, finish = text_of(tokens), "length"
    if chance.random() < 0.3:
        # Across two tokens, far into the answer.
        place = chance.randint(count, len(text) - 10)
        body["stop"] = [text[place : place + 6], "never said"]
        end = text.index(body["stop"][0])
        tokens, text, finish = tokens[: (end + 5) // 4 + 1], text[:end], "stop"
    if chance.random() < 0.2:
        # The simulated model has none; the router can't know that, so the answer is computed again.
        body["presence_penalty"] = 0.5
    if chance.random() < 0.5:
        body["return_token_ids"] = True
    return Wish(path, body, tokens, text, finish)


async def listen(session: aiohttp.ClientSession, url: str, wished: Wish, events: Counter[str]) -> Heard:
    heard = Heard()
    async with session.post(url + wished.path, json=wished.body) as answer:
        assert answer.status == 200
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            assert not heard.done
            if line.startswith(b"data: [DONE]"):
                heard.done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                heard.error = event["error"]["code"]
                continue
            events["seen"] += 1
            heard.ids.add(f"{event['id']} {event['created']}")
            heard.usage = event.get("usage") or heard.usage
            for choice in event["choices"]:
                assert bool(choice.get("token_ids")) <= ("return_token_ids" in wished.body)
                heard.tokens += choice.get("token_ids") or []
                heard.text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
                heard.finish += [choice["finish_reason"]] if choice["finish_reason"] else []
    return heard


async def one_round(url: str, chance: random.Random, sims: SimCluster, victim: str) -> None:
    events = Counter[str]()
    wishes = [wish(chance) for _ in range(STREAMS)]
    dies_at = chance.randint(1, sum(len(wished.tokens) for wished in wishes) // 2)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        answers = asyncio.gather(*(listen(session, url, wished, events) for wished in wishes))
        while events["seen"] < dies_at and not answers.done():
            await asyncio.sleep(0.001)
        sims.processes[victim].send_signal(signal.SIGKILL)
        for wished, heard in zip(wishes, await answers, strict=True):
            assert (heard.error, heard.done, len(heard.ids)) == ("", True, 1)
            assert heard.text == wished.text
            assert heard.tokens == (wished.tokens if "return_token_ids" in wished.body else [])
            assert heard.finish == [wished.finish]
            assert heard.usage["completion_tokens"] == len(wished.tokens)
            assert heard.usage["total_tokens"] == heard.usage["prompt_tokens"] + len(wished.tokens)


def outcomes(router: RouterUnderTest) -> dict[str, float]:
    lines = router.get("/metrics")[1].decode().splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("headstart_resumed_streams_total{"))
    return {name.partition('"')[2].rstrip('"}'): float(value) for name, _, value in found}


@pytest.mark.parametrize("seed", [1])
def test_streams_go_on_when_their_worker_is_killed(bus: Bus, sims: SimCluster, seed: int) -> None:
    chance = random.Random(seed)
    sims.launch("p", "prefill", speed=STEPS_PER_SECOND)
    sims.launch("d", "decode", 2, speed=STEPS_PER_SECOND)
    for number in range(VICTIMS):
        sims.launch(f"k{number}", "decode", speed=STEPS_PER_SECOND)
    sims.ready(3 + VICTIMS)
    router = RouterUnderTest(bus, body_bytes_max=1 << 20)
    try:
        router.knows(3 + VICTIMS)
        for number in range(VICTIMS):
            asyncio.run(one_round(f"http://127.0.0.1:{router.port}", chance, sims, f"k{number}"))
            wait_for(lambda left=VICTIMS - number: len(sims.urls()) == 2 + left)
        found = outcomes(router)
        print(f"seed {seed}: {found}")
        assert found["continued"] > 0
        assert found["computed again"] > 0
        assert "broken off" not in found
    finally:
        router.stop()
    wait_for(lambda: all(metric(url, "vllm:num_requests_running") == 0 for url in sims.urls().values()))
    wait_for(lambda: counters(bus)["leases"] == 0 and counters(bus)["writing"] == 0)


def test_streams_leave_a_worker_that_is_silent_and_it_comes_back(bus: Bus, sims: SimCluster) -> None:
    """SIGSTOP: its connections stay open, so nobody is told; the bus still has it. An answer that is no stream waits for it, too."""
    chance = random.Random(3)
    for name in ("d", "stopped"):
        sims.launch(name, "decode", speed=STEPS_PER_SECOND)
    sims.ready(2)
    router = RouterUnderTest(bus, body_bytes_max=1 << 20, health_ms=300)
    url = f"http://127.0.0.1:{router.port}"

    async def ask() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:
            events = Counter[str]()
            wishes = [wish(chance) for _ in range(6)]
            wishes[0].body |= {"stream": False, "stream_options": None}
            answers = [asyncio.create_task(listen(session, url, wished, events)) for wished in wishes[1:]]
            whole = asyncio.create_task(session.post(url + wishes[0].path, json=wishes[0].body))
            while events["seen"] < 100:
                await asyncio.sleep(0.001)
            sims.processes["stopped"].send_signal(signal.SIGSTOP)
            for wished, heard in zip(wishes[1:], await asyncio.gather(*answers), strict=True):
                assert (heard.error, heard.text, heard.finish) == ("", wished.text, [wished.finish])
            choice = (await (await whole).json())["choices"][0]
            assert (choice["text"] if "text" in choice else choice["message"]["content"]) == wishes[0].text

    try:
        router.knows(2)
        asyncio.run(ask())
        assert sum(outcomes(router).values()) > 0
        assert b'headstart_workers{role="decode",state="out"} 1.0' in router.get("/metrics")[1]
    finally:
        sims.processes["stopped"].send_signal(signal.SIGCONT)
        wait_for(lambda: b'headstart_workers{role="decode",state="ready"} 2.0' in router.get("/metrics")[1])
        router.stop()
