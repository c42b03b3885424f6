"""LoRA, and tools, which need engines of their own.

The base model and two adapters answer one prompt each in its own way, as plain vLLM does, and none is served another's KV.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from adapters import make_adapter
from live import CHAT, Live, ask

from cachebus.engine.adapters import read_adapters
from cachebus.engine.command import adapter_arguments, installed_vllm
from deploy.cli import resolved
from deploy.launcher import private_run_dir
from deploy.model import TURN_END, alphabet, make_model
from deploy.reference import PlainEngine, Variant
from deploy.settings import read_settings

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
LAYERS = 2
NAMES = ("base", "french", "poems")
ONE_FORM = '{"backend": "xgrammar", "disable_any_whitespace": true}'
PARSES_TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "internlm", "--structured-outputs-config", ONE_FORM]
TOOL = {"type": "object", "properties": {"far": {"enum": [True, False]}}, "required": ["far"], "additionalProperties": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A prefill and a decode worker, and plain vLLM, all with the same adapters."""
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    folder: Path = tmp_path_factory.mktemp("adapters")
    (folder / "base").mkdir()
    make_model(folder / "base", layers=LAYERS)
    # A grammar that is fulfilled needs a token to end with.
    add(folder / "base" / "tokenizer_config.json", eos_token=TURN_END)
    add(folder / "base" / "config.json", eos_token_id=alphabet().index(TURN_END))
    adapters = [f"{name}={make_adapter(folder / name, LAYERS, seed)}" for seed, name in enumerate(NAMES[1:])]
    overrides = [
        *(f"model.name={folder / 'base'}", "model.served_name=base", f"model.adapters={msgspec.json.encode(adapters).decode()}"),
        *("router.policy=least_loaded", "router.port=0", "router.prefill_tokens_min=512", "cache.max_local_cpu_size=0.2"),
        *("prefill.count=1", "decode.count=1", "prefill.drain_seconds_max=5"),
        f"decode.engine_args={msgspec.json.encode(PARSES_TOOLS).decode()}",
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


def add(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


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


def test_a_forced_tool_call_comes_through_in_each_apis_form(cluster: Live) -> None:
    """The random model says nothing of its own accord that a parser knows; made to call, its grammar leaves it one word to choose."""
    messages, most = [{"role": "user", "content": cluster.prompts.text(600)}], 60
    called = []
    for url in (cluster.cluster.url, cluster.plain.url):
        asked: dict[str, Any] = {"model": "base", "max_tokens": most, "temperature": 0, "messages": messages}
        function = {"name": "travel", "parameters": TOOL}
        chosen = {"type": "function", "function": {"name": "travel"}}
        chat = openai.OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
            **asked, tools=[{"type": "function", "function": function}], tool_choice=chosen
        )
        (call,) = chat.choices[0].message.tool_calls
        message = anthropic.Anthropic(base_url=url, api_key="none").messages.create(
            **{name: value for name, value in asked.items() if name != "temperature"},
            extra_body={"temperature": 0},
            tools=[{"name": "travel", "input_schema": TOOL}],
            tool_choice={"type": "tool", "name": "travel"},
        )
        (use,) = [block for block in message.content if block.type == "tool_use"]
        called.append((call.function.name, json.loads(call.function.arguments), use.name, use.input, message.stop_reason))
    assert called[0] == called[1]
    assert called[0][1] == called[0][3] in ({"far": True}, {"far": False})
