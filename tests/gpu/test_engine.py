"""Real engines on the GPU with weights whose tokens depend on the KV: hits give plain vLLM's tokens, and what was changed is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cachebus.client import BusClient
from cachebus.engine.command import WorkerSpec, transfer_config
from cachebus.messages import Stat, StatReply
from cachebus.region import Region
from cachebus.settings import SecuritySettings
from cachebus.table import State
from deploy.bench.offline import Asked, OfflineEngine
from deploy.cli import resolved
from deploy.launcher import Cluster, private_run_dir
from deploy.settings import Settings, read_settings

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
PROMPTS = [(1, 705), (2, 2049), (3, 5009), (4, 9009)]
"""Seed and length. A block and one token: then a hit in HBM leaves as much to compute as one from the region, and both round alike."""
ANSWER = 24


class Node:
    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.cluster = Cluster(settings, folder)
        self.cluster.start_bus(print)

    def engine(self, name: str, *, connected: bool = True, verify: bool = True) -> OfflineEngine:
        security = SecuritySettings(verify_digests=verify)
        spec = WorkerSpec(name, "decode", self.settings.model, self.settings.decode, self.settings.cache, security, self.cluster.run_dir)
        options: dict[str, Any] = {
            "model": self.settings.model.name,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 16384,
            "gpu_memory_utilization": 0.15,
            "disable_hybrid_kv_cache_manager": True,
        }
        if connected:
            options["kv_transfer_config"] = transfer_config(spec)
        environment = {"VLLM_BATCH_INVARIANT": "1", "PYTHONHASHSEED": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        return OfflineEngine(options, self.folder / f"{name}.log", environment)

    def statistics(self) -> dict[str, float]:
        client = BusClient(self.cluster.run_dir, "test")
        reply = client.call(Stat(), 5000)
        client.close()
        assert isinstance(reply, StatReply)
        return reply.values

    def spoil(self) -> None:
        """Swaps the halves of every committed chunk: values that a model takes for good, of other tokens and layers."""
        region = Region.map(self.settings.cache.resolved_region_path({}))
        for _, record in region.table.read():
            if record.state == State.COMMITTED:
                middle, end = record.offset + record.length // 2, record.offset + record.length
                region.data[record.offset : end] = bytes(region.data[middle:end]) + bytes(region.data[record.offset : middle])
        region.close()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    settings = read_settings(None, ["cache.max_local_cpu_size=2.0"], {})
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    with private_run_dir(settings) as private:
        node = Node(private, tmp_path_factory.mktemp("logs"))
        yield node
        node.cluster.stop()


def answers(engine: OfflineEngine) -> list[Asked]:
    return [engine.ask(seed, tokens, ANSWER) for seed, tokens in PROMPTS]


def whole(asked: list[Asked]) -> bool:
    """Whether all but the last token of each prompt were had; vLLM 0.25.1 counts that one, too."""
    return all(tokens - 1 <= one.cached <= tokens for one, (_, tokens) in zip(asked, PROMPTS, strict=True))


def test_hits_give_the_tokens_of_plain_vllm_and_changed_chunks_are_computed_again(node: Node) -> None:
    plain = node.engine("plain", connected=False)
    expected = [asked.token_ids for asked in answers(plain)]
    hit_expected = [asked.token_ids for asked in answers(plain)]
    plain.stop()
    assert len({tuple(ids) for ids in expected}) == len(expected), "the control: prompts that are answered alike would prove nothing"

    first = node.engine("first")
    cold = answers(first)
    assert [asked.token_ids for asked in cold] == expected
    assert not any(asked.cached for asked in cold)
    first.stop()

    second = node.engine("second")
    hits = answers(second)
    assert [asked.token_ids for asked in hits] == hit_expected
    assert whole(hits)
    second.stop()
    assert node.statistics()["integrity_failures_total"] == 0

    node.spoil()
    blind = node.engine("blind", verify=False)
    assert [asked.token_ids for asked in answers(blind)] != hit_expected, "the control: without the check the changed bytes are believed"
    blind.stop()
    third = node.engine("third")
    again = answers(third)
    assert [asked.token_ids for asked in again] == expected
    assert not any(asked.cached for asked in again)
    assert node.statistics()["integrity_failures_total"] > 0
    third.empty_hbm()
    assert whole(answers(third))
    third.stop()
