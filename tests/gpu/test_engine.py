"""Real engines on the GPU with weights whose tokens depend on the KV: hits give plain vLLM's tokens, and what was changed is computed again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from offline_node import OfflineNode, answers, offline_node, whole

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
PROMPTS = [(1, 705), (2, 2049), (3, 5009), (4, 9009)]
"""Seed and length. A block and one token: then a hit in HBM leaves as much to compute as one from the region, and both round alike."""
ANSWER = 24
OPTIONS = {"dtype": "bfloat16", "max_model_len": 16384, "gpu_memory_utilization": 0.15, "disable_hybrid_kv_cache_manager": True}
ENVIRONMENT = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}


@pytest.fixture(scope="module", params=[1, 2], ids=["one GPU", "two ranks"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineNode]:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"{request.param} GPUs are needed")
    options = {**OPTIONS, "tensor_parallel_size": request.param}
    with offline_node(2.0, tmp_path_factory.mktemp("logs"), options, ENVIRONMENT) as node:
        yield node


def test_hits_give_the_tokens_of_plain_vllm_and_changed_chunks_are_computed_again(node: OfflineNode) -> None:
    plain = node.engine("plain", connected=False)
    expected = [asked.token_ids for asked in answers(plain, PROMPTS, ANSWER)]
    hit_expected = [asked.token_ids for asked in answers(plain, PROMPTS, ANSWER)]
    plain.stop()
    assert len({tuple(ids) for ids in expected}) == len(expected), "the control: prompts that are answered alike would prove nothing"

    first = node.engine("first")
    cold = answers(first, PROMPTS, ANSWER)
    assert [asked.token_ids for asked in cold] == expected
    assert not any(asked.cached for asked in cold)
    first.stop()

    second = node.engine("second")
    hits = answers(second, PROMPTS, ANSWER)
    assert [asked.token_ids for asked in hits] == hit_expected
    assert whole(hits, PROMPTS)
    second.stop()
    assert node.statistics()["integrity_failures_total"] == 0

    node.spoil()
    blind = node.engine("blind", verify=False)
    assert [asked.token_ids for asked in answers(blind, PROMPTS, ANSWER)] != hit_expected, "the control: unchecked, the changed bytes are believed"
    blind.stop()
    third = node.engine("third")
    again = answers(third, PROMPTS, ANSWER)
    assert [asked.token_ids for asked in again] == expected
    assert not any(asked.cached for asked in again)
    assert node.statistics()["integrity_failures_total"] > 0
    third.empty_hbm()
    assert whole(answers(third, PROMPTS, ANSWER), PROMPTS)
    third.stop()
