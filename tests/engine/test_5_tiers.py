"""Real engines over the lower tiers: everything is stopped and started again, and a long prompt is still a hit with the same tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from live import Live
from redis_server import RedisServer
from tests_shared import wait_for
from tier_node import Node

from deploy.launcher import private_run_dir

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOKENS = 8192
ADDED_SECONDS_MAX = 2.0
"""Far more than a tier may cost, far less than it takes to compute the prompt."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def node(live: Live, server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    disk = tmp_path_factory.mktemp("tiers") / "disk"
    # These tests are of what comes back; on two busy cores a server is silent for longer than the default. What that costs is tested in test_6_nodes.
    cache = msgspec.structs.replace(live.settings.cache, local_disk=str(disk), max_local_disk_size=1.0, remote_url=server.url, remote_timeout_ms=400)
    router = msgspec.structs.replace(live.settings.router, port=0)
    settings = msgspec.structs.replace(live.settings, cache=cache, router=router, decode=msgspec.structs.replace(live.settings.decode, count=1))
    with private_run_dir(settings) as private:
        node = Node(live, private, tmp_path_factory.mktemp("tier-logs"))
        yield node
        node.cluster.stop()


def test_a_long_prompt_is_a_hit_after_everything_was_stopped(live: Live, node: Node, server: RedisServer) -> None:
    prompt = live.prompts.text(TOKENS)
    expected = live.plains(live.body(prompt)).token_ids
    cold = node.ask(prompt)
    assert cold.token_ids == expected
    assert cold.headers["x-headstart-cached-tokens"] == "0"
    node.settled()

    node.cluster.stop()
    node.start()
    from_disk = node.ask(prompt)
    assert from_disk.token_ids == expected
    assert from_disk.headers["x-headstart-cache-source"] == "nvme"
    assert from_disk.headers["x-headstart-cached-tokens"] == str(TOKENS - 1)
    assert from_disk.headers["x-headstart-route"] == "decode"

    node.settled()
    node.clear("dram", "nvme")
    node.empty_hbm()
    from_redis = node.ask(prompt)
    assert from_redis.token_ids == expected
    assert from_redis.headers["x-headstart-cache-source"] == "redis"
    print(f"ttft: cold {cold.ttft_seconds:.3f}, nvme {from_disk.ttft_seconds:.3f}, redis {from_redis.ttft_seconds:.3f} s")


def test_a_changed_file_and_a_changed_value_cost_time_and_no_token(live: Live, node: Node, server: RedisServer) -> None:
    prompt = live.prompts.text(1500)
    expected = live.plains(live.body(prompt)).token_ids
    assert node.ask(prompt).token_ids == expected
    node.settled()
    for name in server.client.scan_iter(match="headstart:*:0"):
        server.client.setrange(name, 5000, b"wrong")
    disk = Path(node.settings.cache.local_disk)
    for segment in disk.glob("segment-*"):
        with segment.open("r+b") as file:
            for place in range(8000, segment.stat().st_size, 64 << 10):
                file.seek(place)
                file.write(b"wrong")
    node.clear("dram")
    node.empty_hbm()
    again = node.ask(prompt)
    assert again.token_ids == expected
    assert "nvme" not in again.headers["x-headstart-cache-source"]
    found = node.statistics()
    assert found["nvme_integrity_failures_total"] >= 1


def test_a_paused_shared_tier_costs_little_and_its_hits_come_back(live: Live, node: Node, server: RedisServer) -> None:
    prompt = live.prompts.text(1500)
    expected = live.plains(live.body(prompt)).token_ids
    assert node.ask(prompt).token_ids == expected
    node.settled()
    node.clear("dram", "nvme")
    node.empty_hbm()
    server.pause()
    try:
        started = time.monotonic()
        assert node.ask(prompt).token_ids == expected
        assert time.monotonic() - started < ADDED_SECONDS_MAX + live_seconds(live, prompt)
    finally:
        server.go_on()
    wait_for(lambda: bool(node.statistics()["redis_usable"]), 10)
    node.settled()
    node.clear("dram", "nvme")
    node.empty_hbm()
    again = node.ask(prompt)
    assert again.token_ids == expected
    assert "redis" in again.headers["x-headstart-cache-source"]


def live_seconds(live: Live, prompt: str) -> float:
    """What plain vLLM takes for a prompt of this length that it has not seen."""
    started = time.monotonic()
    live.plains(live.body(prompt[::-1]))
    return time.monotonic() - started
