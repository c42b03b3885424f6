"""A planned cluster as it really runs: router, bus and simulated workers, with the rates that the plan was made with.

Prompts of 2,048 tokens take 100 ms; time passes half as fast, so that what Python itself takes for a request weighs less.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy import cli
from deploy.bench.gateways import Gateway, running
from deploy.bench.replay import Pace, replay
from deploy.bench.sim_cluster import SimPlan, sim_cluster
from deploy.bench.trace import BLOCK_TOKENS, Arrival, total_tokens
from deploy.sim.profile import Profile

PROFILE = Profile(
    blocks=5000,
    max_model_len=8192,
    max_num_batched_tokens=2048,
    max_num_seqs=64,
    prefill_tokens_per_second=((1, 20_480.0),),
    attention_ns_per_pair=0.0,
    decode_ms=((1, 4.0), (64, 6.0)),
    decode_ns_per_context_token=0.0,
)
RATE, REUSE, PREFIXES, PREFIX_BLOCKS, BLOCKS, ANSWER = 30.0, 0.3, 8, 3, 4, 8
TTFT_MEAN = 0.17
SPEED, SECONDS, CONTROL_SECONDS, SEED = 0.5, 12.0, 6.0, 3
SLOWER_MAX, FASTER_MAX, HIT_SHARE_OFF_MAX = 0.25, 0.1, 0.03
"""Measured against planned. Slower by what the machine's own load adds, and by what the random arrivals of so short a time do to the wait."""


@dataclass(frozen=True)
class Reached:
    """What a replay reached, seconds of the workers' own time."""

    ttft_mean: float
    hit_share: float


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    return path


def arrivals(seconds: float) -> list[Arrival]:
    """As the plan was told: Poisson, a share of them with one of a few prefixes."""
    chance, at, fresh, found = random.Random(SEED), 0.0, 1000, list[Arrival]()
    while (at := at + chance.expovariate(RATE)) < seconds:
        known = PREFIX_BLOCKS if chance.random() < REUSE else 0
        first = PREFIX_BLOCKS * chance.randrange(PREFIXES)
        blocks = (*range(first, first + known), *range(fresh, fresh + BLOCKS - known))
        fresh += BLOCKS
        found.append(Arrival(at, BLOCKS * BLOCK_TOKENS, ANSWER, blocks))
    return found


def reached(prefill: int, decode: int, profile: Path, seconds: float) -> Reached:
    asked = arrivals(seconds)
    # By rule, as a plan has it: what lacks 1,024 tokens goes through prefill.
    with (
        sim_cluster(SimPlan(prefill, decode, SPEED, profile, 0.2), None) as cluster,
        running(Gateway("headstart", "prefix_affinity"), cluster, None) as gate,
    ):
        served = replay(gate.url, PROFILE.model, asked, Pace(1.0, SPEED))
        computed = cluster.total("headstart_sim_computed_prompt_tokens_total")
    assert not [one.failure for one in served if one.failure]
    return Reached(statistics.fmean(one.ttft_seconds for one in served) * SPEED, 1 - computed / total_tokens(asked))


def planned(capsys: pytest.CaptureFixture[str], profile: Path) -> dict[str, Any]:
    traffic = ["--rate", str(RATE), "--prompt-tokens", str(BLOCKS * BLOCK_TOKENS), "--output-tokens", str(ANSWER), "--reuse", str(REUSE)]
    known = ["--prefixes", str(PREFIXES), "--prefix-tokens", str(PREFIX_BLOCKS * BLOCK_TOKENS), "--ttft-mean", str(TTFT_MEAN)]
    assert cli.main(["plan", "--profile", str(profile), *traffic, *known, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_planned_cluster_keeps_what_was_planned_and_a_smaller_one_does_not(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(capsys, profile)
    side = plan["with_cache"]
    prefill, decode, mean = side["prefill"]["workers"], side["decode"]["workers"], side["ttft_seconds"]["all"]["mean"]
    assert prefill > 1
    found = reached(prefill, decode, profile, SECONDS)
    print(
        f"{prefill} + {decode} workers: TTFT {found.ttft_mean:.4f} s, planned {mean:.4f}; hits {found.hit_share:.3f}, planned {plan['hit_share']:.3f}"
    )
    assert (1 - FASTER_MAX) * mean < found.ttft_mean < (1 + SLOWER_MAX) * mean
    assert found.ttft_mean <= TTFT_MEAN
    assert found.hit_share == pytest.approx(plan["hit_share"], abs=HIT_SHARE_OFF_MAX)
    # The control: with a worker less the plan says that the objective is missed, and so it is.
    less = side["ttft_seconds_one_prefill_worker_less"]["mean"]
    assert less is None or less > TTFT_MEAN
    control = reached(prefill - 1, decode, profile, CONTROL_SECONDS)
    print(f"{prefill - 1} + {decode} workers: TTFT {control.ttft_mean:.4f} s")
    assert control.ttft_mean > TTFT_MEAN
