"""What is recorded of a request, and what is not kept."""

from __future__ import annotations

import asyncio
from contextvars import Context

import pytest

from cachebus.messages import Report
from router.recent import KEPT, Recent
from router.timeline import PHASES_MAX, Timeline, Trace, first_token, followed, phase


def timeline(trace: Trace | None = None) -> Timeline:
    return Timeline("r", "/v1/completions", 10.0, 1000.0, trace=trace)


def test_phases_end_where_their_blocks_end_and_say_what_broke_them() -> None:
    recent = Recent()
    found = recent.begin("r", "/v1/completions", "", {})
    with phase("render", "d"):
        pass
    with pytest.raises(ConnectionError), phase("prefill", "p"):
        raise ConnectionError
    with phase("decode", "d"):
        first_token()
        recent.answered("d", None, Report("t", "decode", "d", 100, 16, {"dram": 32, "nvme": 0}), None)
    recent.end(found, 200, "decode")
    assert [(p.name, p.worker, p.failed) for p in found.phases] == [("render", "d", ""), ("prefill", "p", "ConnectionError"), ("decode", "d", "")]
    decode = found.phases[-1]
    assert decode.first_token == found.first_token
    assert decode.ended is not None
    assert found.begun <= found.phases[0].begun <= decode.begun <= decode.first_token <= decode.ended <= (found.ended or 0)
    assert decode.cached == {"hbm": 16, "dram": 32}
    assert (found.worker, found.prompt_tokens, found.cached) == ("d", 100, {})


def test_what_belongs_to_no_request_is_measured_and_forgotten() -> None:
    async def alone() -> None:
        assert followed() is None
        with phase("render") as one:
            first_token()
        assert one.ended is not None

    Context().run(asyncio.run, alone())


def test_waiting_that_is_looked_at_again_and_again_is_one_phase() -> None:
    found = timeline()
    first = found.begin("wait", "another router", 11.0)
    first.ended = 11.25
    assert found.begin("wait", "another router", 11.3) is first
    assert first.ended is None
    assert found.begin("wait", "", 12.0) is not first
    assert len(found.phases) == 2


def test_a_request_that_is_over_has_nothing_under_way() -> None:
    found = timeline()
    prefill = found.begin("prefill", "p", 11.0)
    found.end(499, "none", 12.0)
    assert prefill.ended == 12.0


def test_a_report_belongs_to_the_leg_of_its_worker() -> None:
    found = timeline()
    found.begin("decode", "d", 11.0)
    found.begin("decode", "e", 12.0)
    found.reported("decode", Report("t", "decode", "d", 100, 16, {}))
    assert [p.cached for p in found.phases] == [{}, {}]
    found.reported("decode", Report("t", "decode", "e", 100, 16, {}))
    assert [p.cached for p in found.phases] == [{}, {"hbm": 16}]


def test_each_leg_names_its_own_span_to_its_worker() -> None:
    assert timeline().begin("decode", "d", 11.0).headers == {}
    found = timeline(Trace("a" * 32, "b" * 16, sampled=False, state="x=1"))
    one, two = found.begin("prefill", "p", 11.0), found.begin("decode", "d", 12.0)
    assert one.headers == {"traceparent": f"00-{'a' * 32}-{one.span_id}-00", "tracestate": "x=1"}
    assert one.span_id != two.span_id
    assert len(one.span_id) == 16


def test_memory_is_bounded() -> None:
    recent = Recent()
    for number in range(KEPT + 5):
        found = recent.begin(str(number), "/v1/completions", "", {})
        for _ in range(PHASES_MAX + 5):
            with phase("decode", "d"):
                pass
        recent.end(found, 200, "decode")
    kept = list(recent.latest_first())
    assert [kept[0].request_id, kept[-1].request_id, len(kept)] == [str(KEPT + 4), "5", KEPT]
    assert len(kept[0].phases) == PHASES_MAX
    assert recent.find("4") is None
    assert recent.find("5") is kept[-1]
    assert not recent.under_way
