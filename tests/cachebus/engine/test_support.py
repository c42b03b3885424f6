from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cachebus.engine.support import check_config, proven_spec
from cachebus.errors import UnsupportedModel


def config(**changes: Any) -> Any:
    """The part of vLLM's configuration that is looked at, as an ordinary engine has it."""
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    parallel |= {name: value for name, value in changes.items() if name in parallel}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=changes.get("speculative_config"),
        model_config=SimpleNamespace(is_encoder_decoder=changes.get("is_encoder_decoder", False)),
        cache_config=SimpleNamespace(block_size=changes.get("block_size", 16), calculate_kv_scales=changes.get("calculate_kv_scales", False)),
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=changes.get("policy", "recompute")),
    )


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_an_ordinary_engine_is_taken(ranks: int) -> None:
    check_config(config(tensor_parallel_size=ranks), 256)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"speculative_config": object()}, "speculative"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"policy": "fail"}, "recompute"),
        ({"block_size": 48}, "model.block_size"),
    ],
)
def test_what_is_not_proven_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        check_config(config(**changes), 256)


class FullAttentionSpec(SimpleNamespace):
    """Stands for vLLM's class of this name, which is told by its name."""


class SlidingWindowSpec(SimpleNamespace):
    """The same."""


class MLAAttentionSpec(FullAttentionSpec):
    """A kind of full attention in vLLM, but its blocks are other ones."""


def groups(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def test_full_attention_is_the_proven_kind() -> None:
    spec = FullAttentionSpec(sliding_window=None)
    assert proven_spec(groups(spec)) is spec


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([FullAttentionSpec(), SlidingWindowSpec()], "hybrid"),
        ([SlidingWindowSpec()], "SlidingWindowSpec"),
        ([MLAAttentionSpec()], "MLAAttentionSpec"),
        ([FullAttentionSpec(sliding_window=512)], "sliding-window"),
        ([FullAttentionSpec(attention_chunk_size=512)], "chunked"),
        ([], "0 KV cache groups"),
    ],
)
def test_other_kv_is_refused_by_name(specs: list[Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        proven_spec(groups(*specs))
