"""What a router's bus says of workers on other nodes: as a state machine, and with nodes that come and go."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from peer_nodes import Nodes, free_ports
from tests_shared import ANSWER_MS, DIGEST_KEY, Bus, wait_for

from cachebus.codec import decode_events
from cachebus.effects import Publish
from cachebus.elsewhere import Elsewhere
from cachebus.lanes import Memory
from cachebus.messages import Drain, Leave, Report, Snapshot, SnapshotReply, Worker, WorkerDown, WorkerUp
from cachebus.messages_hbm import HbmChanged, OpenHbm, ReportHbm
from cachebus.messages_peers import Missed
from cachebus.messages_tools import Clear, Cleared
from cachebus.peer_places import PeerPlaces
from cachebus.peers import PeerLane
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.zeromq_peers import PeerAddress

KEYS = [bytes([number]) * 32 for number in range(3)]


def worker(name: str = "w", url: str = "http://10.0.0.1:8001") -> Worker:
    return Worker(name, "decode", url, "m", b"n" * 32, 16, 256, 8192, True)


def test_what_a_node_says_is_kept_and_said_on() -> None:
    elsewhere = Elsewhere()
    (up,) = elsewhere.learn("a", WorkerUp(worker()), {})
    assert isinstance(up, Publish)
    assert isinstance(up.event, WorkerUp)
    assert up.event.worker.node == "a"
    elsewhere.learn("a", HbmChanged("w", KEYS, []), {})
    elsewhere.learn("a", HbmChanged("w", [], KEYS[:1]), {})
    assert [w.worker for w in elsewhere.workers()] == ["w"]
    assert {name: set(keys) for name, keys in elsewhere.hbm().items()} == {"w": set(KEYS[1:])}
    elsewhere.learn("a", HbmChanged("w", KEYS[:1], [], whole=True), {})
    assert elsewhere.hbm() == {"w": KEYS[:1]}
    assert elsewhere.learn("a", WorkerDown("w"), {}) == [Publish(WorkerDown("w"))]
    assert (elsewhere.workers(), elsewhere.hbm()) == ([], {})


def test_nobody_speaks_for_another_nodes_worker() -> None:
    elsewhere = Elsewhere()
    elsewhere.learn("a", WorkerUp(worker()), {})
    for event in (WorkerUp(worker(url="http://evil:1")), WorkerDown("w"), HbmChanged("w", KEYS, []), HbmChanged("unknown", KEYS, [])):
        assert elsewhere.learn("b", event, {}) == []
    assert elsewhere.workers()[0].url == "http://10.0.0.1:8001"
    assert elsewhere.learn("a", WorkerUp(worker("mine")), {"mine"}) == []


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[Bus, list[Bus]]]:
    """A router's bus, which has no workers of its own, and those of two nodes that it is told of by name."""
    nodes = Nodes(tmp_path, 2, keys=True)
    run_dir = tmp_path / "router"
    run_dir.mkdir()
    cache = CacheSettings(peers=[f"{number}@127.0.0.1:{nodes.ports[number]}" for number in range(2)], peer_workers=True)
    bus = Bus(run_dir, cache, SecuritySettings(keys_dir=str(nodes.keys / "later")))
    yield bus, nodes.buses
    bus.stop()
    nodes.stop()


def names(bus: Bus) -> set[str]:
    return {w.worker for w in bus.snapshot().workers}


def test_a_router_hears_of_workers_on_other_nodes(apart: tuple[Bus, list[Bus]]) -> None:
    front, (one, two) = apart
    one.register("p1", "prefill", "http://10.0.0.1:8001")
    two.register("d1", "decode", "http://10.0.0.2:8001")
    wait_for(lambda: names(front) == {"p1", "d1"})
    client = two.client(two.holder)
    client.connect(ANSWER_MS)
    client.call(OpenHbm("d1", two.holder.id), ANSWER_MS)
    client.call(ReportHbm("d1", two.holder.id, KEYS, []), ANSWER_MS)
    wait_for(lambda: set(front.snapshot().hbm.get("d1", [])) == set(KEYS))
    client.call(Drain("d1"), ANSWER_MS)
    wait_for(lambda: [w.draining for w in front.snapshot().workers if w.worker == "d1"] == [True])
    client.call(Leave("d1"), ANSWER_MS)
    wait_for(lambda: names(front) == {"p1"})
    client.close()


