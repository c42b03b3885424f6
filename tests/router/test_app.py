"""The router over real HTTP and a real bus; only the engines are doubles."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus, wait_for

LONG, SHORT = "x" * 1100, "y" * 100


def error(raw: bytes) -> dict[str, Any]:
    body = json.loads(raw)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


def test_a_cold_prompt_goes_through_prefill_and_a_known_one_straight_to_decode(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    status, headers, raw = router.post({"model": "m", "prompt": LONG, "max_tokens": 5, "seed": 3})
    assert status == 200
    assert headers["x-headstart-route"] == "prefill+decode"
    assert headers["x-headstart-cached-tokens"] == "0"
    assert headers["x-headstart-cache-source"] == "none"
    assert headers["x-headstart-worker"] == "d"
    assert json.loads(raw)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    (leg,) = prefill.bodies
    assert {k: leg[k] for k in ("model", "max_tokens", "temperature")} == {"model": "m", "max_tokens": 1, "temperature": 0}
    assert leg["prompt"] == [ord("x")] * 1100
    assert prefill.headers[0]["x-request-id"].startswith(headers["x-request-id"])

    status, headers, raw = router.post({"model": "m", "prompt": LONG})
    assert headers["x-headstart-route"] == "decode"
    assert headers["x-headstart-cached-tokens"] == "1099"
    assert headers["x-headstart-cache-source"] == "dram"
    assert json.loads(raw)["usage"]["prompt_tokens_details"]["cached_tokens"] == 1099
    assert len(prefill.bodies) == 1
    assert decode.bodies[0]["seed"] == 3


def test_a_short_prompt_needs_no_prefill(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, _ = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    assert router.post({"model": "m", "prompt": SHORT})[1]["x-headstart-route"] == "decode"
    assert prefill.bodies == []


def test_everything_a_client_sends_reaches_the_decode_leg(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": LONG}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
        "stop": ["a", "b"],
        "seed": 5,
        "temperature": 0.1,
        "min_tokens": 4,
        "max_tokens": 100,
        "max_completion_tokens": 50,
        "logit_bias": {"5": -1.5},
        "vllm_xargs": {"mine": 1},
        "unheard_of": {"kept": [1, None, "ü"]},
    }
    status, _, _ = router.post(body, "/v1/chat/completions")
    assert status == 200
    (sent,) = decode.bodies
    transfer = sent.pop("kv_transfer_params")
    assert sent == body
    assert transfer["prompt_token_ids"] == [ord("x")] * 1100
    assert transfer["headstart"]["leg"] == "decode"
    (leg,) = prefill.bodies
    assert set(leg) == {"model", "prompt", "max_tokens", "temperature", "kv_transfer_params"}


def test_an_answer_never_carries_transfer_parameters(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    make_engine("d", "decode")
    router.knows(1)
    _, _, raw = router.post({"model": "m", "prompt": SHORT})
    assert b"secret" not in raw


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kv_transfer_params": {"headstart": {}}}, "kv_transfer_params"),
        ({"ec_transfer_params": {}}, "ec_transfer_params"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"vllm_xargs": {"kv_transfer_params": 1}}, "vllm_xargs.kv_transfer_params"),
        ({"vllm_xargs": {"kv_cache_report_mode": "full"}}, "vllm_xargs.kv_cache_report_mode"),
    ],
)
def test_fields_that_steer_the_transfer_are_refused_by_name(
    make_engine: MakeEngine, router: RouterUnderTest, body: dict[str, Any], field: str
) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    status, headers, raw = router.post({"model": "m", "prompt": SHORT, **body})
    assert status == 400
    assert error(raw)["param"] == field
    assert "x-request-id" in headers
    assert decode.bodies == []


def test_a_clients_request_id_is_not_taken(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    _, headers, _ = router.post({"model": "m", "prompt": SHORT})
    assert decode.headers[0]["x-request-id"] == headers["x-request-id"]
    assert len(headers["x-request-id"]) == 32


def test_sixteen_clients_with_one_new_prefix_are_one_prefill(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill = make_engine("p", "prefill")
    make_engine("d", "decode")
    router.knows(2)
    prefill.hold.clear()
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(router.post, {"model": "m", "prompt": LONG + f" {number}"}) for number in range(16)]
        wait_for(lambda: router.get("/metrics")[1].count(b"headstart_requests_in_flight 16") == 1)
        prefill.hold.set()
        routes = sorted(answer.result()[1]["x-headstart-route"] for answer in answers)
    assert len(prefill.bodies) == 1
    assert routes == ["decode"] * 15 + ["prefill+decode"]


def test_when_the_leaders_worker_fails_another_prefill_worker_computes(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    bad, good = make_engine("a-bad", "prefill"), make_engine("b-good", "prefill")
    make_engine("d", "decode")
    router.knows(3)
    bad.status = 500
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: router.post({"model": "m", "prompt": LONG + str(n)}), range(4)))
    assert all(status == 200 for status, _, _ in answers)
    assert (len(bad.bodies), len(good.bodies)) == (1, 1)


def test_when_every_prefill_worker_fails_one_decode_computes_and_the_rest_wait_for_it(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    prefill.status = 503
    status, headers, _ = router.post({"model": "m", "prompt": LONG})
    assert status == 200
    assert headers["x-headstart-route"] == "decode"
    assert len(decode.bodies) == 1
    assert b'headstart_prefills_total{outcome="failed"} 1.0' in router.get("/metrics")[1]


def test_without_prefill_workers_waiting_requests_follow_the_one_that_computes(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.hold.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(router.post, {"model": "m", "prompt": LONG}) for _ in range(4)]
        wait_for(lambda: len(decode.bodies) == 1 and b"in_flight 4.0" in router.get("/metrics")[1])
        time.sleep(0.2)
        assert len(decode.bodies) == 1, "the others must wait for the first"
        decode.hold.set()
        assert all(answer.result()[0] == 200 for answer in answers)


def leave(router: RouterUnderTest, prompt: str) -> socket.socket:
    """Sends a request whose client can be made to vanish."""
    raw = json.dumps({"model": "m", "prompt": prompt}).encode()
    client = socket.create_connection(("127.0.0.1", router.port))
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
    client.sendall(f"content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return client


def test_a_prefill_goes_on_while_somebody_waits_and_ends_when_nobody_does(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill = make_engine("p", "prefill")
    make_engine("d", "decode")
    router.knows(2)
    prefill.hold.clear()
    leader = leave(router, LONG)
    wait_for(lambda: len(prefill.bodies) == 1)
    follower = leave(router, LONG + "!")
    flights = router.gateway.dispatcher.flights
    wait_for(lambda: {flight._interested for flight in flights._by_key.values()} == {2})
    leader.close()
    wait_for(lambda: b"in_flight 1.0" in router.get("/metrics")[1])
    assert prefill.aborted == 0
    follower.close()
    wait_for(lambda: prefill.aborted == 1)
    wait_for(lambda: b"in_flight 0.0" in router.get("/metrics")[1])


def test_a_client_that_leaves_aborts_its_decode_leg(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.hold.clear()
    client = leave(router, SHORT)
    wait_for(lambda: len(decode.bodies) == 1)
    client.close()
    wait_for(lambda: decode.aborted == 1)
    assert router.gateway.fleet.in_flight["d"] == 0


def test_a_stream_passes_untouched_but_for_its_usage(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    _, headers, raw = router.post({"model": "m", "prompt": SHORT, "stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    assert raw.startswith(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"b"}],"usage":null}\n\n')
    assert raw.endswith(b"data: [DONE]\n\n")
    usage = json.loads(raw.split(b"\n\n")[2].removeprefix(b"data: "))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == int(headers["x-headstart-cached-tokens"]) == 99
    decode.pieces = [b"data: {", b'"odd":  1 }\n', b"\ndata: caf\xc3\xa9 \x00\n\n: ping\n\ndata: [DONE]\n\n"]
    assert router.post({"model": "m", "prompt": SHORT, "stream": True})[2] == b"".join(decode.pieces)


def test_a_worker_that_is_gone_is_replaced_before_the_first_byte(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    gone, failing, good = make_engine("a", "decode"), make_engine("b", "decode"), make_engine("c", "decode")
    router.knows(3)
    gone.stop()
    failing.status = 500
    for _ in range(3):
        status, headers, _ = router.post({"model": "m", "prompt": [1, 2, 3]})
        assert (status, headers["x-headstart-worker"]) == (200, "c")
    assert len(good.bodies) == 3


def test_when_every_worker_fails_the_client_hears_it(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    make_engine("d", "decode").status = 500
    router.knows(1)
    status, headers, raw = router.post({"model": "m", "prompt": [1, 2]})
    assert status == 502
    assert error(raw)["code"] == "workers_failed"
    assert headers["retry-after"] == "1"


def test_a_stream_that_begins_with_the_engines_failure_is_asked_of_another_worker(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    """vLLM answers 200 before it finds that its engine is dead."""
    failing, healthy = make_engine("decode-0", "decode"), make_engine("decode-1", "decode")
    failing.pieces = [
        b'data: {"error":{"message":"EngineCore',
        b' is dead","type":"InternalServerError","param":null,"code":500}}\n\n',
        b"data: [DONE]\n\n",
    ]
    router.knows(2)
    for _ in range(2):
        status, headers, raw = router.post({"model": "m", "prompt": SHORT, "stream": True})
        assert (status, headers["x-headstart-worker"]) == (200, "decode-1")
        assert b"error" not in raw
    assert len(healthy.bodies) == 2


def test_a_worker_that_dies_in_the_middle_of_a_stream_is_an_error_event_and_no_done(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.die_after_pieces = 2
    status, _, raw = router.post({"model": "m", "prompt": SHORT, "stream": True})
    assert status == 200
    *events, last, end = raw.split(b"\n\n")
    assert len(events) == 2
    assert error(last.removeprefix(b"data: "))["code"] == "worker_died"
    assert end == b""
    assert b"[DONE]" not in raw


def test_the_engines_own_refusal_reaches_the_client(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    decode.status = 400
    status, _, raw = router.post({"model": "m", "prompt": LONG})
    assert status == 400
    assert error(raw)["message"] == "too long"


def test_headers_come_even_if_the_report_does_not(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    make_engine("d", "decode").reports = False
    router.knows(1)
    _, headers, _ = router.post({"model": "m", "prompt": SHORT})
    assert headers["x-headstart-cached-tokens"] == "0"
    assert router.gateway.dispatcher.reports._expected == {}


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff", b'{"model": 5}', b'{"a":' * 5000])
def test_malformed_bodies_are_400(router: RouterUnderTest, raw: bytes) -> None:
    status, _, answer = router.post(raw)
    assert status == 400
    error(answer)


def test_a_body_over_the_cap_is_413_with_and_without_a_length(router: RouterUnderTest) -> None:
    status, _, raw = router.post(b" " * 200_000)
    assert status == 413
    assert "router.body_bytes_max" in error(raw)["message"]
    client = socket.create_connection(("127.0.0.1", router.port))
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    for _ in range(4):
        client.sendall(chunk)
    assert b"413" in client.recv(100)
    client.close()


def test_no_worker_is_503_and_an_unknown_model_404(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    status, headers, raw = router.post({"model": "m", "prompt": SHORT})
    assert (status, headers["retry-after"]) == (503, "1")
    assert error(raw)["code"] == "no_decode_worker"
    make_engine("d", "decode")
    router.knows(1)
    status, _, raw = router.post({"model": "other", "prompt": SHORT})
    assert status == 404
    assert error(raw)["param"] == "model"


def test_what_cannot_be_split_goes_to_decode_as_it_is(make_engine: MakeEngine, router: RouterUnderTest) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    for extra in ({"prompt": [LONG, LONG]}, {"prompt": LONG, "echo": True}, {"prompt": LONG, "prompt_logprobs": 1}):
        assert router.post({"model": "m", **extra})[1]["x-headstart-route"] == "decode"
        assert "prompt_token_ids" not in decode.bodies[-1]["kv_transfer_params"]
    assert prefill.bodies == []


def test_a_draining_worker_gets_nothing_new(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    from cachebus.messages import Drain

    draining, other = make_engine("a", "decode"), make_engine("b", "decode")
    router.knows(2)
    client = bus.client()
    client.call(Drain("a"), 3000)
    wait_for(lambda: router.gateway.watch.replica.workers["a"].draining)
    for _ in range(3):
        router.post({"model": "m", "prompt": [1, 2]})
    assert (len(draining.bodies), len(other.bodies)) == (0, 3)
    client.close()


def test_the_other_pages(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    assert router.get("/health")[0] == 200
    assert router.get("/ready") == (503, b"no decode worker is ready\n")
    make_engine("d", "decode")
    router.knows(1)
    assert router.get("/ready")[0] == 200
    status, raw = router.get("/v1/models")
    assert [model["id"] for model in json.loads(raw)["data"]] == ["m"]
    exposition = router.get("/metrics")[1]
    assert b'headstart_workers{role="decode",state="ready"} 1.0' in exposition
    assert b"headstart_prefill_backlog_seconds 0.0" in exposition
    status, raw = router.get("/v1/nothing")
    assert status == 404
    error(raw)
    assert router.get("/v1/completions")[0] == 405


def test_a_bus_that_is_gone_shows_in_ready_and_requests_go_on(bus: Bus, make_engine: MakeEngine, router: RouterUnderTest) -> None:
    make_engine("d", "decode")
    router.knows(1)
    bus.stop()
    router.gateway.watch._heard_at -= 10
    assert router.get("/ready") == (503, b"the cachebus does not answer\n")
    assert router.post({"model": "m", "prompt": SHORT})[0] == 200
    bus.start()
    threading.Event().wait(0)
