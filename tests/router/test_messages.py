"""Anthropic's /v1/messages and /v1/messages/count_tokens: routed, salted, counted and refused as chats are, in that API's own forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from router_under_test import MakeEngine, RouterUnderTest
from tenants_under_test import TenantsUnderTest
from tests_shared import Bus, wait_for

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
LONG = "x" * 1100


def asked(content: Any = LONG, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": content}], **fields}


def error(raw: bytes) -> dict[str, Any]:
    body = json.loads(raw)
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    found: dict[str, Any] = body["error"]
    return found


def events(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for event in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.fixture
def tenants(tmp_path: Path) -> TenantsUnderTest:
    found = TenantsUnderTest(tmp_path / "tenants.yaml")
    found.add("a", "tokens_per_minute: 60")
    return found


@pytest.fixture
def guarded(bus: Bus, tenants: TenantsUnderTest) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus, str(tenants.path))
    yield router
    router.stop()


def test_a_cold_message_goes_through_prefill_and_a_known_one_straight_to_decode(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    status, headers, raw = router.post(asked(system="be brief"), MESSAGES)
    assert (status, headers["x-headstart-route"], headers["x-headstart-cached-tokens"]) == (200, "prefill+decode", "0")
    assert headers["request-id"] == headers["x-request-id"]
    assert json.loads(raw)["usage"] == {"input_tokens": 1108, "output_tokens": 2, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    (leg,) = prefill.bodies
    assert leg["prompt"] == [ord(c) for c in "be brief" + LONG]
    assert decode.bodies[0]["kv_transfer_params"]["prompt_token_ids"] == leg["prompt"]
    assert decode.bodies[0]["system"] == "be brief"

    status, headers, raw = router.post(asked(system="be brief", stream=True), MESSAGES, {"x-headstart-explain": "1"})
    assert (status, headers["x-headstart-route"], headers["x-headstart-cached-tokens"]) == (200, "decode", "1107")
    assert headers["content-type"].startswith("text/event-stream")
    assert json.loads(headers["x-headstart-explanation"])
    names = [name for name, _ in events(raw)]
    blocks = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *blocks, "message_delta", "message_stop"]
    told = {"input_tokens": 1, "cache_read_input_tokens": 1107, "cache_creation_input_tokens": 0}
    assert events(raw)[0][1]["message"]["usage"] == told | {"output_tokens": 0}
    assert events(raw)[5][1]["usage"] == told | {"output_tokens": 2}
    assert len(prefill.bodies) == 1


def test_what_the_engine_renders_otherwise_or_not_at_all_goes_to_decode_as_it_came(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 2000}}
    parts = [{"type": "text", "text": LONG}, image]
    for body in (
        asked(thinking={"type": "disabled"}),
        asked(parts),
        asked([{"type": "tool_result", "tool_use_id": "t", "content": parts}]),
        asked([{"type": ["text"], "text": LONG}]),
    ):
        status, headers, _ = router.post(body, MESSAGES)
        assert (status, headers["x-headstart-route"]) == (200, "decode")
        assert "prompt_token_ids" not in decode.bodies[-1]["kv_transfer_params"]
        assert decode.bodies[-1]["messages"] == body["messages"]
    assert prefill.bodies == decode.rendered == []


def test_an_engine_that_renders_no_messages_gets_them_unrendered(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill", takes_ids=False), make_engine("d", "decode", takes_ids=False)
    router.knows(2)
    status, headers, _ = router.post(asked(), MESSAGES)
    assert (status, headers["x-headstart-route"]) == (200, "decode")
    assert prefill.bodies == decode.rendered == []


def test_such_an_engine_has_no_salt_for_messages_so_tenants_are_told_to_ask_elsewhere(
    make_engine: MakeEngine, guarded: RouterUnderTest, tenants: TenantsUnderTest
) -> None:
    decode = make_engine("d", "decode", takes_ids=False)
    guarded.knows(1)
    status, _, raw = guarded.post(asked(), MESSAGES, {"x-api-key": tenants.keys["a"]})
    assert status == 400
    assert "/v1/chat/completions" in error(raw)["message"]
    assert decode.bodies == []


def test_keys_salts_and_meters_are_those_of_chats(make_engine: MakeEngine, guarded: RouterUnderTest, tenants: TenantsUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    guarded.knows(2)
    for headers in ({}, {"x-api-key": "hs-wrong"}):
        for path in (MESSAGES, COUNT):
            status, _, raw = guarded.post(asked(), path, headers)
            assert (status, error(raw)["type"]) == (401, "authentication_error")
    key = {"x-api-key": tenants.keys["a"]}
    assert guarded.post(asked(stream=True), MESSAGES, key)[0] == 200
    # It fills up by a token a second.
    assert 1090 < 60 - guarded.app_level("a") <= 1102
    salts = {body["cache_salt"] for body in (*prefill.bodies, *decode.bodies)}
    assert len(salts) == 1
    status, headers, raw = guarded.post(asked(), MESSAGES, tenants.bearer("a"))
    assert (status, error(raw)["type"]) == (429, "rate_limit_error")
    assert int(headers["retry-after"]) > 1000


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (asked(cache_salt="s"), 400, "invalid_request_error"),
        (asked(kv_transfer_params={}), 400, "invalid_request_error"),
        (asked(model="other"), 404, "not_found_error"),
        (b"[" + b" " * 200_000, 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_errors_have_anthropics_form(make_engine: MakeEngine, router: RouterUnderTest, path: str, body: Any, status: int, kind: str) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    answered, headers, raw = router.post({**body, "model": "other"} if kind == "not_found_error" else body, path)
    assert (answered, error(raw)["type"]) == (status, kind)
    assert headers["request-id"]
    assert decode.bodies == []


def test_no_worker_is_overload_and_a_wrong_method_is_said_in_its_form_too(router: RouterUnderTest) -> None:
    status, headers, raw = router.post(asked(), MESSAGES)
    assert (status, error(raw)["type"], headers["retry-after"]) == (503, "overloaded_error", "1")
    status, raw = router.get(MESSAGES)
    assert (status, error(raw)["type"]) == (405, "invalid_request_error")


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (404, "not_found_error"), (501, "api_error")])
@pytest.mark.parametrize("path", [MESSAGES, COUNT])
def test_an_engines_refusal_comes_in_anthropics_form(make_engine: MakeEngine, router: RouterUnderTest, path: str, status: int, kind: str) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.status = status
    answered, _, raw = router.post(asked("short"), path)
    assert (answered, error(raw)) == (status, {"type": kind, "message": "no"})
    assert len(decode.bodies) == 1


def test_tokens_are_counted_by_any_worker_that_is_well(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    broken, well = make_engine("a", "decode"), make_engine("b", "decode")
    router.knows(2)
    broken.status = 500
    for _ in range(4):
        status, headers, raw = router.post(asked(stream=None), COUNT)
        assert (status, json.loads(raw), headers["content-type"]) == (200, {"input_tokens": 5}, "application/json")
    assert len(well.bodies) == 4
    assert well.bodies[0] == asked(stream=None)


def test_an_engine_that_fails_as_it_begins_is_replaced(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    broken, _ = make_engine("a", "decode"), make_engine("b", "decode")
    router.knows(2)
    broken.pieces = [b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"dead"}}\n\n']
    for _ in range(3):
        status, headers, raw = router.post(asked("short", stream=True), MESSAGES)
        assert (status, headers["x-headstart-worker"]) == (200, "b")
        assert events(raw)[-1][0] == "message_stop"
    assert broken.bodies


def test_a_stream_whose_worker_dies_ends_with_an_error_event(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.die_after_pieces = 3
    _, _, raw = router.post(asked("short", stream=True, temperature=1), MESSAGES)
    said = events(raw)
    assert [name for name, _ in said] == ["message_start", "content_block_start", "content_block_delta", "error"]
    assert error(json.dumps(said[-1][1]).encode())["type"] == "api_error"


def test_a_message_over_its_deadline_says_so_in_its_stream(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.hold.clear()
    status, _, raw = router.post(asked("short"), MESSAGES, {"x-headstart-deadline-ms": "100"})
    assert (status, error(raw)["type"]) == (504, "timeout_error")
    wait_for(lambda: decode.aborted == 1)
