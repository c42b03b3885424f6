"""Simulated workers over a real bus, real bytes and HTTP, asked without a router."""

from __future__ import annotations

import json
import signal
import threading
import time
from http.client import HTTPConnection
from typing import Any

import pytest
from sim_cluster import PROFILE, SimCluster, counters, metric, post, right
from tests_shared import Bus, wait_for

from cachebus.region import Region
from cachebus.table import State
from deploy.client import ask
from deploy.sim.vocabulary import chat_prompt, text_of, tokenised

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [(7 * n) % 911 for n in range(1000)]


def begin_and_leave(url: str, body: dict[str, Any]) -> None:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=5)
    connection.request("POST", COMPLETIONS, json.dumps(body))
    assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()


def test_one_worker_publishes_and_another_pulls(bus: Bus, sims: SimCluster) -> None:
    sims.launch("d", "decode", 2)
    urls = sims.ready(2)
    for url, cached in ((urls["d-0"], 0), (urls["d-1"], 999), (urls["d-1"], 992)):
        answer = ask(url, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 20})
        assert answer.token_ids == right(PROMPT, 20)
        assert answer.text == text_of(answer.token_ids)
        assert answer.cached_tokens == cached
        assert answer.usage["completion_tokens"] == 20
    assert metric(urls["d-1"], "headstart_pulled_chunks_total") == 3 + 15
    wait_for(lambda: sims.hbm() == {"d-0": 3, "d-1": 3})
    other = [token + 1 for token in range(4070)]
    assert ask(urls["d-1"], COMPLETIONS, {"prompt": other, "max_tokens": 20}).token_ids == right(other, 20)
    # Of 300 blocks it took 256, so of the first prompt's 63 the last 19 had to go.
    wait_for(lambda: sims.hbm() == {"d-0": 3, "d-1": 2 + 15})
    wait_for(lambda: counters(bus)["leases"] == 0)


@pytest.mark.parametrize("verify", [True, False])
def test_a_flipped_byte_is_recomputed_and_without_digests_changes_the_text(bus: Bus, sims: SimCluster, verify: bool) -> None:
    sims.launch("d", "decode", 2, f"security.verify_digests={str(verify).lower()}")
    urls = sims.ready(2)
    assert ask(urls["d-0"], COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1}).token_ids == right(PROMPT, 1)
    wait_for(lambda: counters(bus)["writing"] == 0)
    region = Region.map(bus.run_dir / "region")
    record = next(record for _, record in region.table.read() if record.state == State.COMMITTED and not record.tail)
    region.data[record.offset + 77] ^= 1
    region.close()
    answer = ask(urls["d-1"], COMPLETIONS, {"prompt": PROMPT, "max_tokens": 8})
    assert (answer.token_ids == right(PROMPT, 8)) is verify
    assert metric(urls["d-1"], "headstart_integrity_failures_total") == verify


def test_a_chat_and_its_next_turn(sims: SimCluster) -> None:
    sims.launch("d", "decode", 2)
    urls = sims.ready(2)
    messages = [{"role": "system", "content": "word " * 300}, {"role": "user", "content": "Tell me."}]
    first = ask(urls["d-0"], CHAT, {"messages": messages, "max_completion_tokens": 30})
    assert first.token_ids == right(chat_prompt(messages), 30)
    turn = [*messages, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
    # As the router does: it has the prompt rendered, and sends the ids beside the messages.
    status, rendered = post(urls["d-1"], f"{CHAT}/render", {"messages": turn})
    assert (status, rendered["token_ids"]) == (200, chat_prompt(turn))
    parameters = {"prompt_token_ids": rendered["token_ids"]}
    second = ask(urls["d-1"], CHAT, {"messages": turn, "max_tokens": 5, "kv_transfer_params": parameters})
    assert second.token_ids == right(chat_prompt(turn), 5)
    assert second.cached_tokens >= len(chat_prompt(messages)) // 256 * 256 > 0
    status, whole = post(urls["d-0"], CHAT, {"messages": turn, "max_tokens": 5})
    assert status == 200
    assert whole["choices"][0]["message"]["content"] == second.text
    assert whole["usage"]["total_tokens"] == len(chat_prompt(turn)) + 5


def test_what_is_not_simulated_is_refused_and_text_is_rendered(sims: SimCluster) -> None:
    sims.launch("d", "decode")
    (url,) = sims.ready(1).values()
    assert post(url, f"{COMPLETIONS}/render", {"prompt": "some text"}) == (200, [{"token_ids": tokenised("some text"), "features": None}])
    for body in ({"prompt": "x", "n": 2}, {"prompt": "x", "logprobs": 1}, {"prompt": [-1]}, {"prompt": []}, {}, {"prompt": "x", "model": "y"}):
        assert post(url, COMPLETIONS, body)[0] == 400
    status, refusal = post(url, COMPLETIONS, {"prompt": [1] * PROFILE.max_model_len, "max_tokens": 1})
    assert status == 400
    assert "max_tokens" in refusal["error"]["message"]


def test_a_restarted_bus_is_told_again_and_its_chunks_are_pulled(bus: Bus, sims: SimCluster) -> None:
    sims.launch("d", "decode", 2)
    urls = sims.ready(2)
    assert ask(urls["d-0"], COMPLETIONS, {"prompt": PROMPT, "max_tokens": 5}).token_ids == right(PROMPT, 5)
    bus.stop()
    # Without a bus the engine computes.
    assert ask(urls["d-0"], COMPLETIONS, {"prompt": [*PROMPT, 1], "max_tokens": 5}).token_ids == right([*PROMPT, 1], 5)
    bus.start()
    assert sims.ready(2) == urls
    wait_for(lambda: sims.hbm().get("d-0") == 3)
    answer = ask(urls["d-1"], COMPLETIONS, {"prompt": [*PROMPT, 1], "max_tokens": 5})
    assert answer.token_ids == right([*PROMPT, 1], 5)
    assert answer.cached_tokens >= 768


def test_clients_that_leave_end_their_request(sims: SimCluster) -> None:
    sims.launch("d", "decode", speed=1)
    (url,) = sims.ready(1).values()
    for number in range(3):
        # Its answer alone would take twenty seconds.
        begin_and_leave(url, {"prompt": [*PROMPT, number], "max_tokens": 3000, "stream": True})
    wait_for(lambda: metric(url, "vllm:num_requests_running") == 0, 5)


def test_sigterm_lets_answers_end(sims: SimCluster) -> None:
    sims.launch("d", "decode")
    (url,) = sims.ready(1).values()
    found: list[list[int]] = []
    running = threading.Thread(target=lambda: found.append(ask(url, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1000}).token_ids))
    running.start()
    wait_for(lambda: metric(url, "vllm:num_requests_running") == 1)
    started = time.monotonic()
    sims.processes["d"].send_signal(signal.SIGTERM)
    running.join()
    assert found == [right(PROMPT, 1000)]
    assert sims.processes["d"].wait(10) == 0
    assert time.monotonic() - started < 10
    assert not sims.urls()
