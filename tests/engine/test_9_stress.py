"""The stress of ``stress.py`` on an engine on CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline_node import offline_node
from stress import Stress, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_preempted_aborted_and_spoilt_requests_are_answered_right(tmp_path: Path) -> None:
    options = {"dtype": "float32", "max_model_len": 2048, "disable_hybrid_kv_cache_manager": True, "max_num_batched_tokens": 512}
    with offline_node(0.3, tmp_path, options, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as node:
        run(node, Stress(prefixes=[300, 700, 1100], questions=18, answer=16, blocks=26, abort_seconds=3.0))
