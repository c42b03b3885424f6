"""The benchmarks of many requests on real engines: what they say of hits is what must be, and plain vLLM shows that it could be otherwise."""

from __future__ import annotations

import msgspec
import pytest

from deploy.bench import benchmark, chat, decode, engines, goals, handover, reuse, trace_hits
from deploy.bench.benchmark import Results
from deploy.bench.engines import Place
from deploy.bench.load import hit_share
from deploy.bench.report import Row
from deploy.bench.trace import Arrival
from deploy.bench.trace_sample import Scale
from deploy.cli import resolved
from deploy.settings import read_settings

pytestmark = pytest.mark.engine

BUDGET_BYTES = 22 << 20
"""22 blocks of the demo model; the system prompts take 48."""
QUESTION, PROMPT = 32, 512
REUSE = reuse.Plan(12, PROMPT, QUESTION, answer_tokens=4, warm_seconds=0.5, window_seconds=0.75, windows=2, settle_seconds=0.5)
CHAT = chat.Plan(turns=3, turn_tokens=320, answer_tokens=16, runs=1, pause_seconds=0.3)
DECODE = decode.Plan(2, 64, 400, arrivals=2, prefix_tokens=512, question_tokens=16, interval=0.3, lead=1.0, runs=1, settle_seconds=0.5)
SCALE = Scale(seconds=2, speed=1, share=1.0, block_tokens=128, answer_tokens_max=4)
HANDOVER = handover.Plan([640], runs=2)
TWENTY = "twenty requests, 80%"
PROMPTS = [[0, 1], [2, 3], [0, 1, 4, 5], [2, 3, 6, 7], [0, 1, 4, 5, 8, 9], [2, 3]]
TRACE = [Arrival(0.3 * number, 512 * len(ids), 4, tuple(ids)) for number, ids in enumerate(PROMPTS)]

Found = dict[tuple[str, str, str, str], list[Row]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The rows of all five benchmarks by benchmark, system, case and metric, in the order of the prompts' lengths."""
    settings = read_settings(None, ["cache.max_local_cpu_size=0.25", "model.max_model_len=1024"], {})
    settings = msgspec.structs.replace(settings, model=resolved(settings.model))
    results = {name: Results(name, settings) for name in ("reuse", "chat", "decode", "trace", "handover")}
    logs = tmp_path_factory.mktemp("logs")
    place = Place(settings, logs, kv_cache_bytes=BUDGET_BYTES, workers=2)
    for system in (goals.PLAIN, goals.OURS):
        with engines.KNOWN[system](place) as started:
            benchmark.warm_up(started, settings)
            reuse.measure(REUSE, [100], [2], reuse.State(), system, started, results["reuse"])
            served = started[0].answers(REUSE.requests(80, 1 << 20)[:20], 60.0, clients=2)
            results["reuse"].add(system, TWENTY, (REUSE.tokens, 2), reuse.HITS, [hit_share(served)])
            handover.measure(HANDOVER, system, started, results["handover"])
            if system == goals.PLAIN:
                continue
            chat.measure(CHAT, [2], system, started, results["chat"])
            decode.measure(DECODE, system, started, results["decode"])
            for engine in started:
                engine.empty_hbm()
            trace_hits.measure(settings, TRACE, SCALE, 30.0, system, started, results["trace"])
    # A region that is left behind would fill the machine's memory from run to run.
    assert "kept the region" not in (logs / "cachebus.log").read_text()
    rows: Found = {}
    for row in sorted((row for one in results.values() for row in one.rows), key=lambda row: row.tokens):
        rows.setdefault((row.bench, row.system, row.case, row.metric), []).append(row)
    return rows


def test_reuse_hits_all_of_what_is_reused_and_a_small_cache_does_not(found: Found) -> None:
    (every,) = found["reuse", goals.OURS, "dram, 100%", reuse.HITS]
    assert every.median == round(PROMPT / REUSE.tokens, 4)
    (twenty,) = found["reuse", goals.OURS, TWENTY, reuse.HITS]
    assert twenty.median == round(16 * PROMPT / (20 * REUSE.tokens), 4)
    (held,) = found["reuse", goals.PLAIN, TWENTY, reuse.HITS]
    assert held.median < twenty.median - 0.2


def test_reuse_gives_a_rate_for_each_window(found: Found) -> None:
    for system, case in ((goals.OURS, "dram, 100%"), (goals.PLAIN, "hbm held to a budget, 100%")):
        (rate,) = found["reuse", system, case, reuse.RATE]
        assert (rate.tokens, rate.concurrency, rate.runs) == (REUSE.tokens, 2, 2)
        assert rate.p99 > 0


def test_chat_finds_the_turns_before_on_the_other_worker(found: Found) -> None:
    shares = [row.median for row in found["chat", goals.OURS, goals.HIT, chat.HITS]]
    # The whole chunks of the prompts before, which were computed on the other worker.
    assert shares == [0, round(256 / 624, 4), round(512 / 944, 4)]
    assert [row.tokens for row in found["chat", goals.OURS, goals.HIT, chat.TTFT]] == [304, 624, 944]


def test_decode_sees_the_batch_in_every_case(found: Found) -> None:
    cases = {case for bench, _, case, metric in found if (bench, metric) == ("decode", decode.ITL)}
    assert cases == {goals.OWN_HIT, goals.HIT, goals.COLD, decode.ALONE}
    for case in cases:
        (row,) = found["decode", goals.OURS, case, decode.ITL]
        assert (row.tokens, row.concurrency) == (512, DECODE.batch)
        assert row.runs >= 2 * DECODE.batch
        assert 0 < row.median <= row.p99


def test_the_trace_reaches_its_ceiling_where_there_is_room(found: Found) -> None:
    known = 2 + 2 + 4 + 2
    for which in (trace_hits.UNLIMITED, trace_hits.OPTIMAL, trace_hits.LRU):
        (ceiling,) = found["trace", goals.OURS, goals.HIT, f"{trace_hits.CEILING}{which}"]
        assert ceiling.median == round(known / sum(map(len, PROMPTS)), 4)
        (share,) = found["trace", goals.OURS, goals.HIT, f"{trace_hits.OF_CEILING}{which}"]
        assert share.median == pytest.approx(1.0, abs=0.02)


def test_the_handover_is_measured_against_plain_vllm(found: Found) -> None:
    (alone,) = found["handover", goals.PLAIN, goals.COLD, handover.TTFT]
    (ours,) = found["handover", goals.OURS, handover.HANDOVER, handover.TTFT]
    (added,) = found["handover", goals.OURS, handover.HANDOVER, handover.ADDED]
    assert (alone.tokens, ours.tokens, alone.runs, ours.runs) == (640, 640, 2, 2)
    assert added.median == pytest.approx(ours.median / alone.median - 1, abs=0.01)
    (followed,) = found["handover", goals.OURS, handover.FOLLOWED, handover.TTFT]
    assert (followed.tokens, followed.runs) == (640, 2)
