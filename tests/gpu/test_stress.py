"""The stress of ``stress.py`` on the GPU, where steps are scheduled ahead: vLLM learns of a spoilt chunk while the next step runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from offline_node import offline_node
from stress import Stress, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("runner", ["0", "1"], ids=["first runner", "second runner"])
def test_preempted_aborted_and_spoilt_requests_are_answered_right(tmp_path: Path, runner: str) -> None:
    options = {
        # Pulled and computed parts alternate, and that changes how many tokens a step computes: in bf16, batch-invariant or not, a token may flip.
        "dtype": "float32",
        "attention_backend": "TRITON_ATTN",
        "max_model_len": 16384,
        "gpu_memory_utilization": 0.15,
        "disable_hybrid_kv_cache_manager": True,
    }
    # Triton multiplies float32 as TF32 unless told otherwise, whose ten bits flip a token as bf16's seven do.
    environment = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_V2_MODEL_RUNNER": runner, "TRITON_F32_DEFAULT": "ieee"}
    with offline_node(4.0, tmp_path, options, environment) as node:
        run(node, Stress(prefixes=[705, 2049, 5009, 9009], questions=60, answer=24, blocks=1200, abort_seconds=1.5))
