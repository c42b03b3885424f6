"""Clients that vanish leave nothing behind."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from live import Live

pytestmark = pytest.mark.engine

REQUESTS, CLIENTS = 200, 8


def vanish(live: Live, number: int, prompts: list[str]) -> None:
    """Sends a request and closes the connection at a random moment: while it is sent, computed, pulled or streamed."""
    chance = random.Random(number)
    fields = {"stream": chance.random() < 0.5, "max_tokens": chance.choice((1, 30, 200))}
    raw = json.dumps(live.body(chance.choice(prompts), **fields)).encode()
    address = urlsplit(live.cluster.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        client.sendall(head.encode() + (raw if chance.random() < 0.95 else raw[: len(raw) // 2]))
        time.sleep(chance.choice((0.0, 0.02, 0.1, 0.3, 1.0)) * chance.random())


def test_two_hundred_clients_vanish_and_nothing_leaks(live: Live) -> None:
    prompts = [live.prompts.text(tokens) for tokens in (50, 300, 600, 1200, 1200, 2500, 4000)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda number: vanish(live, number, prompts), range(REQUESTS)))
    live.await_rest(60)
    for url in live.workers().values():
        assert live.metric(url, "vllm:kv_cache_usage_perc") == 0
    for prompt in prompts[:4]:
        body = live.body(prompt)
        assert live.ours(body).token_ids == live.plains(body).token_ids
    live.await_rest()
