"""``follow.py`` on two engines on one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from follow import run
from offline_node import offline_node

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


def test_a_prompt_is_pulled_while_it_is_computed(tmp_path: Path) -> None:
    options = {
        "dtype": "float32",
        "attention_backend": "TRITON_ATTN",
        "max_model_len": 16384,
        "gpu_memory_utilization": 0.15,
        "disable_hybrid_kv_cache_manager": True,
        "max_num_batched_tokens": 512,
    }
    with offline_node(4.0, tmp_path, options, {"VLLM_USE_FLASHINFER_SAMPLER": "0"}) as node:
        run(node, [705, 5009, 15009], answer=24, abort_seconds=0.2)
