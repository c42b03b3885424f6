"""Random LoRA adapters for the demo model, in PEFT's form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from deploy.model import HEAD_DIM, HEADS, HIDDEN, KV_HEADS

RANK = 8
_SIZES = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}


def make_adapter(folder: Path, layers: int, seed: int) -> Path:
    """Writes an adapter that changes queries, keys and values in every layer, far enough that answers differ."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none", "target_modules": sorted(_SIZES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(seed)
    weights = {}
    for layer in range(layers):
        for name, size in _SIZES.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = (generator.standard_normal((RANK, HIDDEN)) / HIDDEN**0.5).astype(np.float32)
            weights[f"{prefix}.lora_B.weight"] = (generator.standard_normal((size, RANK)) / RANK**0.5).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
