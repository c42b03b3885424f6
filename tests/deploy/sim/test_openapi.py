"""Requests that Schemathesis makes of the API's description, to a router with simulated workers: no 5xx, and nothing undescribed."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from router_under_test import RouterUnderTest
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from sim_cluster import PROFILE, SimCluster
from tests_shared import Bus

SEED = int(os.environ.get("HEADSTART_TEST_SEED") or random.randrange(2**32))
EXAMPLES, SECONDS_MAX = 20, 60.0
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)

FITS = {"model": PROFILE.model, "max_tokens": 5, "max_output_tokens": 5}
SAID: dict[str, Any] = {"model": PROFILE.model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
GOOD: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"), SAID),
    "/v1/completions": {"prompt": [[1, 2, 3]], "max_tokens": 2},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "max_output_tokens": 2, "stream": True},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture
def router(bus: Bus, sims: SimCluster) -> Iterator[RouterUnderTest]:
    sims.launch("p", "prefill")
    sims.launch("d", "decode", 2)
    sims.ready(3)
    router = RouterUnderTest(bus)
    router.knows(3)
    yield router
    router.stop()


class Trial:
    """Requests by chance until the time is up, and what came of them."""

    def __init__(self) -> None:
        self.deadline, self.seen = time.monotonic() + SECONDS_MAX, Counter[tuple[str, int]]()

    def run(self, operation: Any, mode: Any) -> None:
        @seed(SEED)
        @settings(max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def try_it(case: Any) -> None:
            if time.monotonic() > self.deadline:
                return
            if isinstance(case.body, dict) and len(str(case.body)) % 2:
                # Few models are called what chance makes up, and few answers fit where it says how long they are.
                case.body |= {name: fit for name, fit in FITS.items() if name in case.body}
            response = case.call(timeout=20)
            self.seen[operation.path, response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        try_it()


def test_whatever_is_sent_the_answer_is_a_described_one(router: RouterUnderTest) -> None:
    print(f"HEADSTART_TEST_SEED={SEED}")
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{router.port}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    trial = Trial()
    for mode in MODES:
        for operation in operations:
            # What takes no body can't be sent a wrong one.
            if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
                trial.run(operation, mode)
    print(sorted(trial.seen.items()))
    assert {path for path, _ in trial.seen} == {operation.path for operation in operations}, "the time was up before every route was tried"
    for path, body in GOOD.items():
        case = schema[path]["POST"].Case(body=body, media_type="application/json")
        response = case.call_and_validate(checks=CHECKS)
        assert response.status_code == 200
    assert router.get("/ready")[0] == 200
