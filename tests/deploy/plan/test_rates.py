"""Computed times against those that were measured on an H200, length by length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.plan.gpus import GPUS
from deploy.plan.rates import Corrected, Modelled, Profiled, Rates
from deploy.plan.shape import shape_of
from deploy.sim.profile import Profile

LENGTHS = (2048, 8192, 32768, 131072)
HITS = Path(__file__).parents[3] / "benchmarks/h200/hits.json"
SMALL = Modelled(shape_of("llama-3.1-8b", 2, 2), GPUS["h200"])
LARGE = Modelled(shape_of("llama-3.1-70b", 1, 1), GPUS["h200"])
LARGE_COLD = (0.230, 1.011, 5.455, 46.19)
"""70B shape, fp8 weights and KV, vLLM 0.25.1 without a connector on one H200, as SMALL's; no rows of it are kept."""


def measured(case: str) -> list[float]:
    rows = json.loads(HITS.read_text())["rows"]
    found = {row["tokens"]: row["median"] for row in rows if row["system"] == "headstart" and row["case"] == case}
    return [found[length] for length in LENGTHS]


def one(values: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([values], np.float64)


@pytest.mark.parametrize(
    ("engine", "seconds", "errors"),
    [
        (SMALL, measured("cold"), (-0.002, 0.048, 0.018, 0.007)),
        (LARGE, LARGE_COLD, (0.032, 0.046, 0.091, 0.112)),
    ],
)
def test_cold_prompts_as_measured(engine: Rates, seconds: list[float], errors: tuple[float, ...]) -> None:
    for length, there, error in zip(LENGTHS, seconds, errors, strict=True):
        assert float(engine.cold(one(length))[0]) / there - 1 == pytest.approx(error, abs=0.002), length


def test_hits_as_measured() -> None:
    for length, there, error in zip(LENGTHS, measured("dram"), (0.034, -0.085, 0.039, -0.006), strict=True):
        assert float(SMALL.hit(one(length))[0]) / there - 1 == pytest.approx(error, abs=0.002), length


def test_parts_of_a_prompt_add_up_to_all_of_it() -> None:
    whole = SMALL.compute(one(0), one(30_000))
    assert SMALL.compute(one(0), one(12_000)) + SMALL.compute(one(12_000), one(18_000)) == pytest.approx(whole)
    assert SMALL.cold(one(1)) == pytest.approx(0.016), "a pass takes its time, however short"


def test_room_is_what_weights_leave() -> None:
    # 141 GB: 90% of it less 3 GB and 16 GB of weights, at 128 KiB a token.
    assert SMALL.room_tokens == int((141e9 * 0.9 - 3e9 - SMALL.shape.weights) / 131_072)
    assert Modelled(shape_of("llama-3.1-70b", 2, 2), GPUS["h200"]).room_tokens < 1
    two = Modelled(shape_of("llama-3.1-70b", 2, 2), GPUS["h200"], 2)
    assert two.room_tokens > 300_000
    sixteen = Modelled(shape_of("llama-3.1-70b", 2, 2), GPUS["h200"], 16)
    assert sixteen.kv_bytes_per_token == 2 * two.kv_bytes_per_token, "8 KV heads on 16 ranks lie there twice"


def test_more_gpus_are_faster_but_not_as_many_times() -> None:
    two = Modelled(LARGE.shape, LARGE.gpu, 2)
    for slow, fast in ((LARGE.cold(one(32768)), two.cold(one(32768))), (one(LARGE.step(16, 8192)), one(two.step(16, 8192)))):
        assert 1.5 < float(slow[0]) / float(fast[0]) < 2


def test_corrections_hit_the_points_and_lie_between_them_elsewhere() -> None:
    stretched = Corrected(SMALL, [(8192, 0.4), (32768, 1.5)], [(8192, 0.1)])
    assert stretched.cold(np.array([8192.0, 32768.0])) == pytest.approx([0.4, 1.5])
    assert stretched.hit(one(8192)) == pytest.approx(0.1)
    factors = stretched.cold(np.array([1024.0, 16384.0, 131072.0])) / SMALL.cold(np.array([1024.0, 16384.0, 131072.0]))
    ends = [0.4 / float(SMALL.cold(one(8192))[0]), 1.5 / float(SMALL.cold(one(32768))[0])]
    assert factors == pytest.approx([ends[0], sum(ends) / 2, ends[1]])
    assert stretched.step(8, 1000) == SMALL.step(8, 1000)


def test_a_profile_is_taken_step_by_step() -> None:
    profile = Profile(max_num_batched_tokens=1000)
    engine = Profiled(profile)
    expected = sum(profile.step_seconds([(before, fresh)], []) for before, fresh in ((500, 1000), (1500, 1000), (2500, 300)))
    assert engine.compute(np.array([500.0, 500.0]), np.array([2300.0, 0.0])) == pytest.approx([expected, 0])
    assert engine.step(3.2, 100) == profile.step_seconds([], [100] * 3)
    assert float(engine.hit(one(1000))[0]) == pytest.approx(profile.pull_seconds(1000) + profile.step_seconds([(0, 1)], []))
