"""What a gateway costs, measured for real on a small cluster of simulated workers, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cachebus.errors import SettingsError
from deploy.bench import router, router_processes
from deploy.bench.report import Row
from deploy.cli import _parser
from deploy.sim.profile import read_profile
from deploy.sim.vocabulary import tokenised


def test_bodies_of_a_size_begin_alike_and_are_never_the_same() -> None:
    bodies = router._Bodies(2400, "m")
    one, two = (json.loads(bodies.next(0)) for _ in range(2))
    assert len(tokenised(one["prompt"])) == 2400
    assert tokenised(one["prompt"])[:2384] == tokenised(two["prompt"])[:2384]
    assert tokenised(one["prompt"])[2384:] != tokenised(two["prompt"])[2384:]
    assert "stream" not in one
    streamed = json.loads(bodies.next(64))
    assert (streamed["stream"], streamed["max_tokens"]) == (True, 64)
    assert (bodies.label, router._Bodies(32, "m").label) == ("10 KB", "184 B")


def test_a_gateway_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "router.json"
    command = ["bench", "router", "--tokens", "32,600", "--clients", "4", "--requests", "20", "--runs", "2", "--output", str(output)]
    assert router.run(_parser().parse_args(command)) == 0
    rows = [Row(**row) for row in json.loads(output.read_text())["rows"]]
    assert {(row.tokens, row.metric, row.concurrency) for row in rows} == {(n, *m) for n in (32, 600) for m in ((router.CPU, 4), (router.LATENCY, 1))}
    assert all(0.05 < row.median < 50 for row in rows if row.metric == router.CPU), "a request costs something, and not a second"
    assert len(router.table(rows).splitlines()) == 2 + len(rows)
    assert "CPU ms a request, 2" in capsys.readouterr().out


def test_lengths_that_are_none_are_refused() -> None:
    with pytest.raises(SettingsError, match="prompt lengths"):
        router.run(_parser().parse_args(["bench", "router", "--tokens", "many"]))


@pytest.mark.parametrize("given", ["many", "0", "1,2"])
def test_numbers_of_processes_leave_a_core_to_the_clients(given: str) -> None:
    with pytest.raises(SettingsError, match="--processes"):
        router_processes.counts(given, 2)


def test_a_router_of_several_processes_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "_RATE_REQUESTS", 40)
    monkeypatch.setattr(router, "_RATE_TOKENS", 32)
    options = _parser().parse_args(["bench", "router", "--clients", "4", "--requests", "40", "--runs", "2"])
    rate, cores = router._measure_processes(1, read_profile(None), options)
    assert (rate.metric, rate.case.endswith("B, 1 process"), len(rate.values)) == (router_processes.RATE, True, 2)
    assert all(10 < value < 20_000 for value in rate.values)
    assert all(0 < value < 1.1 for value in cores.values), "one core is all it has"
