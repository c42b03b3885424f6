"""Streams of messages whose decode worker is killed with SIGKILL: greedy ones go on at another worker, drawn ones end with an error event."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections import Counter
from typing import Any

import aiohttp
from router_under_test import RouterUnderTest
from sim_cluster import PROFILE, SimCluster, counters, metric, right
from tests_shared import Bus, wait_for

from deploy.sim.vocabulary import chat_prompt, text_of

STREAMS, TOKENS = 8, 200
STEPS_PER_SECOND = 3.0
"""How many times faster than its profile: an answer takes about a second, so that a death finds it under way."""


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {number} " * (1 + 40 * number)}]


async def listen(session: aiohttp.ClientSession, url: str, number: int, seen: Counter[str]) -> list[dict[str, Any]]:
    body = {"model": PROFILE.model, "max_tokens": TOKENS, "stream": True, "messages": messages(number), "temperature": int(number % 4 == 3)}
    events = []
    async with session.post(f"{url}/v1/messages", json=body) as answer:
        assert answer.status == 200
        async for line in answer.content:
            if line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
                seen["events"] += 1
    return events


async def one_round(url: str, sims: SimCluster) -> list[list[dict[str, Any]]]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        seen = Counter[str]()
        tasks = [asyncio.create_task(listen(session, url, number, seen)) for number in range(STREAMS)]
        while seen["events"] < STREAMS * TOKENS // 3:
            await asyncio.sleep(0.001)
        sims.processes["k"].send_signal(signal.SIGKILL)
        return await asyncio.gather(*tasks)


def test_messages_go_on_when_their_worker_is_killed(bus: Bus, sims: SimCluster) -> None:
    for name in ("d", "k"):
        sims.launch(name, "decode", speed=STEPS_PER_SECOND)
    sims.ready(2)
    router = RouterUnderTest(bus, body_bytes_max=1 << 20)
    try:
        router.knows(2)
        answers = asyncio.run(one_round(f"http://127.0.0.1:{router.port}", sims))
        outcomes = router.get("/metrics")[1].decode()
    finally:
        router.stop()
    broken = 0
    for number, events in enumerate(answers):
        kinds = Counter(event["type"] for event in events)
        if number % 4 == 3 and "error" in kinds:
            broken += 1
            assert events[-1]["error"]["type"] == "api_error"
            assert "message_stop" not in kinds
            continue
        text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
        assert text == text_of(right(chat_prompt(messages(number)), TOKENS))
        assert {kind: kinds[kind] for kind in kinds if kind != "content_block_delta"} == dict.fromkeys(
            ("message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"), 1
        )
        assert events[-2]["usage"]["output_tokens"] == TOKENS
    assert 'headstart_resumed_streams_total{outcome="computed again"}' in outcomes
    told = re.search(r'^headstart_resumed_streams_total{outcome="broken off"} ([0-9.]+)$', outcomes, re.MULTILINE)
    assert float(told[1] if told else 0) == broken
    wait_for(lambda: all(metric(url, "vllm:num_requests_running") == 0 for url in sims.urls().values()))
    wait_for(lambda: counters(bus)["leases"] == 0 and counters(bus)["writing"] == 0)
