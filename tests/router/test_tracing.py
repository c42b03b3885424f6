"""Traces over real HTTP: a client's goes through the router into the workers, and spans reach a collector; the engines are doubles."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_double import EngineDouble
from otlp_collector import OtlpCollector, attributes
from router_under_test import MakeEngine, RouterUnderTest
from tests_shared import Bus, wait_for

from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from router import serve
from router.settings import RouterSettings
from router.tracing import OtlpTracing

LONG = "x" * 1100
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "rojo=00f067aa0ba902b7"}


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    made = OtlpCollector()
    yield made
    made.stop()


@pytest.fixture
def router(bus: Bus, collector: OtlpCollector) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(bus, tracing=OtlpTracing(collector.url))
    yield router
    router.stop()


def told(engine: EngineDouble) -> list[str | None]:
    return [headers.get("traceparent") for headers in engine.headers]


def test_a_clients_trace_goes_on_through_both_legs(make_engine: MakeEngine, router: RouterUnderTest, collector: OtlpCollector) -> None:
    prefill, decode = make_engine("p", "prefill"), make_engine("d", "decode")
    router.knows(2)
    _, headers, _ = router.post({"model": "m", "prompt": LONG, "stream": True}, headers=PARENT)
    spans = collector.of(TRACE, 5)
    assert sorted(spans) == ["decode", "prefill", "receive", "render", "text_completion m"]
    request = spans["text_completion m"]
    assert (request.parent_span_id.hex(), request.kind) == (SPAN, 2)
    assert {span.parent_span_id for name, span in spans.items() if span is not request} == {request.span_id}
    # Each leg's worker was told the leg's own span.
    assert told(prefill) == [f"00-{TRACE}-{spans['prefill'].span_id.hex()}-01"]
    assert told(decode) == [f"00-{TRACE}-{spans['decode'].span_id.hex()}-01"]
    assert decode.headers[0]["tracestate"] == "rojo=00f067aa0ba902b7"

    of_request = attributes(request)
    ttft = of_request.pop("gen_ai.response.time_to_first_chunk")
    assert of_request == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 1100,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "headstart.request_id": headers["x-request-id"],
        "headstart.route": "prefill+decode",
    }
    of_decode = attributes(spans["decode"])
    assert (of_decode["headstart.worker"], of_decode["headstart.cached_tokens.dram"], of_decode["gen_ai.operation.name"]) == (
        "d",
        1099,
        "text_completion",
    )
    assert attributes(spans["prefill"])["headstart.worker"] == "p"
    (event,) = spans["decode"].events
    assert event.name == "first token"
    assert request.start_time_unix_nano <= spans["render"].start_time_unix_nano <= spans["prefill"].start_time_unix_nano
    assert spans["prefill"].end_time_unix_nano <= spans["decode"].start_time_unix_nano <= event.time_unix_nano
    assert event.time_unix_nano <= spans["decode"].end_time_unix_nano <= request.end_time_unix_nano
    assert (event.time_unix_nano - request.start_time_unix_nano) / 1e9 == pytest.approx(ttft, abs=1e-5)
    assert abs(request.end_time_unix_nano / 1e9 - time.time()) < 20
    assert collector.resources[0]["service.name"] == "headstart-router"


def test_without_a_clients_trace_one_begins_here_and_a_hit_says_so(
    make_engine: MakeEngine, router: RouterUnderTest, collector: OtlpCollector
) -> None:
    make_engine("p", "prefill")
    decode = make_engine("d", "decode")
    router.knows(2)
    for _ in range(2):
        router.post({"model": "m", "messages": [{"role": "user", "content": LONG}]}, "/v1/chat/completions")
    first, second = ((header or "").split("-")[1] for header in told(decode))
    assert first != second
    # It was known from the first one, so nothing was rendered.
    request = collector.of(second, 3)["chat m"]
    assert request.parent_span_id == b""
    assert attributes(request)["headstart.cached_tokens.dram"] == attributes(request)["gen_ai.usage.cache_read.input_tokens"] == 1099


@pytest.mark.parametrize("broken", ["", "00-1-2-01", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01", "\u00ff" * 55])
def test_a_broken_traceparent_begins_a_new_trace(make_engine: MakeEngine, router: RouterUnderTest, broken: str) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    assert router.post({"model": "m", "prompt": "y"}, headers={"traceparent": broken})[0] == 200
    (parent,) = told(decode)
    version, trace, span, flags = (parent or "").split("-")
    assert (version, flags, len(trace), len(span)) == ("00", "01", 32, 16)
    assert trace not in (TRACE, "0" * 32)


def test_who_does_not_want_to_be_traced_is_not(make_engine: MakeEngine, router: RouterUnderTest, collector: OtlpCollector) -> None:
    decode = make_engine("d", "decode")
    router.knows(1)
    router.post({"model": "m", "prompt": "y"}, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    router.post({"model": "m", "prompt": "y"}, headers={"traceparent": f"00-{'1' * 32}-{SPAN}-01"})
    collector.of("1" * 32, 3)
    assert TRACE not in {span.trace_id.hex() for span in collector.spans}
    assert (told(decode)[0] or "").startswith(f"00-{TRACE}-")
    assert (told(decode)[0] or "").endswith("-00")


def test_failed_legs_and_requests_are_errors(make_engine: MakeEngine, router: RouterUnderTest, collector: OtlpCollector) -> None:
    make_engine("d", "decode").status = 500
    router.knows(1)
    assert router.post({"model": "m", "prompt": "y"}, headers=PARENT)[0] == 502
    spans = collector.of(TRACE, 3)
    request, leg = spans["text_completion m"], spans["decode"]
    assert (request.status.code, attributes(request)["error.type"]) == (2, "502")
    assert (leg.status.code, attributes(leg)["error.type"]) == (2, "LegRefused")


def test_nothing_of_a_prompt_is_in_a_span(make_engine: MakeEngine, router: RouterUnderTest, collector: OtlpCollector) -> None:
    make_engine("d", "decode")
    router.knows(1)
    router.post({"model": "m", "prompt": "secret words", "user": "someone"}, headers={**PARENT, "authorization": "Bearer hidden"})
    collector.of(TRACE, 3)
    assert not [word for word in ("secret", "someone", "hidden") if word in str(collector.spans)]


def test_a_collector_that_hangs_or_is_gone_costs_no_request(bus: Bus, make_engine: MakeEngine, collector: OtlpCollector) -> None:
    make_engine("d", "decode")
    collector.hold.clear()
    for url in (collector.url, f"http://127.0.0.1:{free_port('127.0.0.1')}"):
        router = RouterUnderTest(bus, tracing=OtlpTracing(url))
        try:
            router.knows(1)
            begun = time.monotonic()
            assert {router.post({"model": "m", "prompt": "y", "stream": True})[0] for _ in range(30)} == {200}
            if url == collector.url:
                wait_for(lambda: collector.calls >= 1)
                assert router.post({"model": "m", "prompt": "y"})[0] == 200
            assert time.monotonic() - begun < 10
        finally:
            begun = time.monotonic()
            router.stop()
        assert time.monotonic() - begun < 8


def test_without_a_collector_nothing_is_imported_and_workers_are_told_nothing(bus: Bus, make_engine: MakeEngine) -> None:
    decode = make_engine("d", "decode")
    router = RouterUnderTest(bus)
    try:
        router.knows(1)
        assert router.post({"model": "m", "prompt": "y"}, headers=PARENT)[0] == 200
    finally:
        router.stop()
    assert told(decode) == [None]
    program = "import sys; import router.serve, deploy.cli; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60, check=False).returncode == 0


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What None stands for in sys.modules can't be imported.
    monkeypatch.setitem(sys.modules, "router.tracing", None)
    monkeypatch.setattr(serve, "_reach_bus", lambda _run_dir: asyncio.sleep(0))
    with pytest.raises(HeadstartError, match=r"router\.otlp_endpoint: .* its extra `otel`"):
        serve.serve(RouterSettings(port=0, otlp_endpoint="http://127.0.0.1:4318"), tmp_path)


def test_an_address_that_is_none_is_refused() -> None:
    assert RouterSettings(otlp_endpoint="collector:4317").problems() == [
        ("otlp_endpoint", "'collector:4317' is no address; give http://HOST:PORT or https://HOST:PORT")
    ]
