"""The daemon over real ZeroMQ sockets, locks and shared memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from tests_shared import ANSWER_MS, LAYOUT, Bus, wait_for

from cachebus import zeromq
from cachebus.errors import BusError, BusUnavailable, Refused
from cachebus.holder import Holder, is_alive
from cachebus.keeper import Keeper
from cachebus.messages import Acquire, Granted, Hello, NewEntry, Ping, Pong, Reattach, Report, Reserve, Stat, StatReply, Stored, WorkerDown, WorkerUp
from cachebus.role import run
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.watch import Watch

KEYS = [bytes([n]) * 32 for n in range(4)]


def values(bus: Bus) -> dict[str, float]:
    client = bus.client()
    reply = client.call(Stat(), ANSWER_MS)
    client.close()
    assert isinstance(reply, StatReply)
    return reply.values


def test_a_dead_process_loses_its_leases_and_reservations(bus: Bus) -> None:
    bus.store(KEYS[0])
    code = f"""
import sys, time
from pathlib import Path
from cachebus.client import BusClient
from cachebus.holder import Holder
from cachebus.messages import *
run_dir = Path({str(bus.run_dir)!r})
holder = Holder(run_dir)
client = BusClient(run_dir, "victim", holder)
client.connect(3000)
client.call(Acquire(holder.id, {LAYOUT!r}, [{KEYS[0]!r}], 0), 3000)
client.call(Reserve(holder.id, {LAYOUT!r}, [NewEntry({KEYS[1]!r}, 4096)]), 3000)
print("ready", flush=True)
time.sleep(60)
"""
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    assert values(bus)["leases"] == 1
    assert values(bus)["writing"] == 1
    victim.kill()
    victim.wait()
    wait_for(lambda: values(bus)["leases"] == 0 and values(bus)["writing"] == 0, seconds=3)


def test_what_the_dead_have_sent_is_refused(bus: Bus) -> None:
    """A message may wait in a socket until its sender's end was noticed: nobody would ever end what it took."""
    bus.store(KEYS[0])
    holder, client = Holder(bus.run_dir), bus.client()
    client.call(Hello("dying", holder.id), ANSWER_MS)
    before = values(bus)["holders"]
    holder.close()
    wait_for(lambda: values(bus)["holders"] == before - 1, seconds=3)
    for request in (Acquire(holder.id, LAYOUT, [KEYS[0]], 0), Reserve(holder.id, LAYOUT, [NewEntry(KEYS[1], 4096)])):
        with pytest.raises(Refused, match="has no lock"):
            client.call(request, ANSWER_MS)
    client.close()
    assert values(bus)["leases"] == 0
    assert values(bus)["writing"] == 0


def test_noise_is_counted_and_dropped(bus: Bus) -> None:
    requester = zeromq.Requester(f"ipc://{bus.run_dir / zeromq.REQUESTS}")
    for noise in (b"", b"\xc1", b"\x93\x01", b"x" * 10_000):
        assert requester.send(noise)
    wait_for(lambda: values(bus).get("messages_malformed_total") == 4)
    requester.close()


def test_a_holder_without_a_lock_is_refused(bus: Bus) -> None:
    client = bus.client()
    with pytest.raises(Refused, match="no lock"):
        client.call(Hello("liar", "0" * 32), ANSWER_MS)
    with pytest.raises(Refused, match="holder"):
        client.call(Hello("liar", "../escape"), ANSWER_MS)
    client.close()


def test_workers_that_disagree_are_refused_with_the_difference(bus: Bus) -> None:
    bus.register("one", "decode", "http://one")
    with pytest.raises(Refused, match=r"weights is other here and w there"):
        bus.register_engine("two", "decode", weights="other")
    bus.register_engine("three", "decode", model="another model", **{"KV dtype": "fp8"})


def test_an_answer_that_does_not_come_names_the_place(tmp_path: Path) -> None:
    from cachebus.client import BusClient

    client = BusClient(tmp_path, "lonely")
    with pytest.raises(BusUnavailable, match=str(tmp_path)):
        client.connect(50)
    client.close()


def test_a_second_daemon_is_refused(bus: Bus) -> None:
    other = subprocess.Popen([sys.executable, "-m", "deploy", "cachebus", "--set", f"cache.run_dir={bus.run_dir}x"], stderr=subprocess.PIPE)
    try:
        lock = Path(f"{bus.run_dir}x") / "daemon.lock"
        wait_for(lambda: lock.exists() and (lock.parent / zeromq.REQUESTS).exists(), 30)
        with pytest.raises(BusError, match="already runs"):
            run(CacheSettings(run_dir=f"{bus.run_dir}x"), SecuritySettings())
    finally:
        other.terminate()
        assert other.wait(10) == 0
    assert not CacheSettings(run_dir=f"{bus.run_dir}x").resolved_region_path({}).exists(), "a daemon that ends takes its region along"


