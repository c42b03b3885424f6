"""LoRA: the base model and two adapters answer one prompt each in its own way, as plain vLLM does, and none is served another's KV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from adapters import make_adapter
from live import CHAT, Live, ask

from cachebus.engine.adapters import read_adapters
from cachebus.engine.command import adapter_arguments, installed_vllm
from deploy.cli import resolved
from deploy.launcher import private_run_dir
from deploy.model import make_model
from deploy.reference import PlainEngine, Variant
from deploy.settings import read_settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
LAYERS = 2
NAMES = ("base", "french", "poems")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A prefill and a decode worker, and plain vLLM, all with the same adapters."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    folder: Path = tmp_path_factory.mktemp("adapters")
    (folder / "base").mkdir()
    make_model(folder / "base", layers=LAYERS)
    adapters = [f"{name}={make_adapter(folder / name, LAYERS, seed)}" for seed, name in enumerate(NAMES[1:])]
    overrides = [
        *(f"model.name={folder / 'base'}", "model.served_name=base", f"model.adapters={msgspec.json.encode(adapters).decode()}"),
        *("router.policy=least_loaded", "router.port=0", "router.prefill_tokens_min=512", "cache.max_local_cpu_size=0.2"),
        *("prefill.count=1", "decode.count=1", "prefill.drain_seconds_max=5"),
    ]
    settings = read_settings(None, overrides, {})
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    variant = Variant(adapter_arguments(read_adapters(settings.model, installed_vllm(), {})))
    with private_run_dir(settings) as private:
        live = Live(private, folder)
        live.plain = PlainEngine(settings.model, settings.decode, folder / "plain.log", variant)
        live.start()
        yield live
        live.stop()


def answers(live: Live, prompt: str, **fields: Any) -> dict[str, list[int]]:
    return {name: live.plains(live.body(prompt, **fields) | {"model": name}).token_ids for name in NAMES}


def test_each_adapter_has_kv_of_its_own(cluster: Live) -> None:
    prompt = cluster.prompts.text(700)
    expected = answers(cluster, prompt)
    # KV of a wrong name would be seen: the prompt is the same, the answers are not.
    assert len(set(map(tuple, expected.values()))) == len(NAMES)
    keys: list[set[bytes]] = []
    for name in NAMES:
        before = set(cluster.snapshot().keys["dram"])
        cold = ask(cluster.cluster.url, "/v1/completions", cluster.body(prompt) | {"model": name})
        assert (cold.token_ids, cold.headers["x-headstart-route"], cold.headers["x-headstart-cached-tokens"]) == (
            expected[name],
            "prefill+decode",
            "0",
        )
        keys.append(set(cluster.snapshot().keys["dram"]) - before)
    # Whatever was stored for one has keys that no other one's has.
    assert all(len(mine) >= 2 for mine in keys)
    assert len(set.union(*keys)) == sum(map(len, keys))
    cluster.empty_hbm()
    for name in reversed(NAMES):
        hit = ask(cluster.cluster.url, "/v1/completions", cluster.body(prompt) | {"model": name})
        assert (hit.token_ids, hit.headers["x-headstart-cache-source"]) == (expected[name], "dram")
        assert hit.headers["x-headstart-cached-tokens"] == "699"


def test_chats_and_messages_find_adapters_too(cluster: Live) -> None:
    messages = [{"role": "user", "content": cluster.prompts.text(600)}]
    for name in NAMES:
        body = cluster.body(messages=messages) | {"model": name}
        assert cluster.ours(body, CHAT).token_ids == cluster.plains(body, CHAT).token_ids
        assert cluster.ours(body, CHAT).headers["x-headstart-route"] == "decode"
        asked = {"model": name, "max_tokens": 8, "temperature": 0, "messages": messages}
        ours, plain = (cluster.post(url, asked, "/v1/messages") for url in (cluster.cluster.url, cluster.plain.url))
        assert ours["content"] == plain["content"]
