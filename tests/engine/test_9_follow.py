"""``follow.py`` on engines on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from follow import run, run_killed
from offline_node import offline_node

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]


@pytest.mark.parametrize("handover", ["region", "hbm"])
def test_a_prompt_is_pulled_while_it_is_computed(tmp_path: Path, handover: str) -> None:
    options = {"dtype": "float32", "max_model_len": 2048, "disable_hybrid_kv_cache_manager": True, "max_num_batched_tokens": 256}
    with offline_node(0.3, tmp_path, options, {"VLLM_CPU_KVCACHE_SPACE": "1"}, [f"cache.handover={handover}"]) as node:
        run(node, [300, 1900], answer=12, abort_seconds=0.6)


def test_an_engine_that_is_killed_while_it_is_read_leaves_right_tokens(tmp_path: Path) -> None:
    options = {"dtype": "float32", "max_model_len": 2048, "disable_hybrid_kv_cache_manager": True, "max_num_batched_tokens": 128}
    with offline_node(0.3, tmp_path, options, {"VLLM_CPU_KVCACHE_SPACE": "1"}, ["cache.handover=hbm"]) as node:
        run_killed(node, 1900, answer=12)
