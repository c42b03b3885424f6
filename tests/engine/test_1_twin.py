"""Twin runs: the same requests to Headstart and to plain vLLM, tokens exactly equal."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from typing import Any

import pytest
from live import CHAT, Live

from cachebus.keys import chunk_keys, root_key

pytestmark = pytest.mark.engine

CACHED = r'headstart_tokenized_bytes_total\{source="cached"\}'
EDGES = (100, 255, 256, 257, 384, 511, 512, 513, 640, 700, 1023, 1024, 1025, 1300, 2048)


def test_plain_vllm_equals_itself(live: Live) -> None:
    """The first thing to know of an oracle: cold, and from its own prefix cache, it gives the same tokens."""
    for tokens in (300, 700, 1300):
        body = live.body(live.prompts.text(tokens))
        assert live.plains(body).token_ids == live.plains(body).token_ids


def test_different_prompts_have_different_answers(live: Live) -> None:
    """An oracle that answers everything alike would prove nothing."""
    answers = {tuple(live.plains(live.body(live.prompts.text(300))).token_ids) for _ in range(6)}
    assert len(answers) == 6


@pytest.mark.parametrize("tokens", EDGES)
def test_cold_hit_elsewhere_and_hit_again(live: Live, tokens: int) -> None:
    body = live.body(live.prompts.text(tokens))
    expected = live.plains(body)
    assert expected.usage["prompt_tokens"] == tokens
    cold, elsewhere, again = (live.ours(body) for _ in range(3))
    assert [a.token_ids for a in (cold, elsewhere, again)] == [expected.token_ids] * 3
    assert cold.headers["x-headstart-route"] == ("prefill+decode" if tokens >= 512 else "decode")
    assert cold.headers["x-headstart-cached-tokens"] == "0"
    assert elsewhere.headers["x-headstart-worker"] != cold.headers["x-headstart-worker"]
    # The engine computes a prompt's last token itself; everything before it comes from the store, a partly filled block too.
    assert elsewhere.headers["x-headstart-cached-tokens"] == str(tokens - 1)
    assert elsewhere.headers["x-headstart-cache-source"] == "dram"
    for answer in (cold, elsewhere, again):
        assert answer.cached_tokens == int(answer.headers["x-headstart-cached-tokens"])
        assert answer.usage["prompt_tokens"] == tokens


def test_from_dram_alone_and_after_eviction(live: Live) -> None:
    bodies = [live.body(live.prompts.text(tokens)) for tokens in (512, 900, 1400)]
    expected = [live.plains(body).token_ids for body in bodies]
    assert [live.ours(body).token_ids for body in bodies] == expected
    live.empty_hbm()
    from_dram = [live.ours(body) for body in bodies]
    assert [answer.token_ids for answer in from_dram] == expected
    assert {answer.headers["x-headstart-cache-source"] for answer in from_dram} == {"dram"}
    # As many tokens as the region has room for push everything else out.
    while live.ours(live.body(live.prompts.text(8000), max_tokens=1)) and any(map(known(live), bodies)):
        pass
    live.empty_hbm()
    gone = [live.ours(body) for body in bodies]
    assert [answer.token_ids for answer in gone] == expected
    assert {answer.headers["x-headstart-cached-tokens"] for answer in gone} == {"0"}


def known(live: Live) -> Callable[[dict[str, Any]], bool]:
    """Whether the store has a prompt's first chunk."""
    reply = live.snapshot()

    def first_chunk(body: dict[str, Any]) -> bool:
        worker = reply.workers[0]
        ids = live.prompts.token_ids(body["prompt"])
        return chunk_keys(root_key(worker.namespace), ids, worker.chunk_size)[0] in reply.keys["dram"]

    return first_chunk


def test_a_chat_of_five_turns(live: Live) -> None:
    history = [{"role": "system", "content": live.prompts.text(700)}]
    for turn in range(5):
        history.append({"role": "user", "content": live.prompts.text(30)})
        body = live.body(messages=history, max_tokens=100)
        answer = live.ours(body, CHAT)
        assert answer.token_ids == live.plains(body, CHAT).token_ids
        if turn:
            assert answer.headers["x-headstart-route"] == "decode"
            assert int(answer.headers["x-headstart-cached-tokens"]) >= 640
        history.append({"role": "assistant", "content": answer.text})


