"""What makes vLLM compute in float32 on a GPU, so that tokens don't hang on how a prompt was parted into steps, pulls and batches."""

from __future__ import annotations

OPTIONS = {"dtype": "float32", "attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.15, "disable_hybrid_kv_cache_manager": True}
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "TRITON_F32_DEFAULT": "ieee"}
"""Triton multiplies float32 as TF32 unless told otherwise, whose ten bits flip a token as bf16's seven do, batch-invariant or not."""
