"""OpenAI's /v1/responses: routed as chats are; what would need a stored response is refused by name. And what engines answer without KV."""

from __future__ import annotations

import json
from typing import Any

import pytest
from router_under_test import MakeEngine, RouterUnderTest

from router.prompts import is_cacheable

RESPONSES = "/v1/responses"
LONG = "x" * 1100


def asked(given: Any = LONG, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **fields}


def events(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for event in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_cold_response_goes_through_prefill_and_a_known_one_straight_to_decode(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    status, headers, raw = router.post(asked(store=True), RESPONSES)
    assert (status, headers["x-headstart-route"], headers["x-headstart-cached-tokens"]) == (200, "prefill+decode", "0")
    answer = json.loads(raw)
    assert answer["usage"]["input_tokens"] == 1100
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 0, "cached_tokens_per_turn": []}
    assert answer["kv_transfer_params"] is None
    (leg,) = prefill.bodies
    assert decode.bodies[0]["kv_transfer_params"]["prompt_token_ids"] == leg["prompt"] == [ord("x")] * 1100
    assert decode.bodies[0]["store"] is False

    _, headers, raw = router.post(asked(stream=True), RESPONSES)
    assert (headers["x-headstart-route"], headers["x-headstart-cached-tokens"]) == ("decode", "1099")
    said = events(raw)
    assert [name for name, _ in said] == [f"response.{name}" for name in ("created", "in_progress", *2 * ["output_text.delta"], "completed")]
    assert said[-1][1]["response"]["usage"]["input_tokens_details"]["cached_tokens"] == 1099
    assert decode.bodies[1]["store"] is False
    assert len(prefill.bodies) == 1


@pytest.mark.parametrize("name", ["background", "previous_response_id"])
def test_what_needs_a_stored_response_is_refused_by_name(make_engine: MakeEngine, router: RouterUnderTest, name: str) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    status, _, raw = router.post(asked("short", **{name: "resp_1"}), RESPONSES)
    assert (status, json.loads(raw)["error"]["param"], json.loads(raw)["error"]["code"]) == (400, name, "not_stored")
    assert decode.bodies == []
    assert router.post(asked("short", **{name: None}), RESPONSES)[0] == 200


def test_there_are_no_stored_responses(router: RouterUnderTest) -> None:
    status, raw = router.get(f"{RESPONSES}/resp_1")
    assert (status, json.loads(raw)["error"]["code"]) == (404, "not_stored")
    status, _, raw = router.post({}, f"{RESPONSES}/resp_1/cancel")
    assert (status, json.loads(raw)["error"]["code"]) == (404, "not_stored")


def test_a_worker_that_dies_before_the_first_token_is_replaced_though_it_said_something(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    broken, _ = make_engine("a", "decode"), make_engine("b", "decode")
    router.knows(2)
    broken.die_after_pieces = 2
    for _ in range(3):
        status, headers, raw = router.post(asked("short", stream=True), RESPONSES)
        assert (status, headers["x-headstart-worker"]) == (200, "b")
        assert [event["sequence_number"] for _, event in events(raw)] == [0, 1, 2, 3, 4]
    assert broken.bodies


def test_a_worker_that_dies_later_is_an_error_event_with_the_next_number(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.die_after_pieces = 4
    _, _, raw = router.post(asked("short", stream=True, temperature=0), RESPONSES)
    name, event = events(raw)[-1]
    assert (name, event["type"], event["code"], event["sequence_number"]) == ("error", "error", "worker_died", 4)


TEXT = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}


@pytest.mark.parametrize(
    ("fields", "cacheable"),
    [
        ({"input": "a"}, True),
        ({"input": [TEXT, {"type": "function_call", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "output": "1"}]}, True),
        ({"input": [TEXT, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]}]}, True),
        ({"input": "a", "tools": [{"type": "function", "name": "f"}]}, True),
        ({"input": "a", "tools": [{"type": "code_interpreter"}]}, False),
        ({"input": "a", "tools": "all"}, False),
        ({"input": [TEXT, IMAGE]}, False),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_image"}]}]}, False),
        ({"input": [TEXT, {"type": "item_reference", "id": "i"}]}, False),
        ({"input": "a", "previous_input_messages": []}, False),
    ],
)
def test_which_responses_may_be_looked_up(fields: dict[str, Any], cacheable: bool) -> None:
    assert is_cacheable(RESPONSES, fields) is cacheable


def test_what_engines_do_without_kv_goes_to_any_of_them_as_it_came(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    for path in ("/v1/embeddings", "/tokenize", "/detokenize"):
        body = {"model": "m", "input": LONG, "prompt": LONG}
        status, headers, raw = router.post(body, path)
        assert (status, json.loads(raw)) == (200, {"input_tokens": 5})
        assert headers["x-request-id"]
        assert decode.bodies[-1] == body
    assert prefill.bodies == []


def test_a_model_that_does_not_embed_says_so(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.lacks_route = True
    status, _, raw = router.post({"model": "m", "input": "a"}, "/v1/embeddings")
    error = json.loads(raw)["error"]
    assert (status, error["code"]) == (404, "unsupported_by_model")
    assert error["message"] == "The model `m` does not serve /v1/embeddings."


@pytest.mark.parametrize(
    ("messages", "cacheable"),
    [
        ([{"role": "user", "content": "a"}, {"type": "message", "role": "user", "content": [{"type": "text", "text": "a"}]}], True),
        ([{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}, {"role": "tool", "content": "1"}], True),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]}], False),
        ([{"role": "user", "content": [{"image_url": "data:"}]}], False),
        ([{"role": "user", "content": [{"type": ["text"]}]}], False),
    ],
)
def test_which_chats_may_be_looked_up(messages: list[Any], cacheable: bool) -> None:
    assert is_cacheable("/v1/chat/completions", {"messages": messages}) is cacheable
