"""A decode worker that reads a prompt out of the prefill worker's own blocks: the right tokens, however soon these are wanted for something else."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sim_cluster import PROFILE, SimCluster, counters, metric, post, right
from tests_shared import Bus, wait_for

TOKENS, ANSWER = 1000, 12
HBM = "cache.handover=hbm"
SMALL = msgspec.structs.replace(
    PROFILE, blocks=100, max_model_len=1200, max_num_batched_tokens=512, prefill_tokens_per_second=((1, 4000.0),), hand_over_gb_per_second=0.3
)
"""HBM for one prompt and a half, computed in a quarter of a second and read by another engine in half of one."""


@pytest.fixture
def sims(bus: Bus, tmp_path: Path) -> Iterator[SimCluster]:
    cluster = SimCluster(bus, tmp_path, SMALL)
    yield cluster
    cluster.stop()


def prompt(first: int) -> list[int]:
    return list(range(first, first + TOKENS))


def compute(url: str, first: int) -> list[int]:
    """The prefill leg."""
    body = {"prompt": prompt(first), "max_tokens": 1, "return_token_ids": True}
    return tokens(post(url, "/v1/completions", body))


def cut_off(url: str, first: int, seconds_max: float = 20) -> None:
    """A prefill leg whose client leaves, or whose worker dies."""
    body = json.dumps({"prompt": prompt(first), "max_tokens": 1}).encode()
    with pytest.raises(OSError):
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"}), timeout=seconds_max)


def follow(url: str, first: int, part_ms: int = 3000) -> list[int]:
    """The decode leg, which begins while the other one computes."""
    transfer = {"headstart": {"transfer_id": str(first), "leg": "decode", "follow_ms": part_ms}}
    body = {"prompt": prompt(first), "max_tokens": ANSWER, "return_token_ids": True, "kv_transfer_params": transfer}
    return tokens(post(url, "/v1/completions", body))


def tokens(answer: tuple[int, Any]) -> list[int]:
    assert answer[0] == 200
    found: list[int] = answer[1]["choices"][0]["token_ids"]
    return found


class Both:
    """A prefill and a decode worker; ``settings`` are both's."""

    def __init__(self, sims: SimCluster, *settings: str) -> None:
        sims.launch("p", "prefill", 1, HBM, *settings, speed=1)
        sims.launch("d", "decode", 1, HBM, *settings, speed=1)
        self.prefill, self.decode = (sims.ready(2)[name] for name in "pd")

    def hand_over(self, first: int, *then: int) -> list[int]:
        """What the decode worker answers, while prompts that begin with ``then`` are computed behind the first."""
        computing = threading.Thread(target=lambda: [compute(self.prefill, one) for one in (first, *then)])
        computing.start()
        found = follow(self.decode, first)
        computing.join(20)
        return found

    def count(self, name: str) -> float:
        return metric(self.decode, f"headstart_{name}_total")


def test_a_prompt_is_read_out_of_the_blocks_that_the_next_one_waits_for(bus: Bus, sims: SimCluster) -> None:
    both = Both(sims)
    for first in (10_000, 20_000):
        assert both.hand_over(first, first + 5_000) == right(prompt(first), ANSWER)
    assert both.count("handed_chunks") > 0
    assert both.count("stale_offers") == 0
    assert both.count("late_chunks") == 0
    wait_for(lambda: metric(both.prefill, "vllm:kv_cache_usage_perc") == 0)
    assert compute(both.prefill, 30_000) == right(prompt(30_000), 1)
    wait_for(lambda: not any(counters(bus)[name] for name in ("leases", "waiters", "holds")))


@pytest.mark.parametrize("settings", [("cache.handover_hold_gb=0",), ("cache.handover_hold_ms=60",)], ids=["no room to keep it", "no time"])
def test_blocks_that_are_reused_before_they_are_read_cost_time_alone(bus: Bus, sims: SimCluster, settings: tuple[str, ...]) -> None:
    both = Both(sims, *settings)
    for first in (10_000, 20_000, 30_000):
        assert both.hand_over(first, first + 3_000, first + 6_000) == right(prompt(first), ANSWER)
    assert both.count("stale_offers") > 0
    assert both.count("integrity_failures") == 0
    wait_for(lambda: not any(counters(bus)[name] for name in ("leases", "waiters", "holds")))


def test_the_control_unchecked_reused_blocks_are_believed(sims: SimCluster) -> None:
    both = Both(sims, "cache.handover_hold_gb=0", "security.verify_digests=false")
    assert any(both.hand_over(first, first + 3_000, first + 6_000) != right(prompt(first), ANSWER) for first in (10_000, 20_000, 30_000))


def test_without_the_setting_nothing_is_offered(sims: SimCluster) -> None:
    both = Both(sims, "cache.handover=region")
    assert both.hand_over(10_000) == right(prompt(10_000), ANSWER)
    assert both.count("handed_chunks") == 0
    assert metric(both.prefill, "headstart_offered_chunks_total") == 0


def test_a_prefill_worker_that_is_killed_between_offer_and_read_costs_time_alone(bus: Bus, sims: SimCluster) -> None:
    both = Both(sims)
    computing = threading.Thread(target=lambda: cut_off(both.prefill, 10_000))
    computing.start()
    done: list[list[int]] = []
    following = threading.Thread(target=lambda: done.append(follow(both.decode, 10_000, 500)))
    following.start()
    wait_for(lambda: counters(bus)["offers_granted_total"] > 0)
    time.sleep(0.02)
    sims.processes["p"].kill()
    following.join(20)
    computing.join(20)
    assert done == [right(prompt(10_000), ANSWER)]
    wait_for(lambda: not any(counters(bus)[name] for name in ("leases", "waiters", "offers")))


def test_requests_that_are_aborted_and_preempted_leave_nothing_behind(bus: Bus, sims: SimCluster) -> None:
    both = Both(sims)
    for first in (10_000, 20_000, 30_000):
        aborted = threading.Thread(target=cut_off, args=(both.prefill, first, 0.15))
        aborted.start()
        assert follow(both.decode, first, 300) == right(prompt(first), ANSWER)
        aborted.join(20)
    # Two prompts do not fit, so one is preempted while its parts are offered.
    legs = [threading.Thread(target=compute, args=(both.prefill, first)) for first in (40_000, 50_000, 60_000)]
    for leg in legs:
        leg.start()
    for first in (40_000, 50_000, 60_000):
        assert follow(both.decode, first) == right(prompt(first), ANSWER)
    for leg in legs:
        leg.join(20)
    wait_for(lambda: metric(both.prefill, "vllm:kv_cache_usage_perc") == 0)
    wait_for(lambda: not any(counters(bus)[name] for name in ("leases", "waiters", "holds")))
