"""Refuses by name every model and parallelism whose KV layout is not proven here: silence there corrupts KV."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachebus.errors import UnsupportedModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

PROVEN_SPEC = "FullAttentionSpec"
"""The KV cache spec of dense full attention, the one whose blocks twin runs have proven."""

_ONE_ONLY = {
    "pipeline_parallel_size": "pipeline parallelism",
    "data_parallel_size": "data parallelism",
    "decode_context_parallel_size": "decode context parallelism",
    "prefill_context_parallel_size": "prefill context parallelism",
}


def check_config(config: VllmConfig, chunk_size: int) -> None:
    """Raises UnsupportedModel for what is not proven, naming the engine argument that asked for it."""
    for name, text in _ONE_ONLY.items():
        value = getattr(config.parallel_config, name, 1)
        if value != 1:
            raise UnsupportedModel(f"{text} is not supported yet: {name} is {value}, set it to 1")
    if config.speculative_config is not None:
        raise UnsupportedModel("speculative decoding is not supported yet: remove speculative_config")
    if config.model_config.is_encoder_decoder:
        raise UnsupportedModel("encoder-decoder models are not supported")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedModel("calculate_kv_scales makes KV that only its own engine can read: remove it")
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_load_failure_policy != "recompute":
        raise UnsupportedModel("kv_load_failure_policy must be 'recompute': a chunk that fails its check is computed again")
    block_size = config.cache_config.block_size
    if chunk_size % block_size:
        raise UnsupportedModel(
            f"cache.chunk_size {chunk_size} is no multiple of the engine's block size {block_size}: "
            f"set cache.chunk_size to a multiple of it, or model.block_size to a divisor of {chunk_size}"
        )


def proven_spec(config: KVCacheConfig) -> KVCacheSpec:
    """The one KV cache spec of a model of full attention. Raises UnsupportedModel for any other."""
    groups = config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        raise UnsupportedModel(f"hybrid models are not supported yet: this one has {len(groups)} KV cache groups ({kinds})")
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != PROVEN_SPEC:
        raise UnsupportedModel(f"KV of {type(spec).__name__} is not supported yet, only of {PROVEN_SPEC}")
    if getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None):
        raise UnsupportedModel("sliding-window and chunked attention are not supported yet")
    return spec
