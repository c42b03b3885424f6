"""The compose files at work, with simulated workers: scaled, restarted and watched under load. No answer may be wrong."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from containers import ROOT, Engine
from load import ANSWER_TOKENS, LONG_EVERY, SHARED_TOKENS, Load, ask, prompt_of

from deploy.sim.expected import expected_tokens
from deploy.sim.profile import Profile
from deploy.sim.vocabulary import text_of

CLIENTS, PROMPTS = 4, 600
ANSWERS = 40
"""Right answers before and after each change."""
UP = "podman-compose --profile cpu up -d"
DASHBOARDS = sorted((ROOT / "compose" / "grafana" / "dashboards").glob("*.json"))


@functools.cache
def known(number: int) -> str:
    return text_of(expected_tokens("headstart-demo", Profile().layers, prompt_of(number), ANSWER_TOKENS))


@pytest.fixture(scope="module")
def cluster(simulated: Engine) -> Iterator[Engine]:
    simulated.run(UP)
    simulated.await_ready()
    yield simulated
    simulated.clean()


def load(cluster: Engine) -> Load:
    return Load(int(cluster.environment["HEADSTART_PORT"]), CLIENTS, PROMPTS, known)


def test_pools_are_scaled_under_load_and_no_request_fails(cluster: Engine) -> None:
    with load(cluster) as clients:
        clients.go_on(ANSWERS)
        cluster.run(f"{UP} --scale prefill=2")
        cluster.run(f"{UP} --scale decode=3")
        clients.go_on(ANSWERS)
        workers = cluster.workers()
        assert len(re.findall(r" decode +ready ", workers)) == 3, workers
        assert len(re.findall(r" prefill +ready ", workers)) == 2, workers
        clients.go_on(ANSWERS)
        cluster.run("podman stop --time 60 headstart_decode_3 headstart_decode_1 headstart_prefill_1")
        clients.go_on(ANSWERS)
    assert (clients.counted.wrong, clients.counted.failed) == ([], [])
    assert clients.counted.cached > SHARED_TOKENS * ANSWERS
    workers = cluster.workers()
    assert len(re.findall(r" (?:decode|prefill) +ready ", workers)) == 2, workers


def test_every_role_restarts_under_load_and_no_token_is_wrong(cluster: Engine) -> None:
    cluster.run("podman start headstart_decode_1 headstart_prefill_1")
    with load(cluster) as clients:
        for role in ("decode", "prefill", "cachebus", "redis"):
            clients.go_on(ANSWERS)
            cluster.run(f"podman-compose --profile cpu restart {role}")
        clients.go_on(ANSWERS)
        # A worker drains while another serves; without bus or Redis engines compute.
        assert clients.counted.failed == []
        # Nobody can be answered while the router itself is away.
        cluster.run("podman-compose --profile cpu restart router")
        clients.go_on(ANSWERS)
    assert clients.counted.wrong == []


def test_a_wrong_answer_would_be_counted(cluster: Engine) -> None:
    with Load(int(cluster.environment["HEADSTART_PORT"]), 1, PROMPTS, lambda number: known(number + 1)) as clients:
        while not clients.counted.wrong:
            assert not clients.counted.right


def named(dashboard: str) -> set[str]:
    """The metrics in a dashboard's expressions."""
    expressions = [target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel["targets"]]
    return {name for text in expressions for name in re.findall(r"\b(?:headstart_|vllm:)\w+", text)}


def test_what_the_dashboards_show_is_there(cluster: Engine) -> None:
    port = int(cluster.environment["HEADSTART_PORT"])
    with ThreadPoolExecutor(6) as clients:
        # Long ones that nobody sent before, several at a time, so that some go through prefill at this router, too.
        list(clients.map(lambda number: ask(port, number), range(100 * PROMPTS, 100 * PROMPTS + 18 * LONG_EVERY, LONG_EVERY)))
    targets = re.findall(r"names: \[(\w+).*?port: (\d+)", (ROOT / "compose" / "prometheus.yml").read_text())
    assert len(targets) == 4
    read = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
    # From another container, by the names under which Prometheus looks for them.
    got = "".join(cluster.run(["podman", "exec", "headstart_router_1", "python3", "-c", read, f"http://{name}:{at}/metrics"]) for name, at in targets)
    # This one has a value once a worker died in the middle of a stream; until then it is announced only.
    there = set(re.findall(r"^([a-zA-Z_:]+)(?:\{| )", got, re.MULTILINE)) | set(
        re.findall(r"^# TYPE (headstart_resumed_streams_total) ", got, re.MULTILINE)
    )
    assert len(DASHBOARDS) == 2
    for path in DASHBOARDS:
        wanted = named(path.read_text())
        assert len(wanted) > 5
        assert wanted <= there, f"{path.name}: {wanted - there}"
    # The control: a name that is not exported.
    assert named('{"panels": [{"targets": [{"expr": "rate(headstart_gone_total[1m])"}]}]}') - there == {"headstart_gone_total"}


def test_what_was_cached_outlives_all_containers(cluster: Engine) -> None:
    port = int(cluster.environment["HEADSTART_PORT"])
    ask(port, PROMPTS)
    cluster.run("podman rm --force headstart_decode_2 headstart_decode_3 headstart_prefill_2")
    cluster.run("podman-compose --profile cpu down")
    # With the last of them the memory went that they shared.
    assert cluster.run("podman ps --all --quiet") == ""
    assert "/headstart_node/" not in Path("/proc/mounts").read_text()
    cluster.run(UP)
    cluster.await_ready()
    text, cached = ask(port, PROMPTS)
    assert text == known(PROMPTS)
    assert cached >= SHARED_TOKENS
