"""What the bus says of an engine's HBM beside what that engine then hits, and where a router sends the next prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from live import COMPLETIONS, Live
from tests_shared import wait_for

from cachebus.keys import chunk_keys, root_key
from deploy.client import ask

pytestmark = pytest.mark.engine

CHUNK = 256
SECONDS_MAX = 1.0
"""How far the index may lie behind an engine, on a machine where engines compute on the cores of the bus."""
SMALL_BLOCKS = 40
BLOCK = 128


def keys_of(live: Live, prompt: str) -> list[bytes]:
    worker = live.snapshot().workers[0]
    return chunk_keys(root_key(worker.namespace), live.prompts.token_ids(prompt), worker.chunk_size)


def in_hbm(live: Live, worker: str, keys: list[bytes]) -> int:
    """How many of ``keys``, from the first on, the bus says are in that worker's HBM."""
    held = set(live.snapshot().hbm[worker])
    return next((count for count, key in enumerate(keys) if key not in held), len(keys))


@pytest.fixture(scope="module")
def router(live: Live) -> str:
    """The address of a router with the default policy."""
    return live.cluster.add_router("router-hbm", "router.policy=prefix_affinity")


def soon(condition: Callable[[], bool]) -> None:
    wait_for(condition, SECONDS_MAX)


@pytest.fixture
def small(live: Live) -> Iterator[str]:
    """A decode worker with room for 5,120 tokens, whose engine evicts after a few prompts."""
    name = "decode-small"
    sockets = set(live.cluster.run_dir.glob("kv*"))
    limits = ("--set", f"decode.engine_args=['--num-gpu-blocks-override', '{SMALL_BLOCKS}']", "--set", "model.max_model_len=4096")
    live.cluster.launch(name, "--name", name, *limits)
    wait_for(lambda: name in live.workers(), 120)
    yield name
    process = live.cluster.processes.pop(name)
    process.terminate()
    assert process.wait(60) == 0
    wait_for(lambda: name not in live.workers())
    assert name not in live.snapshot().hbm
    assert set(live.cluster.run_dir.glob("kv*")) == sockets


def test_a_prompt_goes_where_its_beginning_is_in_hbm(live: Live, router: str) -> None:
    live.empty_hbm()
    soon(lambda: not any(live.snapshot().hbm.values()))
    beginning = live.prompts.text(5 * CHUNK)
    first = ask(router, COMPLETIONS, live.body(beginning))
    worker, keys = first.headers["x-headstart-worker"], keys_of(live, beginning)[:4]
    soon(lambda: in_hbm(live, worker, keys) == 4)
    (other,) = (name for name in live.workers() if name.startswith("decode") and name != worker)
    assert in_hbm(live, other, keys) == 0
    for question in ("and a river?", "and a ledger?", "and copper?"):
        body = live.body(beginning + question)
        answer = ask(router, COMPLETIONS, body)
        assert answer.headers["x-headstart-worker"] == worker, "idle workers would take turns"
        assert answer.headers["x-headstart-route"] == "decode"
        assert answer.headers["x-headstart-cache-source"].startswith("hbm")
        assert answer.token_ids == live.plains(body).token_ids

    live.empty_hbm()
    soon(lambda: not any(live.snapshot().hbm.values()))
    turns = {ask(router, COMPLETIONS, live.body(live.prompts.text(20))).headers["x-headstart-worker"] for _ in range(2)}
    assert turns == {worker, other}


def test_after_evictions_the_index_says_what_the_engine_then_hits(live: Live, small: str) -> None:
    url = live.workers()[small]
    prompts = [live.prompts.text(3 * CHUNK + BLOCK + 10) for _ in range(9)]
    keys = [keys_of(live, prompt) for prompt in prompts]
    for prompt in prompts:
        live.post(url, live.body(prompt, max_tokens=1))
    soon(lambda: in_hbm(live, small, keys[-1]) == 3)
    assert in_hbm(live, small, keys[0]) == 0, "nine prompts do not fit"
    # The last ones first: each question evicts what was used longest ago.
    found = []
    for prompt, wanted in reversed(list(zip(prompts, keys, strict=True))):
        before = live.metric(url, "vllm:prefix_cache_hits_total")
        said = in_hbm(live, small, wanted)
        live.post(url, live.body(prompt, max_tokens=1))
        wait_for(lambda wanted=wanted: in_hbm(live, small, wanted) == 3, SECONDS_MAX)  # type: ignore[misc]
        hit = live.metric(url, "vllm:prefix_cache_hits_total") - before
        assert said == hit // CHUNK
        found.append(said)
    assert {0, 3} <= set(found)
