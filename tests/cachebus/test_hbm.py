"""Accounts of HBM on a real bus: who may speak, what routers hear, and when nothing is known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_shared import ANSWER_MS, NAMESPACE, Bus, wait_for

from cachebus import hbm
from cachebus.client import BusClient
from cachebus.codec import EventBatch
from cachebus.errors import BusError, Refused
from cachebus.hbm import HbmAccounts
from cachebus.holder import Holder
from cachebus.messages import Leave, SnapshotReply
from cachebus.messages_hbm import HBM_KEYS_MAX, HbmChanged, HbmOpened, OpenHbm, ReportHbm
from cachebus.metrics import BusMetrics
from cachebus.replica import Replica
from cachebus.watch import Watch

KEYS = [bytes([n]) * 32 for n in range(6)]


@pytest.fixture
def client(bus: Bus) -> Iterator[BusClient]:
    bus.register("one", "decode", "http://one")
    client = bus.client()
    yield client
    client.close()


def test_an_account_is_opened_filled_and_heard_of(bus: Bus, client: BusClient) -> None:
    mine = bus.holder.id
    assert client.call(OpenHbm("one", mine), ANSWER_MS) == HbmOpened(NAMESPACE, 16, 256)
    client.call(ReportHbm("one", mine, KEYS[:2], []), ANSWER_MS)
    heard: list[object] = []

    async def follow() -> None:
        watch = Watch(bus.run_dir, heard.append)
        await watch.start(5)
        replica = watch.replica
        assert replica.hbm_prefix("one", KEYS) == 2, "a snapshot has it"
        assert replica.hbm_prefix("nobody", KEYS) == 0
        await asyncio.to_thread(client.call, ReportHbm("one", mine, KEYS[2:4], KEYS[1:2]), ANSWER_MS)
        await until(lambda: replica.hbm_prefix("one", KEYS[2:]) == 2)
        assert replica.hbm_prefixes(KEYS) == {"one": 1}
        await asyncio.to_thread(client.call, OpenHbm("one", mine), ANSWER_MS)
        await until(lambda: replica.hbm_prefixes(KEYS) == {"one": 0})
        await asyncio.to_thread(client.call, ReportHbm("one", mine, KEYS, []), ANSWER_MS)
        await until(lambda: replica.hbm_prefix("one", KEYS) == len(KEYS))
        await asyncio.to_thread(client.call, Leave("one"), ANSWER_MS)
        await until(lambda: replica.hbm_prefixes(KEYS) == {})
        await watch.close()

    asyncio.run(follow())
    assert HbmChanged("one", KEYS[2:4], KEYS[1:2]) in heard
    assert HbmChanged("one", [], [], whole=True) in heard


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def test_only_the_workers_own_supervisor_may_speak(bus: Bus, client: BusClient, tmp_path: Path) -> None:
    mine = bus.holder.id
    stranger = Holder(bus.run_dir)
    for request in (OpenHbm("one", stranger.id), ReportHbm("one", stranger.id, KEYS, [])):
        with pytest.raises(Refused, match="only the supervisor of one"):
            client.call(request, ANSWER_MS)
    for request in (OpenHbm("two", mine), ReportHbm("two", mine, KEYS, [])):
        with pytest.raises(Refused, match="no worker is called two"):
            client.call(request, ANSWER_MS)
    with pytest.raises(Refused, match="no open account"):
        client.call(ReportHbm("one", mine, KEYS, []), ANSWER_MS)
    assert "hbm_chunks_one" not in bus.daemon.statistics()
    stranger.close()


def test_a_report_that_can_not_be_one_changes_nothing(bus: Bus, client: BusClient, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = bus.holder.id
    client.call(OpenHbm("one", mine), ANSWER_MS)
    client.call(ReportHbm("one", mine, KEYS[:1], []), ANSWER_MS)
    too_many = [number.to_bytes(32, "big") for number in range(2 * HBM_KEYS_MAX + 1)]
    for stored in ([b"short"], too_many):
        with pytest.raises(Refused, match="keys of 32 bytes"):
            client.call(ReportHbm("one", mine, stored, []), ANSWER_MS)
    monkeypatch.setattr(hbm, "CHUNKS_MAX", 3)
    with pytest.raises(Refused, match="more than 3"):
        client.call(ReportHbm("one", mine, KEYS[1:4], []), ANSWER_MS)
    client.call(ReportHbm("one", mine, [*KEYS[1:4], KEYS[1]], KEYS[:1]), ANSWER_MS)
    assert bus.daemon.statistics()["hbm_chunks_one"] == 3


def test_a_worker_that_dies_takes_its_account_along(bus: Bus, client: BusClient) -> None:
    mine = bus.holder.id
    client.call(OpenHbm("one", mine), ANSWER_MS)
    client.call(ReportHbm("one", mine, KEYS, [], gaps=2), ANSWER_MS)
    statistics = bus.daemon.statistics()
    assert (statistics["hbm_chunks_one"], statistics["hbm_gaps_total"]) == (6, 2)
    metrics = BusMetrics()
    metrics.values = statistics
    samples = {
        (s.name, s.labels.get("worker")): s.value for family in metrics.collect() for s in family.samples if s.name.startswith("headstart_hbm")
    }
    assert samples == {("headstart_hbm_chunks", "one"): 6, ("headstart_hbm_gaps_total", None): 2}
    bus.holder.close()
    wait_for(lambda: "hbm_chunks_one" not in bus.daemon.statistics(), 3)
    bus.holder = Holder(bus.run_dir)


def test_a_supervisor_that_says_nothing_knows_nothing(bus: Bus, client: BusClient, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = bus.holder.id
    client.call(OpenHbm("one", mine), ANSWER_MS)
    client.call(ReportHbm("one", mine, KEYS, []), ANSWER_MS)
    monkeypatch.setattr(hbm, "SILENCE_MS_MAX", 300)
    wait_for(lambda: "hbm_chunks_one" not in bus.daemon.statistics(), 3)
    with pytest.raises(Refused, match="no open account"):
        client.call(ReportHbm("one", mine, KEYS, []), ANSWER_MS)


def test_a_report_keeps_an_account_open() -> None:
    accounts = HbmAccounts()
    accounts.open("one", 0)
    accounts.report(ReportHbm("one", "holder", KEYS, []), 4000)
    assert accounts.end_silent(8000) == []
    assert accounts.report(ReportHbm("one", "holder", [], []), 8000) == [], "routers need not hear that nothing changed"
    assert accounts.end_silent(13000) == []
    assert len(accounts.end_silent(13001)) == 1
    with pytest.raises(BusError, match="no open account"):
        accounts.report(ReportHbm("one", "holder", [], []), 13002)


def test_a_replica_that_misses_a_change_asks_for_a_snapshot() -> None:
    replica = Replica()
    replica.load(SnapshotReply(1, 0, {}, [], {"one": KEYS[:2]}))
    assert not replica.apply(EventBatch(2, 1, 2, [HbmChanged("one", [], KEYS[:1])]))
    replica.load(SnapshotReply(1, 2, {}, [], {"one": KEYS[1:2], "two": []}))
    assert replica.hbm_prefixes(KEYS[1:]) == {"one": 1, "two": 0}
