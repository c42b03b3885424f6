"""What a request may ask for at most."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus

from router.caps import check_body, check_prompt
from router.errors import ApiError
from router.settings import RouterSettings

SETTINGS = RouterSettings(json_depth_max=8, n_max=4, prompt_tokens_max=100)
values = st.recursive(
    st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=30,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def refusal(body: dict[str, Any], settings: RouterSettings = SETTINGS) -> str:
    try:
        check_body(settings, json.dumps(body).encode(), body)
    except ApiError as error:
        assert error.status == 400
        return error.code
    return ""


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(body=st.dictionaries(st.sampled_from("abc"), values, max_size=3), limit=st.integers(1, 6))
def test_depth_is_counted_exactly(body: dict[str, Any], limit: int) -> None:
    assert (refusal(body, RouterSettings(json_depth_max=limit)) == "json_too_deep") == (depth(body) > limit)


def test_brackets_in_text_are_no_depth() -> None:
    assert refusal({"prompt": "[{" * 1000}) == ""
    assert refusal({"messages": [{"role": "user", "content": "x"}] * 100}) == ""


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ({"n": 4}, True),
        ({"n": 5}, False),
        ({"best_of": 5}, False),
        ({"n": 2, "prompt": ["a", "b"]}, True),
        ({"n": 2, "prompt": ["a", "b", "c"]}, False),
        ({"prompt": [[1], [2], [3], [4], [5]]}, False),
        ({"prompt": list(range(50))}, True),
        ({"n": "many", "prompt": []}, True),
    ],
)
def test_answers_are_counted_over_all_prompts(body: dict[str, Any], fits: bool) -> None:
    assert refusal(body) == ("" if fits else "too_many_answers")


def test_a_long_prompt_is_refused_where_its_length_is_known() -> None:
    check_prompt(SETTINGS, 100)
    check_prompt(RouterSettings(), 10**9)
    with pytest.raises(ApiError, match="101 tokens"):
        check_prompt(SETTINGS, 101)


def test_the_router_refuses_before_anybody_computes(bus: Bus, make_engine: MakeEngine) -> None:
    decode = make_engine("d", "decode")
    router = RouterUnderTest(bus, json_depth_max=8, n_max=4, prompt_tokens_max=600)
    try:
        router.knows(1)
        for body, code in (
            ({"prompt": "y", "n": 5}, "too_many_answers"),
            ({"prompt": "x" * 700}, "context_length_exceeded"),
            ({"prompt": [1] * 700}, "context_length_exceeded"),
            ({"prompt": "y", "vllm_xargs": json.loads("[" * 30 + "]" * 30)}, "json_too_deep"),
        ):
            status, _, raw = router.post({"model": "m", **body})
            assert (status, json.loads(raw)["error"]["code"]) == (400, code)
        assert decode.bodies == []
    finally:
        router.stop()
