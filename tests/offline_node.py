"""A node with a bus and engines without servers, for tests that start one engine after the other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cachebus.client import BusClient
from cachebus.engine.command import WorkerSpec, transfer_config
from cachebus.messages import Stat, StatReply
from cachebus.region import Region
from cachebus.settings import SecuritySettings
from cachebus.table import State
from deploy.bench import engines
from deploy.bench.offline import Asked, OfflineEngine
from deploy.bench.streaming import StreamingEngine
from deploy.cli import resolved
from deploy.launcher import Cluster, private_run_dir
from deploy.settings import Settings, read_settings


class OfflineNode:
    """Its engines have ``options`` (those of ``vllm.LLM``) in common and run with ``environment``."""

    def __init__(self, settings: Settings, folder: Path, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.settings, self.folder = settings, folder
        self._options, self._environment = options, environment
        self.cluster = Cluster(settings, folder)

    def engine(self, name: str, *, connected: bool = True, verify: bool = True) -> OfflineEngine:
        return OfflineEngine(*self._start(name, connected, verify, {}))

    def streaming(self, name: str, *, connected: bool = True, verify: bool = True, **options: Any) -> StreamingEngine:
        engine = StreamingEngine(*self._start(name, connected, verify, options))
        engine.await_ready()
        return engine

    def _start(self, name: str, connected: bool, verify: bool, more: Mapping[str, Any]) -> tuple[dict[str, Any], Path, dict[str, str]]:
        security = SecuritySettings(verify_digests=verify)
        spec = WorkerSpec(name, "decode", self.settings.model, self.settings.decode, self.settings.cache, security, self.cluster.run_dir)
        transfer = {"kv_transfer_config": transfer_config(spec)} if connected else {}
        options = {"model": self.settings.model.name, "skip_tokenizer_init": True, "enforce_eager": True, **self._options, **more, **transfer}
        return options, self.folder / f"{name}.log", {"PYTHONHASHSEED": "0", **self._environment}

    def statistics(self) -> dict[str, float]:
        client = BusClient(self.cluster.run_dir, "test")
        reply = client.call(Stat(), 5000)
        client.close()
        assert isinstance(reply, StatReply)
        return reply.values

    def spoil(self, keys: Sequence[bytes] = (), share: float = 1.0) -> None:
        """Swaps the halves of committed chunks: values that a model takes for good, of other tokens and layers.

        Of those with these keys, where there are any; of the others a ``share`` by chance.
        """
        chance = random.Random(3)
        region = Region.map(self.settings.cache.resolved_region_path({}))
        for _, record in region.table.read():
            if record.state == State.COMMITTED and (record.key in keys if keys else chance.random() < share):
                middle, end = record.offset + record.length // 2, record.offset + record.length
                region.data[record.offset : end] = bytes(region.data[middle:end]) + bytes(region.data[record.offset : middle])
        region.close()


def answers(engine: OfflineEngine, prompts: Sequence[tuple[int, int]], tokens: int) -> list[Asked]:
    """The answers to prompts of those seeds and lengths, one after the other."""
    return [engine.ask(seed, length, tokens) for seed, length in prompts]


def whole(asked: Sequence[Asked], prompts: Sequence[tuple[int, int]]) -> bool:
    """Whether all but the last token of each prompt were had; vLLM counts that one, too, where it was pulled with the rest."""
    return all(tokens - 1 <= one.cached <= tokens for one, (_, tokens) in zip(asked, prompts, strict=True))


@contextmanager
def offline_node(
    gigabytes: float, folder: Path, options: Mapping[str, Any], environment: Mapping[str, str], overrides: Sequence[str] = ()
) -> Iterator[OfflineNode]:
    """A node whose bus runs, with the demo's model. ``overrides``: KEY=VALUE, as on the command line."""
    # On a busy machine a lookup may take longer than an engine should wait for one.
    settings = read_settings(None, [f"cache.max_local_cpu_size={gigabytes}", "cache.lookup_ms_max=3000", *overrides], {})
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    with private_run_dir(settings) as private:
        node = OfflineNode(private, folder, options, environment)
        node.cluster.start_bus(print)
        yield node
        engines.await_released(node.cluster.run_dir)
        node.cluster.stop()