def test_a_restarted_daemon_is_noticed_and_told(bus: Bus) -> None:
    bus.store(*KEYS[:2])
    holder = Holder(bus.run_dir)
    client = bus.client(holder)
    welcome = client.connect(ANSWER_MS)
    granted = client.call(Acquire(holder.id, LAYOUT, KEYS[:2], 0), ANSWER_MS)
    assert isinstance(granted, Granted)
    reading = {granted.lease: [extent.offset for extent in granted.extents]}
    keeper = Keeper(bus.run_dir, "test", holder, lambda: Reattach(holder.id, reading, []), welcome.epoch)
    keeper.start()
    bus.stop()
    bus.start()
    assert values(bus)["unattached_holders"] == 2
    wait_for(lambda: values(bus)["leases"] == 1)
    pong = client.call(Ping(holder.id), ANSWER_MS)
    assert isinstance(pong, Pong)
    assert pong.epoch != welcome.epoch
    assert pong.attached
    keeper.stop()
    client.close()
    holder.close()
    wait_for(lambda: values(bus)["leases"] == 0)
    assert not is_alive(bus.run_dir, holder.id)


def test_a_watch_sees_snapshot_events_gaps_and_restarts(bus: Bus) -> None:
    bus.store(KEYS[0])
    bus.register("one", "decode", "http://one")
    heard: list[object] = []

    async def follow() -> None:
        watch = Watch(bus.run_dir, heard.append)
        await watch.start(5)
        assert watch.connected
        assert watch.replica.known_prefix(KEYS) == 1
        assert list(watch.replica.workers) == ["one"]
        await asyncio.to_thread(bus.store, KEYS[1])
        await until(lambda: watch.replica.has(KEYS[1]))
        client = bus.client()
        client.submit(Report("id", "decode", "one", 10, 1, {"dram": 2}))
        await until(lambda: any(isinstance(event, Report) for event in heard))
        # An event that is lost shows as a gap with the next heartbeat: first one that the daemon still knows, then one that it does not.
        for missed_from in (0, -5):
            watch.replica._seq = missed_from
            watch.replica._keys.clear()
            await until(lambda: watch.replica.known_prefix(KEYS) == 2)
        await asyncio.to_thread(bus.stop)
        await asyncio.to_thread(bus.start)
        # The new daemon knows no worker yet; requests go on to those that there were, for as long as they may take to tell it of themselves.
        await until(lambda: watch.replica.unconfirmed == {"one"})
        assert list(watch.replica.workers) == ["one"]
        assert watch.replica.known_prefix(KEYS) == 2
        await asyncio.to_thread(bus.register, "two", "decode", "http://two")
        await until(lambda: list(watch.replica.workers) == ["one", "two"])
        assert watch.replica.unconfirmed == {"one"}
        await until(lambda: list(watch.replica.workers) == ["two"])
        client.close()
        await watch.close()

    asyncio.run(follow())
    assert Stored([KEYS[0]]) in heard
    assert any(isinstance(event, WorkerUp) for event in heard)
    assert [event.worker for event in heard if isinstance(event, WorkerDown)] == ["one"]


async def until(condition: object) -> None:
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


def test_a_silent_daemon_is_seen(bus: Bus) -> None:
    async def follow() -> None:
        watch = Watch(bus.run_dir)
        await watch.start(5)
        watch._heard_at -= 10
        assert not watch.connected
        await until(lambda: watch.connected)
        await watch.close()
        with pytest.raises(BusUnavailable):
            await Watch(bus.run_dir / "nowhere").start(0.2)

    asyncio.run(follow())


def test_reservations_do_not_outgrow_the_region(bus: Bus) -> None:
    client = bus.client()
    client.call(Reserve(bus.holder.id, LAYOUT, [NewEntry(bytes([n]) * 32, 1 << 20) for n in range(20)]), ANSWER_MS)
    found = values(bus)
    assert found["dram_bytes"] <= found["dram_capacity_bytes"]
    assert found["no_room_total"] > 0
    client.close()


def test_a_daemon_that_is_ended_while_it_makes_its_region_leaves_nothing_of_it(tmp_path: Path) -> None:
    region = Path("/dev/shm") / f"headstart-test-{tmp_path.parent.name}-{tmp_path.name}"
    settings = (f"cache.run_dir={tmp_path}", f"cache.region_path={region}", "cache.max_local_cpu_size=1")
    daemon = subprocess.Popen([sys.executable, "-m", "deploy", "cachebus", *(part for one in settings for part in ("--set", one))])
    made = region.with_suffix(".new")
    try:
        wait_for(lambda: made.exists() or region.exists(), 60)
        daemon.terminate()
        assert daemon.wait(60) == 0
        assert not made.exists()
        assert not region.exists()
    finally:
        daemon.kill()
        daemon.wait()
        made.unlink(missing_ok=True)
        region.unlink(missing_ok=True)
