"""Real engines in the compose files: a prompt is computed once, its repetition is a hit, and engines are replaced without a wrong token."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from containers import Engine
from load import SHARED_TOKENS, Load, ask

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

PROMPTS = 5
"""None is a long one."""


@pytest.fixture(scope="module")
def cluster(real: Engine) -> Iterator[Engine]:
    real.run("podman-compose --profile cpu up -d")
    real.await_ready(150)
    yield real
    real.clean()


def test_engines_in_containers(cluster: Engine) -> None:
    port = int(cluster.environment["HEADSTART_PORT"])
    # Cold answers are computed from the prompts alone, so what comes out of the cache later is held against plain vLLM's arithmetic.
    quiet = [ask(port, number) for number in range(1, PROMPTS)]
    assert len({text for text, _ in quiet}) == len(quiet), "a model that answers everything alike would hide a wrong token"
    assert [cached for _, cached in quiet] == [0] * len(quiet)
    text, cached = ask(port, 1)
    assert text == quiet[0][0]
    assert cached >= SHARED_TOKENS
    with Load(port, 2, PROMPTS - 1, lambda number: quiet[number - 1][0], first=1) as clients:
        clients.go_on(4)
        for role in ("cachebus", "decode"):
            cluster.run(f"podman-compose --profile cpu restart {role}")
            clients.go_on(4, 150)
    assert clients.counted.wrong == []
    assert clients.counted.cached > 0
    assert len(re.findall(r" (?:decode|prefill) +ready ", cluster.workers())) == 2