def test_reports_reach_a_router_elsewhere(apart: tuple[Bus, list[Bus]]) -> None:
    front, (one, _) = apart
    one.register("p1", "prefill", "http://10.0.0.1:8001")
    wait_for(lambda: names(front) == {"p1"})
    before = front.snapshot()
    client = one.client(one.holder)
    client.connect(ANSWER_MS)
    client.submit(Report("one-transfer", "decode", "p1", 5, 0, {}))
    asking = front.client()

    def report_came() -> bool:
        reply = asking.call(Snapshot(before.epoch, before.seq), ANSWER_MS)
        return b"one-transfer" in b"".join(reply.batches if isinstance(reply, Missed) else [])

    wait_for(report_came)
    asking.close()
    client.close()


def test_workers_of_a_node_that_dies_are_gone_and_come_back(apart: tuple[Bus, list[Bus]]) -> None:
    front, (one, two) = apart
    one.register("p1", "prefill", "http://10.0.0.1:8001")
    two.register("d1", "decode", "http://10.0.0.2:8001")
    wait_for(lambda: names(front) == {"p1", "d1"})
    one.stop()
    wait_for(lambda: names(front) == {"d1"}, 5)
    one.start()
    one.register("p1", "prefill", "http://10.0.0.1:8001")
    wait_for(lambda: names(front) == {"p1", "d1"}, 5)


def test_a_node_that_starts_over_in_no_time_has_none_of_before(apart: tuple[Bus, list[Bus]]) -> None:
    front, (one, two) = apart
    one.register("p1", "prefill", "http://10.0.0.1:8001")
    two.register("d1", "decode", "http://10.0.0.2:8001")
    wait_for(lambda: names(front) == {"p1", "d1"})
    one.stop()
    one.start()
    wait_for(lambda: names(front) == {"d1"}, 5)


def cleared(bus: Bus, before: SnapshotReply) -> list[Cleared]:
    """Whose cache the bus has said was cleared since then."""
    client = bus.client()
    reply = client.call(Snapshot(before.epoch, before.seq), ANSWER_MS)
    client.close()
    assert isinstance(reply, Missed)
    return [event for batch in reply.batches for event in decode_events(batch).events if isinstance(event, Cleared)]


def test_what_is_said_on_is_not_said_on_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two routers' buses that follow a node and each other: neither what a snapshot brings nor what events do."""
    nodes = Nodes(tmp_path, 1, keys=False)
    node, ports = nodes.buses[0], [free_ports(), free_ports()]

    def front(number: int) -> Bus:
        run_dir = tmp_path / f"front{number}"
        run_dir.mkdir()
        peers = [f"127.0.0.1:{nodes.ports[0]}", f"127.0.0.1:{ports[1 - number]}"]
        return Bus(run_dir, CacheSettings(node_port=ports[number], peers=peers, peer_workers=True))

    node.register("d1", "decode", "http://10.0.0.2:8001")
    fronts = [front(0)]
    wait_for(lambda: names(fronts[0]) == {"d1"})
    fronts.append(front(1))
    wait_for(lambda: names(fronts[1]) == {"d1"} and all(bus.daemon.statistics()["peers"] == 2 for bus in fronts))
    client = node.client(node.holder)
    client.connect(ANSWER_MS)
    before = [bus.snapshot() for bus in fronts]
    client.call(Clear(["dram"], b"tenant 1"), ANSWER_MS)
    client.call(Drain("d1"), ANSWER_MS)
    client.close()
    wait_for(lambda: all([w.draining for w in bus.snapshot().workers] == [True] for bus in fronts))
    for bus, known in zip(fronts, before, strict=True):
        assert cleared(bus, known) == [Cleared(b"tenant 1", f"127.0.0.1:{nodes.ports[0]}")]
    nodes.stop()
    wait_for(lambda: all(names(bus) == set() for bus in fronts), 5)
    assert "is called d1" not in caplog.text
    for bus in fronts:
        bus.stop()


