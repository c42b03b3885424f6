"""The stress of ``stress.py`` on the GPU, where steps are scheduled ahead: vLLM learns of a spoilt chunk while the next step runs."""

from __future__ import annotations

from pathlib import Path

import float32_on_gpu
import pytest
from offline_node import offline_node
from stress import Stress, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("runner", ["0", "1"], ids=["first runner", "second runner"])
def test_preempted_aborted_and_spoilt_requests_are_answered_right(tmp_path: Path, runner: str) -> None:
    options = {**float32_on_gpu.OPTIONS, "max_model_len": 16384}
    environment = {**float32_on_gpu.ENVIRONMENT, "VLLM_USE_V2_MODEL_RUNNER": runner}
    with offline_node(4.0, tmp_path, options, environment) as node:
        run(node, Stress(prefixes=[705, 2049, 5009, 9009], questions=60, answer=24, blocks=1200, abort_seconds=1.5))
