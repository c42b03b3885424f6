"""Processes killed with SIGKILL: later answers are right and in time, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from live import CHAT, COMPLETIONS, Live
from tests_shared import wait_for

from cachebus.engine import process_tree
from cachebus.ports import free_port
from deploy.client import Answer
from deploy.launcher import answers

pytestmark = pytest.mark.engine

ANSWER_SECONDS_MAX = 60.0


def right_answer(live: Live, tokens: int) -> Answer:
    body = live.body(live.prompts.text(tokens))
    started = time.monotonic()
    answer = live.ours(body)
    assert time.monotonic() - started < ANSWER_SECONDS_MAX
    assert answer.token_ids == live.plains(body).token_ids
    return answer


@pytest.mark.parametrize("victim", ["api server", "engine core", "worker"])
def test_the_prefill_worker_dies_in_the_middle_of_a_prompt(live: Live, victim: str) -> None:
    processes = live.engine_processes("prefill-0")
    assert set(processes) == {"api server", "engine core", "worker"}
    shared = process_tree.shared_memory(processes.values())
    assert shared
    body = live.body(live.prompts.text(8000))
    published = live.statistics()["stored_total"]
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        answer = pool.submit(live.ours, body)
        wait_for(lambda: live.statistics()["stored_total"] > published, 20)
        os.kill(processes[victim], signal.SIGKILL)
        found = answer.result(ANSWER_SECONDS_MAX)
        assert time.monotonic() - started < ANSWER_SECONDS_MAX
    assert found.headers["x-headstart-route"] == "decode"
    wait_for(lambda: not any(process_tree.is_running(pid) for pid in processes.values()), 10)
    assert live.cluster.processes["prefill-0"].wait(20) == 3
    assert not [path for path in shared if path.exists()]
    wait_for(lambda: "prefill-0" not in live.workers())
    live.await_rest()
    assert found.token_ids == live.plains(body).token_ids
    assert right_answer(live, 900).headers["x-headstart-route"] == "decode"
    port = free_port("127.0.0.1")
    live.bring_back("prefill-0", "--set", f"prefill.metrics_port={port}")
    # The bus knows of it a moment before it says so itself.
    wait_for(lambda: answers(f"http://127.0.0.1:{port}/ready"))
    assert live.metric(f"http://127.0.0.1:{port}", "headstart_worker_up") == 1
    assert right_answer(live, 900).headers["x-headstart-route"] == "prefill+decode"


def test_the_cachebus_dies_and_adopts_its_region_again(live: Live) -> None:
    body = live.body(live.prompts.text(1200))
    expected = live.ours(body).token_ids
    assert expected == live.plains(body).token_ids
    live.await_rest()
    chunks = live.statistics()["chunks"]
    live.cluster.processes["cachebus"].kill()
    live.cluster.processes["cachebus"].wait()
    assert live.ours(body).token_ids == expected
    live.cluster.launch("cachebus")
    wait_for(lambda: len(live.workers()) == len(live.cluster.workers), 20)
    wait_for(lambda: not live.statistics()["unattached_holders"], 20)
    assert live.statistics()["chunks"] >= chunks
    live.empty_hbm()
    wait_for(lambda: live.metric(live.cluster.url, "headstart_workers") == len(live.cluster.workers))
    again = live.ours(body)
    assert (again.token_ids, again.headers["x-headstart-cache-source"]) == (expected, "dram")
    assert right_answer(live, 900).headers["x-headstart-route"] == "prefill+decode"
    live.await_rest()


@pytest.mark.parametrize("victim", ["api server", "worker"])
def test_an_idle_decode_worker_dies(live: Live, victim: str) -> None:
    processes = live.engine_processes("decode-1")
    os.kill(processes[victim], signal.SIGKILL)
    for _ in range(3):
        assert right_answer(live, 600).headers["x-headstart-worker"] == "decode-0"
    wait_for(lambda: not any(process_tree.is_running(pid) for pid in processes.values()), 10)
    assert live.cluster.processes["decode-1"].wait(20) == 3
    live.await_rest()
    live.bring_back("decode-1")
    workers = {right_answer(live, 600).headers["x-headstart-worker"] for _ in range(2)}
    assert workers == {"decode-0", "decode-1"}


def test_a_worker_that_is_asked_to_end_finishes_what_it_has(live: Live) -> None:
    body = live.body(live.prompts.text(300), max_tokens=300)
    expected = live.plains(body).token_ids
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(live.ours, body) for _ in range(2)]
        wait_for(lambda: live.metric(live.workers()["decode-1"], "vllm:num_requests_running") > 0)
        live.cluster.processes["decode-1"].terminate()
        assert [answer.result(60).token_ids for answer in answers] == [expected] * 2
    assert live.cluster.processes["decode-1"].wait(60) == 0
    assert right_answer(live, 300).headers["x-headstart-worker"] == "decode-0"
    live.bring_back("decode-1")


@pytest.mark.parametrize(("path", "victim"), [(COMPLETIONS, "api server"), (CHAT, "worker")])
def test_a_stream_goes_on_when_its_decode_worker_is_killed(live: Live, path: str, victim: str) -> None:
    """The API server's death breaks the connection; after the worker's the API server says in the stream that its engine is dead."""
    text = live.prompts.text(700)
    body = live.body(max_tokens=300, ignore_eos=True) | (
        {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    )
    expected = live.plains(body, path)
    resumed = live.metric(live.cluster.url, "headstart_resumed_streams_total")

    def generating() -> list[str]:
        return [
            name
            for name, url in live.workers().items()
            if name.startswith("decode")
            and live.metric(url, "vllm:num_requests_running")
            and live.metric(url, "vllm:generation_tokens_total") > before[name] + 40
        ]

    before = {name: live.metric(url, "vllm:generation_tokens_total") for name, url in live.workers().items()}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.ours, body, path)
        wait_for(lambda: bool(generating()) or answer.done(), 30)
        assert not answer.done()
        (name,) = generating()
        os.kill(live.engine_processes(name)[victim], signal.SIGKILL)
        found = answer.result(ANSWER_SECONDS_MAX)
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.usage["completion_tokens"] == 300
    assert found.usage["prompt_tokens"] == expected.usage["prompt_tokens"]
    assert live.metric(live.cluster.url, "headstart_resumed_streams_total") == resumed + 1
    live.bring_back(name)
