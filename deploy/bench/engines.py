"""The systems that benchmarks of many requests measure, each as a context with its engines. One runs at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from cachebus import holder
from cachebus.client import BusClient
from cachebus.engine.command import WorkerSpec, reserved_cpus, transfer_config
from cachebus.errors import HeadstartError, SettingsError
from cachebus.messages import Reply, Request, Stat, StatReply
from cachebus.messages_tools import Clear
from cachebus.wire import Tier
from deploy.bench import goals, systems
from deploy.bench.streaming import StreamingEngine
from deploy.launcher import Cluster, private_run_dir
from deploy.settings import Settings

_OFFLOADING_BLOCK_TOKENS = 16
_STAT_MS = 5000
_RELEASE_SECONDS_MAX, _POLL_SECONDS = 30.0, 0.05


@dataclass(frozen=True)
class Place:
    """How a system's engines are started, and where their output goes."""

    settings: Settings
    logs: Path
    load_format: str = "auto"
    kv_cache_bytes: int = 0
    """What an engine may keep in its own memory; 0: what it takes, on CPU ``prefill.kv_cache_gb``."""
    workers: int = 1
    """Engines of a system whose engines share a cache."""

    @property
    def dram_gigabytes(self) -> float:
        """What a system with a tier in DRAM gets for it."""
        return self.settings.cache.max_local_cpu_size


System = Callable[[Place], AbstractContextManager[list[StreamingEngine]]]


@contextmanager
def plain(place: Place) -> Iterator[list[StreamingEngine]]:
    """vLLM alone, with its own prefix cache."""
    with ExitStack() as stack:
        yield [_engine(stack, place, "vllm")]


@contextmanager
def control(place: Place) -> Iterator[list[StreamingEngine]]:
    """The same without the budget."""
    with ExitStack() as stack:
        yield [_engine(stack, replace(place, kv_cache_bytes=0), "control")]


@contextmanager
def offloading(place: Place) -> Iterator[list[StreamingEngine]]:
    """vLLM's OffloadingConnector, which keeps KV in the engine's own DRAM; on a GPU only."""
    with ExitStack() as stack:
        yield [_engine(stack, place, goals.OFFLOADING, offloading_transfer(place.dram_gigabytes))]


@contextmanager
def lmcache(place: Place) -> Iterator[list[StreamingEngine]]:
    """vLLM with LMCache's server mode; LMCache must be installed beside vLLM."""
    with ExitStack() as stack:
        port = stack.enter_context(systems.lmcache_server(place.settings, place.logs, gigabytes=max(1, int(place.dram_gigabytes))))
        yield [_engine(stack, place, goals.LMCACHE, systems.lmcache_transfer(port))]


@contextmanager
def headstart_hbm(place: Place) -> Iterator[list[StreamingEngine]]:
    """The same with engines that read each other's blocks. Raises HeadstartError also where less than half of what they read was still there."""
    cache = msgspec.structs.replace(place.settings.cache, handover="hbm")
    with headstart(replace(place, settings=msgspec.structs.replace(place.settings, cache=cache))) as engines:
        yield engines


@contextmanager
def headstart(place: Place) -> Iterator[list[StreamingEngine]]:
    """A cache bus and ``place.workers`` engines. Raises HeadstartError where a chunk did not match its digest."""
    with private_run_dir(place.settings) as private, ExitStack() as stack:
        cluster = Cluster(private, place.logs)
        cluster.start_bus(lambda text: None)
        stack.callback(cluster.stop)
        stack.callback(await_released, cluster.run_dir)
        engines = []
        for number in range(place.workers):
            spec = WorkerSpec(f"bench-{number}", "decode", private.model, private.decode, private.cache, private.security, cluster.run_dir)
            # Engines that are told how much memory to take may start at once; others look at what is free.
            engines.append(_engine(stack, place, f"headstart-{number}", transfer_config(spec), wait=not place.kv_cache_bytes))
        for engine in engines if place.kv_cache_bytes else []:
            engine.await_ready()
        yield engines
        counted = statistics(cluster.run_dir)
        if failures := counted["integrity_failures_total"]:
            raise HeadstartError(f"{failures:g} chunks did not match their digest where they arrived")
        granted, stale = counted["offers_granted_total"], counted["offers_stale_total"]
        if private.cache.handover == "hbm" and stale * 2 >= granted:
            raise HeadstartError(f"of {granted:g} chunks that were offered {stale:g} were not there when they were read")


