"""Tensor parallelism: every rank publishes and pulls its part, and a chunk counts only where all parts are good."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from offline_node import answers, offline_node, whole

from cachebus.keys import rank_key
from cachebus.region import Region
from cachebus.table import State
from deploy.bench.offline import OfflineEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
PROMPTS = [(1, 300), (2, 700), (3, 1300)]
ANSWER = 8
TRIES = 5
OPTIONS = {"dtype": "float32", "max_model_len": 2048, "tensor_parallel_size": 2, "disable_hybrid_kv_cache_manager": True}


def pull_whole(engine: OfflineEngine, expected: list[list[int]]) -> None:
    """Every prompt is pulled whole; what a busy machine kept from being published is by the next time."""
    for _ in range(TRIES):
        engine.empty_hbm()
        hits = answers(engine, PROMPTS, ANSWER)
        assert [asked.token_ids for asked in hits] == expected
        if whole(hits, PROMPTS):
            return
    raise AssertionError(hits)


def test_two_ranks_share_prompts_as_one_does(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    # vLLM gives each rank the cores of a NUMA node unless told which.
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"}
    with offline_node(0.5, tmp_path, OPTIONS, environment) as node:
        plain = node.engine("plain", connected=False)
        expected = [asked.token_ids for asked in answers(plain, PROMPTS, ANSWER)]
        plain.stop()
        assert len(set(map(tuple, expected))) == len(expected)

        first = node.engine("first")
        cold = answers(first, PROMPTS, ANSWER)
        assert [asked.token_ids for asked in cold] == expected
        pull_whole(first, expected)
        first.stop()

        # The second rank's parts alone are changed: the first's are good, and still nothing may be believed.
        region = Region.map(node.settings.cache.resolved_region_path({}))
        keys = {record.key for _, record in region.table.read() if record.state == State.COMMITTED}
        region.close()
        parts = [key for key in (rank_key(key, 1) for key in keys) if key in keys]
        assert len(parts) == len(keys) // 2
        node.spoil(parts)
        second = node.engine("second")
        again = answers(second, PROMPTS, ANSWER)
        assert [asked.token_ids for asked in again] == expected
        assert not any(asked.cached for asked in again)
        assert node.statistics()["integrity_failures_total"] >= len(PROMPTS)
        pull_whole(second, expected)
        second.stop()
        assert node.statistics()["leases"] == 0
