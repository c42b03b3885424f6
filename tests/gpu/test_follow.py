"""``follow.py`` on two engines on one GPU."""

from __future__ import annotations

from pathlib import Path

import float32_on_gpu
import pytest
from follow import run
from offline_node import offline_node

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.mark.parametrize("handover", ["region", "hbm"])
def test_a_prompt_is_pulled_while_it_is_computed(tmp_path: Path, handover: str) -> None:
    options = {**float32_on_gpu.OPTIONS, "max_model_len": 16384, "max_num_batched_tokens": 512}
    with offline_node(4.0, tmp_path, options, float32_on_gpu.ENVIRONMENT, [f"cache.handover={handover}"]) as node:
        run(node, [705, 5009, 15009], answer=24, abort_seconds=0.2)