def test_what_a_decode_worker_generated_is_a_hit_on_the_other(live: Live) -> None:
    prompt = live.prompts.text(200)
    first = live.ours(live.body(prompt, max_tokens=400))
    body = live.body(prompt + first.text)
    second = live.ours(body)
    assert second.headers["x-headstart-worker"] != first.headers["x-headstart-worker"]
    assert int(second.headers["x-headstart-cached-tokens"]) >= 512
    assert second.token_ids == live.plains(body).token_ids


@pytest.mark.parametrize("tokens", [200, 600, 1100])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"n": 2, "temperature": 0.9, "seed": 3}, id="n=2"),
        pytest.param({"logprobs": 3}, id="logprobs"),
        pytest.param({"temperature": 0.8, "seed": 7, "top_p": 0.9}, id="seed"),
        pytest.param({"min_tokens": 4, "max_tokens": 12, "repetition_penalty": 1.1}, id="penalties"),
        pytest.param({"prompt_logprobs": 1}, id="prompt logprobs"),
        pytest.param({"echo": True}, id="echo"),
    ],
)
def test_whole_answers_are_the_same(live: Live, tokens: int, fields: dict[str, object]) -> None:
    body = live.body(live.prompts.text(tokens), **{"return_token_ids": True, **fields})
    expected = live.post(live.plain.url, body)
    for _ in range(2):
        found = live.post(live.cluster.url, body)
        assert [c["token_ids"] for c in found["choices"]] == [c["token_ids"] for c in expected["choices"]]
        assert [c["text"] for c in found["choices"]] == [c["text"] for c in expected["choices"]]
        assert found["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
        assert set(found) == set(expected)
        for ours, plain in zip(found["choices"], expected["choices"], strict=True):
            if ours.get("logprobs"):
                pairs = zip(ours["logprobs"]["token_logprobs"], plain["logprobs"]["token_logprobs"], strict=True)
                assert all(a == b or abs(a - b) < 1e-3 for a, b in pairs)


@pytest.mark.parametrize("tokens", [300, 800])
def test_a_stop_string_ends_both_at_the_same_place(live: Live, tokens: int) -> None:
    prompt = live.prompts.text(tokens)
    whole = live.plains(live.body(prompt, max_tokens=24))
    body = live.body(prompt, max_tokens=24, stop=whole.text[9:11])
    expected = live.plains(body)
    assert len(expected.token_ids) < 24
    for _ in range(2):
        found = live.ours(body)
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)


def test_streamed_and_whole_answers_agree(live: Live) -> None:
    body = live.body(live.prompts.text(900), max_tokens=20)
    assert live.post(live.cluster.url, body)["choices"][0]["text"] == live.ours(body).text == live.plains(body).text


def test_structured_output_and_tools_pass_through(live: Live) -> None:
    """The grammar steers the decode leg alone; the demo model's text means nothing, but it must obey."""
    body = live.body(messages=[{"role": "user", "content": live.prompts.text(700)}], response_format={"type": "json_object"}, max_tokens=30)
    found, expected = (live.post(url, body, CHAT)["choices"][0] for url in (live.cluster.url, live.plain.url))
    assert found["message"]["content"] == expected["message"]["content"]
    assert found["message"]["content"].lstrip().startswith("{")


def test_a_prompt_longer_than_the_model_is_the_engines_own_400(live: Live) -> None:
    answers = []
    for url in (live.cluster.url, live.plain.url):
        with pytest.raises(urllib.error.HTTPError) as error:
            live.post(url, live.body([5] * 40_000))
        answers.append((error.value.code, error.value.read()))
    assert answers[0][0] == answers[1][0] == 400
    assert b"maximum context length" in answers[0][1]


def test_a_text_is_tokenised_once_by_each_worker(live: Live) -> None:
    system = {"role": "system", "content": live.prompts.text(6000)}
    for name, url in live.workers().items():
        known: list[float] = []
        for question in ("What is it?", "And what else is it?", "And what else is it?"):
            body = {"model": live.model, "messages": [system, {"role": "user", "content": f"{name}: {question}"}]}
            before = live.metric(url, CACHED)
            assert live.post(url, body, "/tokenize")["tokens"] == live.post(live.plain.url, body, "/tokenize")["tokens"]
            known.append(live.metric(url, CACHED) - before)
        assert known[0] == 0
        assert all(more > 4000 for more in known[1:])
    body = live.body(messages=[system, {"role": "user", "content": "What is it?"}])
    assert live.ours(body, CHAT).token_ids == live.plains(body, CHAT).token_ids