KNOWN: dict[str, System] = {
    goals.CONTROL: control,
    goals.PLAIN: plain,
    goals.OURS: headstart,
    goals.OURS_HBM: headstart_hbm,
    goals.OFFLOADING: offloading,
    goals.LMCACHE: lmcache,
}


def offloading_transfer(gigabytes: float) -> dict[str, Any]:
    """What switches vLLM's OffloadingConnector on, with so much DRAM."""
    extra = {"cpu_bytes_to_use": int(gigabytes * 1e9), "block_size": _OFFLOADING_BLOCK_TOKENS}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def await_released(run_dir: Path) -> None:
    """Waits until no engine holds the region: killed ones take a while to give their memory back, and the bus leaves behind what is held."""
    deadline = time.monotonic() + _RELEASE_SECONDS_MAX
    while holder.living(run_dir) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """The systems that ``--systems`` names. Raises SettingsError."""
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SettingsError(f"--systems: {unknown[0]!r} is unknown; there are: {', '.join(known)}")
    return wanted


def engine_options(place: Place, transfer: dict[str, Any] | None) -> dict[str, Any]:
    """vLLM's options for an engine without a tokenizer, the same for every system but for ``transfer``."""
    model, pool = place.settings.model, place.settings.prefill
    given = {
        "dtype": model.dtype,
        "kv_cache_dtype": model.kv_cache_dtype,
        "max_model_len": model.max_model_len,
        "block_size": model.block_size,
        "max_num_batched_tokens": pool.max_num_batched_tokens,
        "kv_cache_memory_bytes": place.kv_cache_bytes,
        "kv_transfer_config": transfer,
    }
    return {
        "model": model.name,
        "load_format": place.load_format,
        "skip_tokenizer_init": True,
        "enforce_eager": model.enforce_eager,
        "enable_prefix_caching": True,
        "disable_hybrid_kv_cache_manager": True,
        "gpu_memory_utilization": pool.gpu_memory_utilization,
        **{name: value for name, value in given.items() if value},
    }


def environment(place: Place) -> dict[str, str | None]:
    """An engine's environment, over this process's own; the same for every system."""
    return {
        "PYTHONHASHSEED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # On CPU vLLM takes whole GiB from here, and prefers them to a budget in bytes.
        "VLLM_CPU_KVCACHE_SPACE": None if place.kv_cache_bytes else str(place.settings.prefill.kv_cache_gb),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": str(reserved_cpus(len(os.sched_getaffinity(0)))),
    }


def _engine(stack: ExitStack, place: Place, name: str, transfer: dict[str, Any] | None = None, *, wait: bool = True) -> StreamingEngine:
    engine = StreamingEngine(engine_options(place, transfer), place.logs / f"{name}.log", environment(place))
    stack.callback(engine.stop)
    if wait:
        engine.await_ready()
    return engine


def statistics(run_dir: Path) -> dict[str, float]:
    """The bus's own counts."""
    reply = _asked(run_dir, Stat())
    assert isinstance(reply, StatReply)
    return reply.values


def clear(run_dir: Path, tiers: list[Tier]) -> None:
    """Drops all chunks of some tiers."""
    _asked(run_dir, Clear(tiers))


def _asked(run_dir: Path, request: Request) -> Reply:
    client = BusClient(run_dir, "bench")
    try:
        return client.call(request, _STAT_MS)
    finally:
        client.close()