def test_buses_of_workers_do_not_say_on_what_they_hear(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 2, keys=False)
    nodes.in_touch()
    nodes.buses[0].register("p1", "prefill", "http://10.0.0.1:8001")
    nodes.buses[0].store(KEYS[0])
    wait_for(lambda: nodes.buses[1].snapshot().keys["peer"] == [KEYS[0]])
    assert names(nodes.buses[1]) == set()
    nodes.stop()


def test_one_name_stands_for_all_nodes(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 1, keys=True)
    run_dir = tmp_path / "router"
    run_dir.mkdir()
    nodes.buses[0].register("d1", "decode", "http://10.0.0.2:8001")
    cache = CacheSettings(peers_dns=f"0@localhost:{nodes.ports[0]}", peer_workers=True)
    front = Bus(run_dir, cache, SecuritySettings(keys_dir=str(nodes.keys / "later")))
    wait_for(lambda: names(front) == {"d1"})
    assert [w.node for w in front.snapshot().workers] == [f"127.0.0.1:{nodes.ports[0]}"]
    front.stop()
    nodes.stop()


def test_a_nodes_own_address_is_no_peer() -> None:
    cache = CacheSettings(peers_dns="localhost:7000", node_port=7000)
    assert "127.0.0.1:7000" not in PeerPlaces(cache, SecuritySettings()).look()
    other = CacheSettings(peers_dns="localhost:7001", node_port=7000)
    assert "127.0.0.1:7001" in PeerPlaces(other, SecuritySettings()).look()


def test_a_name_that_is_not_resolved_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    places = PeerPlaces(CacheSettings(peers_dns="localhost:7001"), SecuritySettings())
    found = places.look()

    def failing(*_: object, **__: object) -> None:
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", failing)
    assert places.look() == found != {}


class Changing(PeerPlaces):
    """Nodes that come and go while they are looked for."""

    def __init__(self) -> None:
        super().__init__(CacheSettings(), SecuritySettings())
        self.now: dict[str, PeerAddress] = {}

    def look(self) -> dict[str, PeerAddress]:
        return dict(self.now)


def test_nodes_that_come_are_followed_and_those_that_go_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachebus.peers.LOOK_SECONDS", 0.05)
    run_dir = tmp_path / "node"
    run_dir.mkdir()
    port = free_ports()
    bus = Bus(run_dir, CacheSettings(node_port=port))
    bus.register("d1", "decode", "http://10.0.0.2:8001")
    places = Changing()
    lane = PeerLane(places, Memory(memoryview(bytearray(4096)), DIGEST_KEY), b"", 200, 1, lambda: None, tells_workers=True)
    heard: list[object] = []

    def take() -> list[object]:
        heard.extend(event for _, event in lane.news())
        return heard

    places.now = {"it": PeerAddress("127.0.0.1", port)}
    wait_for(lambda: any(isinstance(event, WorkerUp) for event in take()))
    places.now = {}
    wait_for(lambda: WorkerDown("d1") in take())
    held = list(lane.held())
    assert held[-1].gone
    lane.close(5)
    bus.stop()


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        (CacheSettings(peers_dns="nodes.example:70000000"), "is no address"),
        (CacheSettings(peer_workers=True), "there are no other nodes"),
    ],
)
def test_what_can_not_be_followed_is_refused(cache: CacheSettings, said: str) -> None:
    assert any(said in text for _, text in cache.problems())
