"""The soak: its plan follows from the seed, it sees what is wrong or left, and a small one on real processes is clean."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from cachebus.client import BusClient
from cachebus.holder import Holder
from cachebus.keys import KEY_BYTES
from cachebus.messages import NewEntry, Reserve, Reserved
from cachebus.table import LAYOUT_BYTES
from deploy.bench import soak, soak_leaks
from deploy.bench.soak_client import CUT, LEFT, WHOLE, WRONG, Ended
from deploy.bench.soak_cluster import SoakCluster, SoakPlan
from deploy.bench.soak_leaks import FILES_GROWN_MAX, MEMORY_GROWN_MAX, Size
from deploy.bench.soak_plan import COMPLETIONS, KILLS_OF_ONE_UNTIL, PROFILE, Asked, Requests, faults
from deploy.cli import main
from deploy.sim.expected import expected_tokens
from deploy.sim.vocabulary import chat_prompt, tokenised
from router import remembered

SMALL = SoakPlan(prefill=1, decode=2, speed=4.0, router_processes=1)


def prompt_of(asked: Asked) -> list[int]:
    body = msgspec.json.decode(asked.body)
    if asked.path == COMPLETIONS:
        return tokenised(body["prompt"]) if isinstance(body["prompt"], str) else list(body["prompt"])
    return chat_prompt(body.get("messages") or [{"role": "user", "content": body["input"]}])


def test_requests_follow_from_the_seed_and_their_answers_from_their_prompts() -> None:
    asked = list(Requests(7).take(2000))
    assert asked[:200] == list(Requests(7).take(200))
    assert asked[:200] != list(Requests(8).take(200))
    assert [one.number for one in asked] == list(range(2000))
    for one in asked[:300]:
        assert len(prompt_of(one)) == one.prompt_tokens
        assert one.answer == expected_tokens(PROFILE.model, PROFILE.layers, prompt_of(one), len(one.answer))
    paths = Counter(one.path for one in asked)
    assert len(paths) == 4
    assert min(paths.values()) > 50
    begins = Counter(tuple(prompt_of(one)[:32]) for one in asked if one.path == COMPLETIONS)
    assert sum(count for count in begins.values() if count > 1) > 600, "many prompts begin like another"
    assert sum(one.leaves_in is not None for one in asked) > 4
    assert sum(one.leaves_after is not None for one in asked) > 2


def test_faults_follow_from_the_seed_and_bus_and_router_live_on_in_the_end() -> None:
    found = faults(3, 100_000, 100)
    assert found == faults(3, 100_000, 100)
    assert found != faults(4, 100_000, 100)
    assert 800 < len(found) < 1200
    assert all(a.after <= b.after for a, b in pairwise(found))
    last = {kind: max(fault.after for fault in found if fault.kind == kind) for kind in {fault.kind for fault in found}}
    assert len(last) == 8
    assert max(last["kill bus"], last["kill router"]) <= KILLS_OF_ONE_UNTIL * 100_000 < 90_000 < last["kill"]


def test_what_grows_is_told_and_what_is_new_is_not() -> None:
    before = {"router 0": Size(1, 50, 1 << 26), "cachebus": Size(2, 50, 1 << 26)}
    most = {
        "router 0": Size(1, 50 + FILES_GROWN_MAX, (1 << 26) + MEMORY_GROWN_MAX + remembered.BYTES_MAX),
        "cachebus": Size(2, 50 + FILES_GROWN_MAX, (1 << 26) + MEMORY_GROWN_MAX),
    }
    assert soak_leaks.grown(before, most) == []
    more = {name: Size(size.pid, size.files + 1, size.memory + 1) for name, size in most.items()}
    assert len(soak_leaks.grown(before, more)) == 4
    assert soak_leaks.grown(before, {name: Size(9, size.files, size.memory) for name, size in more.items()}) == []


def test_a_cut_connection_is_excused_by_a_router_that_was_killed_alone() -> None:
    tally = soak.Tally()
    (asked,) = Requests(1).take(1)
    for at in (10.0, 20.0):
        tally.take(asked, Ended(CUT, "reset"), at)
    assert soak._unexcused(tally.cut_at, [(9.0, 11.0)]) == ["request 0: reset"]
    assert soak._unexcused(tally.cut_at, [(9.0, 11.0), (19.0, 19.5)]) == []


@pytest.mark.parametrize("seed", [1, None])
def test_a_small_one_is_clean(seed: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    output = tmp_path / "soak.json"
    arguments = ["bench", "soak", "--requests", "1000", "--fault-every", "90", "--clients", "32", "--speed", "4", "--seed", str(seed)]
    code = main([*arguments, "--output", str(output), "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"seed {seed}" in said
    written = json.loads(output.read_text())
    rows = {row["metric"]: row["median"] for row in written["rows"]}
    assert rows["requests"] == 1000
    assert rows["whole"] > 500
    assert rows["left_by_the_client"] > 10
    assert rows["cached_share"] > 0.02
    assert (rows["wrong"], rows["hung"], rows["leaks"], rows["failures"]) == (0, 0, 0, 0)
    assert written["host"]["seed"] == seed
    assert sum(written["host"]["faults"].values()) > 3
    assert list(tmp_path.iterdir()) == [output], "the NVMe tier's files are gone"


def test_workers_that_answer_wrongly_are_seen(tmp_path: Path) -> None:
    wanted = soak.Soak(SMALL, seed=2, requests=60, clients=16, fault_every=1000, oracle="another model")
    tally = asyncio.run(soak.soak(wanted, tmp_path))
    assert tally.outcomes[WRONG] > 50
    assert set(tally.outcomes) <= {WRONG, LEFT}
    assert not tally.outcomes[WHOLE]
    assert soak.verdict(tally)[0] == f"{tally.outcomes[WRONG]} wrong"
    assert "in place of" in tally.failures[0]
    assert not tally.leaks


def test_what_is_not_given_back_is_seen(tmp_path: Path) -> None:
    (tmp_path / "router.log").write_text("Traceback (most recent call last):\n")
    cluster = SoakCluster(SMALL, tmp_path)
    try:
        cluster.start()
        assert soak_leaks.busy(cluster) == []
        holder = Holder(cluster.run_dir)
        client = BusClient(cluster.run_dir, "test", holder)
        reserved = client.call(Reserve(holder.id, b"l" * LAYOUT_BYTES, [NewEntry(b"k" * KEY_BYTES, 5000)]), 3000)
        assert isinstance(reserved, Reserved)
        assert "an extent of 5000 bytes is RESERVED" in soak_leaks.busy(cluster)
        assert "the bus has 1 writing" in soak_leaks.busy(cluster)
        client.close()
        (tmp_path / "decode.log").open("a").write("Traceback (most recent call last):\n")
        found = asyncio.run(cluster.end())
        assert "decode.log has 1 tracebacks" in found
        assert f"{cluster.region} is left" in found, "the bus keeps it for a holder that lives"
        assert f"holder {holder.id} is still locked" in found
        assert len(found) == 3, "what an earlier run logged is not counted"
        holder.close()
    finally:
        cluster.kill_all()
    assert not cluster.region.exists()
