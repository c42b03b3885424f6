"""Messages and responses at simulated workers, through the router and the official clients: every token is the one that all KV read gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from router_under_test import RouterUnderTest
from sim_cluster import PROFILE, SimCluster, right
from tests_shared import Bus

from deploy.sim.vocabulary import chat_prompt, text_of

SYSTEM, LONG = "be brief", "word " * 400
CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": LONG}]
COUNT = 6


@pytest.fixture
def router(bus: Bus, sims: SimCluster) -> Iterator[RouterUnderTest]:
    sims.launch("p", "prefill")
    sims.launch("d", "decode", 2)
    sims.ready(3)
    router = RouterUnderTest(bus, policy="least_loaded")
    router.knows(3)
    yield router
    router.stop()


def expected() -> str:
    return text_of(right(chat_prompt(CHAT), COUNT))


def test_messages(router: RouterUnderTest) -> None:
    client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{router.port}", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": PROFILE.model, "max_tokens": COUNT, "system": SYSTEM, "messages": CHAT[1:]}
    cold = client.messages.with_raw_response.create(**asked)
    assert cold.headers["x-headstart-route"] == "prefill+decode"
    assert [block.text for block in cold.parse().content if block.type == "text"] == [expected()]
    prompt = len(chat_prompt(CHAT))
    assert (
        cold.parse().usage.input_tokens
        == prompt
        == client.messages.count_tokens(**{k: v for k, v in asked.items() if k != "max_tokens"}).input_tokens
    )
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected()
        usage = stream.get_final_message().usage
    assert (usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens) == (prompt, COUNT)
    assert (usage.cache_read_input_tokens or 0) > prompt - PROFILE.block_size
    stop = expected()[4:7]
    stopped = client.messages.create(**asked, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)


def test_responses(router: RouterUnderTest) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{router.port}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": PROFILE.model, "max_output_tokens": COUNT, "instructions": SYSTEM, "input": LONG}
    cold = client.responses.with_raw_response.create(**asked)
    assert cold.headers["x-headstart-route"] == "prefill+decode"
    assert cold.parse().output_text == expected()
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected()
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.usage is not None
    assert last.response.usage.input_tokens_details.cached_tokens > len(chat_prompt(CHAT)) - PROFILE.block_size
