import json
from typing import Any

import pytest

from router.apis import CHAT, COMPLETIONS
from router.callers import Terms
from router.errors import ApiError
from router.fields import DecodeRequest, decode_body, is_splittable, parse_body, plain_prompt, prefill_body


def test_a_prompt_of_ids_is_taken_as_it_is_only_where_the_engine_does_so() -> None:
    assert plain_prompt(COMPLETIONS, {"prompt": [1, 2]}) == [1, 2]
    for prompt in ("text", [], [[1, 2]], ["a"], [1, -1], [1, True], [1, 2.0], None):
        assert plain_prompt(COMPLETIONS, {"prompt": prompt}) is None
    assert plain_prompt(COMPLETIONS, {"prompt": [1, 2], "truncate_prompt_tokens": 1}) is None
    assert plain_prompt(CHAT, {"messages": [], "prompt": [1, 2]}) is None, "a chat's prompt is its messages"


@pytest.mark.parametrize(
    ("path", "body", "splittable"),
    [
        (COMPLETIONS, {"prompt": "a"}, True),
        (COMPLETIONS, {"prompt": ["a"]}, True),
        (COMPLETIONS, {"prompt": [1, 2]}, True),
        (COMPLETIONS, {"prompt": ["a", "b"]}, False),
        (COMPLETIONS, {"prompt": [[1], [2]]}, False),
        (COMPLETIONS, {"prompt": []}, False),
        (COMPLETIONS, {"prompt": "a", "echo": True}, False),
        (COMPLETIONS, {"prompt": "a", "echo": False, "prompt_logprobs": None, "use_beam_search": False}, True),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 0}, False),
        (COMPLETIONS, {"prompt_embeds": "x"}, False),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True}, False),
        (CHAT, {"messages": [], "prompt": ["a", "b"]}, True),
        (CHAT, {"messages": [], "use_beam_search": True}, False),
    ],
)
def test_what_another_worker_may_compute(path: str, body: dict[str, Any], splittable: bool) -> None:
    assert is_splittable(path, body) is splittable


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params", "cache_salt"])
def test_a_null_steers_nothing(name: str) -> None:
    assert parse_body(json.dumps({name: None, "vllm_xargs": None}).encode()) == {name: None, "vllm_xargs": None}
    with pytest.raises(ApiError, match=name):
        parse_body(json.dumps({name: "" if name == "cache_salt" else {}}).encode())
    with pytest.raises(ApiError, match=rf"vllm_xargs\.{name}"):
        parse_body(json.dumps({"vllm_xargs": {name: None}}).encode())


def test_a_refused_name_is_seen_however_it_is_written() -> None:
    with pytest.raises(ApiError, match="cache_salt"):
        parse_body(b'{"cache\\u005fsalt": "x"}')
    repeated = b'{"kv_transfer_params": {"headstart": {}}, "kv_transfer_params": null}'
    for raw in (repeated, b""):
        got = json.loads(decode_body(CHAT, DecodeRequest(parse_body(repeated), None, raw), "t", None, Terms()))
        assert got["kv_transfer_params"] == {"headstart": {"transfer_id": "t", "leg": "decode"}}


def test_numbers_and_text_reach_the_engine_as_they_were_sent() -> None:
    sent = {"prompt": "a", "seed": 2**80, "temperature": 1e-7, "logit_bias": {"5": -100.0}, "stop": ["\u2028", "\u00fc"], "x": {}}
    got = json.loads(decode_body(CHAT, DecodeRequest(parse_body(json.dumps(sent).encode()), [1]), "t", [1], Terms()))
    assert got.pop("kv_transfer_params") == {"headstart": {"transfer_id": "t", "leg": "decode"}, "prompt_token_ids": [1]}
    assert got == sent


@pytest.mark.parametrize("raw", [b'{"prompt": "\xc3\xa9", "seed": 1e2 }', b'{"stream": true,"return_token_ids":null}', b'{"a": 1}\n', b"{}"])
def test_a_body_that_is_passed_on_as_it_came_says_the_same_as_one_encoded_anew(raw: bytes) -> None:
    asked = DecodeRequest(parse_body(raw), None, raw, {"return_token_ids": True})
    terms = Terms("salt", ttl_seconds=5)
    passed, encoded = (json.loads(decode_body(CHAT, one, "t", None, terms)) for one in (asked, asked._replace(raw=b"")))
    assert passed == encoded
    assert passed["return_token_ids"] is True


def test_a_completions_ids_take_its_prompts_place() -> None:
    got = json.loads(decode_body(COMPLETIONS, DecodeRequest({"model": "m", "prompt": "abc", "n": 2}, [7, 8]), "t", [7, 8], Terms()))
    assert got == {"model": "m", "prompt": [7, 8], "n": 2, "kv_transfer_params": {"headstart": {"transfer_id": "t", "leg": "decode"}}}


def test_the_prefill_leg_has_fields_of_its_own() -> None:
    assert json.loads(prefill_body("m", [1, 2], "t", Terms())) == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {"headstart": {"transfer_id": "t", "leg": "prefill"}},
    }


def test_both_legs_carry_the_salt_and_what_the_client_wishes_for_its_chunks() -> None:
    usual, unusual = Terms("salt"), Terms("salt", store=False, ttl_seconds=60)
    for terms, more in ((usual, {}), (unusual, {"store": False, "ttl_seconds": 60})):
        first = json.loads(prefill_body("m", [1], "t", terms))
        second = json.loads(decode_body(COMPLETIONS, DecodeRequest({"prompt": "abc"}, None), "t", None, terms))
        assert first["cache_salt"] == second["cache_salt"] == "salt"
        assert first["kv_transfer_params"] == {"headstart": {"transfer_id": "t", "leg": "prefill", **more}}
        assert second["kv_transfer_params"] == {"headstart": {"transfer_id": "t", "leg": "decode", **more}}
    assert "cache_salt" not in json.loads(prefill_body("m", [1], "t", Terms()))
