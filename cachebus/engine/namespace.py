"""What an engine's KV means (its namespace) and how the bytes lie (its layout), as named parts.

The namespace is everything that changes the values in a block, so it is part of every key: two engines that differ in
one part never share a chunk. The layout is how one engine keeps those values: blocks of another layout are a miss.
The parts travel at registration, so that a difference can be refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from cachebus.engine.weights import weights_identity
from cachebus.keys import namespace_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

LAYOUT_DIGEST_BYTES = 16


def namespace_parts(config: VllmConfig) -> dict[str, str]:
    """The parts of the namespace. Reads the weights' files (see ``cachebus.engine.weights``)."""
    from vllm.version import __version__

    model = config.model_config
    ranks = config.parallel_config.tensor_parallel_size
    return {
        "weights": weights_identity(model.model, model.revision or "", dummy=config.load_config.load_format == "dummy"),
        "model dtype": str(model.dtype),
        "KV dtype": config.cache_config.cache_dtype,
        "quantization": str(model.quantization),
        "config overrides": json.dumps(model.hf_overrides, sort_keys=True, default=str) if model.hf_overrides else "",
        # The ranks' parts of a chunk are whole only together, so engines with more or fewer have other chunks.
        **({"tensor parallel size": str(ranks)} if ranks > 1 else {}),
        # Also the base model's own KV is then made by other layers; that the values are the same nobody has shown.
        **({"LoRA": "on"} if config.lora_config is not None else {}),
        "engine": f"vllm {__version__} on {config.device_config.device_type}",
    }


def layout_parts(kv_caches: Mapping[str, torch.Tensor], spec: KVCacheSpec, block_size: int) -> dict[str, str]:
    """The parts of the layout, as the worker sees its tensors."""
    first = next(iter(kv_caches.values()))
    parts = {
        "block size": str(block_size),
        "layers": str(len(kv_caches)),
        "block shape": str(tuple(first.shape[1:])),
        "block strides": str(first.stride()[1:]),
        "element type": str(first.dtype),
        "spec": f"{type(spec).__name__} {spec.page_size_bytes}",
    }
    if first.device.type == "cpu":
        # The CPU's attention kernels pack K by instruction set, so a block made with AMX is noise without it.
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        parts["instruction set"] = f"{torch.backends.cpu.get_cpu_capability()}{' AMX' if amx else ''}"
    return parts


def layout_digest(parts: dict[str, str]) -> bytes:
    """The layout's digest, 16 bytes."""
    return namespace_digest(parts)[:LAYOUT_DIGEST_BYTES]
