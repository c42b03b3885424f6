"""The official clients, as people use them, against the router over real engines: what they read is what plain vLLM answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from live import Live

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
Pair = tuple[Any, Any]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def openais(live: Live) -> Iterator[Pair]:
    """A client of ours and one of plain vLLM's."""
    made = [openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) for url in (live.cluster.url, live.plain.url)]
    yield made[0], made[1]
    for client in made:
        client.close()


@pytest.fixture(scope="module")
def anthropics(live: Live) -> Iterator[Pair]:
    """The same of Anthropic's."""
    made = [anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) for url in (live.cluster.url, live.plain.url)]
    yield made[0], made[1]
    for client in made:
        client.close()


def test_chats_whole_and_streamed(live: Live, openais: Pair) -> None:
    ours, plain = openais
    asked = {"model": live.model, "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": live.prompts.text(700)}]}
    expected = plain.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    raw = ours.chat.completions.with_raw_response.create(**asked, logprobs=True, top_logprobs=2)
    answer = raw.parse()
    assert raw.headers["x-headstart-route"] == "prefill+decode"
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert [token.token for token in answer.choices[0].logprobs.content] == [token.token for token in expected.choices[0].logprobs.content]
    text, usage = "", None
    for event in ours.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = event.usage or usage
        text += "".join(choice.delta.content or "" for choice in event.choices)
    assert text == expected.choices[0].message.content
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == expected.usage.prompt_tokens - 1


def test_completions_of_every_kind_of_prompt(live: Live, openais: Pair) -> None:
    one, two = (live.prompts.token_ids(live.prompts.text(tokens)) for tokens in (600, 300))
    texts = [live.prompts.text(600), live.prompts.text(20)]
    for prompt in (one, [one], [one, two], texts[0], texts[:1], texts):
        said = []
        for client in openais:
            answer = client.completions.create(model=live.model, prompt=prompt, max_tokens=4, temperature=0)
            said.append([(choice.index, choice.text) for choice in answer.choices])
        assert said[0] == said[1]
    for fields in ({"echo": True}, {"logprobs": 2}, {"extra_body": {"prompt_logprobs": 1}}):
        found = [client.completions.create(model=live.model, prompt=two, max_tokens=4, temperature=0, **fields).choices[0] for client in openais]
        assert found[0].text == found[1].text
        if "extra_body" in fields:
            assert len(found[0].prompt_logprobs) == len(two)
    drawn = openais[0].completions.create(model=live.model, prompt=one, max_tokens=4, temperature=1, seed=5, n=3)
    assert [choice.index for choice in drawn.choices] == [0, 1, 2]


def test_structured_output(live: Live, openais: Pair) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    # The demo model has no token to end with once the grammar is fulfilled.
    asked = {"model": live.model, "max_tokens": 3, "temperature": 0, "messages": [{"role": "user", "content": live.prompts.text(600)}]}
    ours, plain = (client.chat.completions.create(**asked, response_format=form).choices[0].message.content for client in openais)
    assert ours == plain
    assert ours.startswith("{")


def test_responses_whole_and_streamed(live: Live, openais: Pair) -> None:
    ours, plain = openais
    asked = {"model": live.model, "max_output_tokens": 8, "temperature": 0, "instructions": "be brief", "input": live.prompts.text(700)}
    expected = plain.responses.create(**asked)
    raw = ours.responses.with_raw_response.create(**asked)
    assert raw.headers["x-headstart-route"] == "prefill+decode"
    assert raw.parse().output_text == expected.output_text != ""
    events = list(ours.responses.create(**asked, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    usage = events[-1].response.usage
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (expected.usage.input_tokens, expected.usage.input_tokens - 1)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        ours.responses.create(**asked, previous_response_id=expected.id)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        ours.responses.retrieve(expected.id)


def test_what_the_model_does_not_do_is_said(live: Live, openais: Pair) -> None:
    ours, _ = openais
    assert [model.id for model in ours.models.list()] == [live.model]
    with pytest.raises(openai.NotFoundError, match="does not serve /v1/embeddings"):
        ours.embeddings.create(model=live.model, input="a")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ours.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="tool"):
        tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
        ours.chat.completions.create(model=live.model, messages=[{"role": "user", "content": "a"}], tools=tools)
    with pytest.raises(openai.BadRequestError, match="not a multimodal model"):
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        ours.chat.completions.create(model=live.model, messages=[{"role": "user", "content": [part]}])


def test_messages_whole_and_streamed(live: Live, anthropics: Pair) -> None:
    ours, plain = anthropics
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": live.prompts.text(700)}]}]
    asked = {"model": live.model, "max_tokens": 8, "extra_body": {"temperature": 0}, "system": "be brief", "messages": messages}
    expected = plain.messages.create(**asked)
    raw = ours.messages.with_raw_response.create(**asked)
    answer = raw.parse()
    assert raw.headers["x-headstart-route"] == "prefill+decode"
    assert answer.content[0].text == expected.content[0].text
    assert answer.stop_reason == "max_tokens"
    assert answer._request_id == raw.headers["x-request-id"]
    with ours.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected.content[0].text
        final = stream.get_final_message()
    prompt = answer.usage.input_tokens
    assert (final.usage.input_tokens, final.usage.cache_read_input_tokens, final.usage.output_tokens) == (1, prompt - 1, 8)
    counted = ours.messages.count_tokens(model=live.model, system="be brief", messages=messages)
    assert counted.input_tokens == prompt
    # The next turn begins where the last one ended.
    messages += [{"role": "assistant", "content": answer.content[0].text}, {"role": "user", "content": "go on"}]
    again = ours.messages.with_raw_response.create(**asked)
    assert again.headers["x-headstart-route"] == "decode"
    assert again.parse().content[0].text == plain.messages.create(**asked).content[0].text


def test_refusals_of_messages_are_anthropics_own(live: Live, anthropics: Pair) -> None:
    ours, _ = anthropics
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(anthropic.NotFoundError) as unknown:
        ours.messages.create(model="other", max_tokens=1, messages=messages)
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        ours.messages.create(model=live.model, max_tokens=-1, messages=messages)
    with pytest.raises(anthropic.BadRequestError, match="cache_salt"):
        ours.messages.create(model=live.model, max_tokens=1, messages=messages, extra_body={"cache_salt": "s"})
