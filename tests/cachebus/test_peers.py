"""Nodes that pull from each other over tcp, on loopback: with and without keys; strangers, revoked keys, changed bytes, dead nodes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from peer_nodes import Nodes, free_ports, get, put
from redis_server import RedisServer
from test_below import LENGTH, clear, content, key, settled
from tests_shared import LAYOUT, Bus, wait_for

from cachebus import security
from cachebus.codec import decode_reply, encode_request
from cachebus.errors import BusError, BusUnavailable
from cachebus.messages import Denied, Request, Snapshot, SnapshotReply, Stat, StatReply
from cachebus.messages_peers import Lend, Lent
from cachebus.messages_tools import Clear
from cachebus.peers import RENEW_SECONDS
from cachebus.security import Keyring
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.zeromq_peers import WINDOW, BytesReader, Pair, PeerAddress, PeerLink, Wanted, new_pair


@pytest.fixture(params=["keys", "plain bytes", "no keys"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path, 2, keys=request.param != "no keys", encrypt_bytes=request.param != "plain bytes")
    yield nodes
    nodes.stop()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path, 2, keys=True)
    yield nodes
    nodes.stop()


def truth(nodes: Nodes, number: int) -> set[bytes]:
    """What the other nodes hold themselves."""
    others = [bus for other, bus in enumerate(nodes.buses) if other != number]
    return {k for bus in others for tier, keys in bus.snapshot().keys.items() if tier in ("dram", "nvme") for k in keys}


def ask(address: PeerAddress, request: Request, timeout_ms: float = 1500) -> object:
    """The reply to a request from outside; None where none comes."""
    link = PeerLink(address, events=False)
    deadline = time.monotonic() + timeout_ms / 1000
    try:
        while not link.send(encode_request(1, request)):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        replies, _ = link.receive(max(1, 1000 * (deadline - time.monotonic())))
        return decode_reply(replies[0]).body if replies else None
    finally:
        link.close()


def address_of(nodes: Nodes, number: int, own: Path | None) -> PeerAddress:
    """How the owner of a key folder (None: somebody with a key of his own making) reaches a node."""
    server = Keyring(nodes.keys / str(number)).public
    ring = Keyring(own) if own else None
    pair = Pair(ring.public, ring.secret) if ring else Pair(*new_pair())
    return PeerAddress("127.0.0.1", nodes.ports[number], server, pair)


def test_a_chunk_of_another_node_is_a_hit(nodes: Nodes) -> None:
    one, two = nodes.buses
    nodes.in_touch()
    put(one, 1, 2)
    wait_for(lambda: set(two.snapshot().keys["peer"]) == {key(1), key(2)})
    assert get(two, 1, 2, 3) == [(content(1), "peer"), (content(2), "peer")]
    assert get(two, 1, 2) == [(content(1), "dram"), (content(2), "dram")]
    assert two.daemon.statistics()["peer_promoted_total"] == 2
    clear(two, "dram")
    wait_for(lambda: one.snapshot().keys["peer"] == [])


def test_what_lies_on_the_other_nodes_disk_comes_up_there_first(tmp_path: Path) -> None:
    disk = CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02)
    nodes = Nodes(tmp_path, 2, keys=True, caches=[disk, CacheSettings()])
    one, two = nodes.buses
    nodes.in_touch()
    put(one, 1)
    settled(one)
    clear(one, "dram")
    wait_for(lambda: key(1) in two.snapshot().keys["peer"])
    assert get(two, 1) == [(content(1), "peer")]
    assert one.daemon.statistics()["nvme_promoted_total"] == 1
    nodes.stop()


def test_what_a_third_node_has_is_not_passed_on(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 3, keys=False)
    nodes.in_touch()
    put(nodes.buses[0], 1)
    wait_for(lambda: all(key(1) in bus.snapshot().keys["peer"] for bus in nodes.buses[1:]))
    address = PeerAddress("127.0.0.1", nodes.ports[1])
    assert ask(address, Lend(LAYOUT, [key(1)], 50)) == Lent(0, b"", [])
    nodes.stop()


@pytest.mark.parametrize("who", ["a stranger", "no key", "revoked"])
def test_who_is_not_allowed_is_not_answered(pair: Nodes, who: str) -> None:
    address = address_of(pair, 0, None if who == "a stranger" else pair.keys / "1")
    if who == "no key":
        address = PeerAddress("127.0.0.1", pair.ports[0])
    if who == "revoked":
        assert isinstance(ask(address, Snapshot()), SnapshotReply)
        security.revoke(pair.keys, "1")
        wait_for(lambda: not isinstance(ask(address, Snapshot(), 500), SnapshotReply), 10)
    assert ask(address, Snapshot()) is None


def test_who_is_allowed_later_is_in_touch_without_a_restart(pair: Nodes) -> None:
    """ZeroMQ gives up a connection that was refused for its key."""
    pair.in_touch()
    known = pair.keys / "0" / "allowed" / "node" / "1.public"
    public = known.read_bytes()
    known.unlink()
    wait_for(lambda: ask(address_of(pair, 0, pair.keys / "1"), Snapshot(), 300) is None, 10)
    pair.buses[1].stop()
    pair.buses[1].start()
    time.sleep(1)
    assert pair.buses[1].daemon.statistics()["peers"] == 0
    known.write_bytes(public)
    known.chmod(0o600)
    wait_for(lambda: pair.buses[1].daemon.statistics()["peers"] == 1, RENEW_SECONDS + 8)
    put(pair.buses[0], 1)
    wait_for(lambda: key(1) in pair.buses[1].snapshot().keys["peer"])
    # The lane's threads were refused, too, each of which finds that out by itself.
    wait_for(lambda: get(pair.buses[1], 1) == [(content(1), "peer")], 20)


def test_a_stranger_would_be_answered_if_only_curve_stood_in_the_way(pair: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the one above."""
    monkeypatch.setattr(Keyring, "member", lambda ring, public: security.Member("x", "node", public))
    assert isinstance(ask(address_of(pair, 0, None), Snapshot()), SnapshotReply)


def test_a_router_may_look_and_not_borrow(pair: Nodes) -> None:
    security.add(pair.keys, "front", "router", new_pair)
    address = address_of(pair, 0, pair.keys / "front")
    wait_for(lambda: isinstance(ask(address, Stat()), StatReply), 10)
    assert isinstance(ask(address, Lend(LAYOUT, [key(1)], 0)), Denied)
    other = address_of(pair, 0, pair.keys / "1")
    assert isinstance(ask(other, Clear(["dram"])), Denied)
    assert isinstance(ask(other, Stat()), Denied)
    with pytest.raises(BusUnavailable):
        list(BytesReader(address).read([Wanted(1, bytes(16), 0, memoryview(bytearray(10)))], 500))


@pytest.mark.parametrize("keys", [True, False])
def test_bytes_need_a_token_that_fits(tmp_path: Path, keys: bool) -> None:
    nodes = Nodes(tmp_path, 2, keys=keys, encrypt_bytes=False)
    put(nodes.buses[0], 1)
    address = address_of(nodes, 0, nodes.keys / "1") if keys else PeerAddress("127.0.0.1", nodes.ports[0])
    lent = ask(address, Lend(LAYOUT, [key(1)], 50))
    assert isinstance(lent, Lent)
    (chunk,) = lent.chunks
    reader = BytesReader(PeerAddress("127.0.0.1", nodes.ports[0]))
    into = memoryview(bytearray(LENGTH))
    assert list(reader.read([Wanted(lent.lease, lent.token, chunk.offset, into)], 1000)) == [True]
    assert bytes(into) == content(1)
    lease, token, offset = lent.lease, lent.token, chunk.offset
    for wrong in ((lease, bytes(16), offset), (lease + 1, token, offset), (lease, token, offset + 1)):
        into[:] = bytes(LENGTH)
        assert list(reader.read([Wanted(*wrong, into)], 1000)) == [False]
        assert bytes(into) == bytes(LENGTH)
    reader.close()
    nodes.stop()


def test_the_next_chunk_is_asked_for_while_one_comes_and_each_is_told_of_when_it_is_there(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path, 2, keys=False)
    numbers = range(1, 3 * WINDOW)
    put(nodes.buses[0], *numbers)
    address = PeerAddress("127.0.0.1", nodes.ports[0])
    lent = ask(address, Lend(LAYOUT, [key(number) for number in numbers], 50))
    assert isinstance(lent, Lent)
    reader, begun = BytesReader(address), []
    places = {number: memoryview(bytearray(LENGTH)) for number in numbers}
    refused = 5

    def wanted() -> Iterator[Wanted]:
        for number, chunk in zip(numbers, lent.chunks, strict=True):
            begun.append(number)
            yield Wanted(lent.lease, bytes(16) if number == refused else lent.token, chunk.offset, places[number])

    for number, allowed in zip(numbers, reader.read(wanted(), 1000), strict=True):
        assert allowed is (number != refused)
        assert bytes(places[number]) == (content(number) if allowed else bytes(LENGTH))
        assert begun[-1] == min(number + WINDOW - 1, numbers[-1]), "no further ahead than a window"
    reader.close()
    nodes.stop()


def test_garbage_and_oversize_do_no_harm(pair: Nodes) -> None:
    address = address_of(pair, 0, pair.keys / "1")
    for frame in (b"", b"garbage", bytes(2 << 20)):
        link = PeerLink(address, events=False)
        wait_for(lambda link=link, frame=frame: link.send(frame))  # type: ignore[misc]
        link.receive(100)
        link.close()
    for port in range(pair.ports[0], pair.ports[0] + 3):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    assert isinstance(ask(address, Snapshot()), SnapshotReply)


class Relay:
    """Passes a port on and keeps what went through."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._to = port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listening.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        while data := one.recv(65536):
            self.seen += data
            other.sendall(data)

    def close(self) -> None:
        self._listening.close()


@pytest.mark.parametrize("encrypted", [True, False])
def test_what_is_encrypted_can_not_be_read_on_the_way(tmp_path: Path, encrypted: bool) -> None:
    nodes = Nodes(tmp_path, 2, keys=True, encrypt_bytes=encrypted)
    put(nodes.buses[0], 1)
    lent = ask(address_of(nodes, 0, nodes.keys / "1"), Lend(LAYOUT, [key(1)], 50))
    assert isinstance(lent, Lent)
    relay = Relay(nodes.ports[0] + 2)
    address = address_of(nodes, 0, nodes.keys / "1")
    through = PeerAddress("127.0.0.1", relay.port - 2, address.server, address.pair, encrypted)
    reader = BytesReader(through)
    into = memoryview(bytearray(LENGTH))
    assert list(reader.read([Wanted(lent.lease, lent.token, lent.chunks[0].offset, into)], 2000)) == [True]
    assert bytes(into) == content(1)
    assert (content(1)[1000:1064] in relay.seen) is not encrypted
    reader.close()
    relay.close()
    nodes.stop()


def test_changed_bytes_are_a_miss_and_never_asked_for_again(pair: Nodes) -> None:
    one, two = pair.buses
    pair.in_touch()
    put(one, 1, 2)
    wait_for(lambda: len(two.snapshot().keys["peer"]) == 2)
    offset = one.daemon._directory.dram.index[key(2)].offset
    one.daemon._region.data[offset + 5] ^= 1
    assert get(two, 1, 2) == [(content(1), "peer")]
    found = two.daemon.statistics()
    assert (found["peer_integrity_failures_total"], found["peer_missed_total"]) == (1, 1)
    assert two.snapshot().keys["peer"] == [key(1)]


def test_a_node_that_dies_is_a_miss_and_comes_back(pair: Nodes) -> None:
    one, two = pair.buses
    pair.in_touch()
    put(one, 1)
    wait_for(lambda: len(two.snapshot().keys["peer"]) == 1)
    one.stop()
    started = time.monotonic()
    assert get(two, 1) == []
    assert time.monotonic() - started < 1
    wait_for(lambda: two.daemon.statistics()["peers"] == 0, 3.5)
    assert two.snapshot().keys["peer"] == []
    one.start()
    pair.in_touch(1)
    put(one, 2)
    wait_for(lambda: set(two.snapshot().keys["peer"]) == truth(pair, 1) != set(), 5)
    assert get(two, 2) == [(content(2), "peer")]


def test_a_node_with_another_digest_key_is_no_peer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = Nodes(tmp_path, 2, keys=False)
    nodes.buses[0].stop()
    nodes.buses[0].digest_key = b"x" * 32
    nodes.buses[0].start()
    wait_for(lambda: "another digest key" in caplog.text, 30)
    assert nodes.buses[1].daemon.statistics()["peers"] == 0
    nodes.stop()


def test_a_near_node_is_asked_before_the_shared_tier(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    nodes = Nodes(tmp_path, 2, keys=False, caches=[CacheSettings(remote_url=server.url)] * 2)
    one, two = nodes.buses
    nodes.in_touch()
    wait_for(lambda: all(bus.daemon.statistics()["redis_usable"] for bus in nodes.buses))
    put(one, 1, 2)
    settled(one)
    wait_for(lambda: len(two.snapshot().keys["peer"]) == 2)
    assert get(two, 1, 2) == [(content(1), "peer"), (content(2), "peer")]
    put(one, 3)
    settled(one)
    clear(one, "dram")
    assert get(two, 3) == [(content(3), "redis")]
    nodes.stop()
    server.stop()


@pytest.mark.parametrize(
    ("cache", "keys", "said"),
    [
        (CacheSettings(node_host="0.0.0.0", node_port=1), False, "there are no keys"),
        (CacheSettings(peers=["10.0.0.1:7000"]), False, "needs keys"),
        (CacheSettings(peers=["127.0.0.1:7000"]), True, "say whose key"),
        (CacheSettings(peers=["nobody@127.0.0.1:7000"]), True, "no key of 'nobody'"),
    ],
)
def test_what_is_open_to_strangers_is_refused_at_start(tmp_path: Path, cache: CacheSettings, keys: bool, said: str) -> None:
    secured = SecuritySettings()
    if keys:
        security.begin(tmp_path / "keys")
        secured = SecuritySettings(keys_dir=str(security.add(tmp_path / "keys", "own", "node", new_pair)))
    with pytest.raises(BusError, match=said):
        Bus(tmp_path, cache, secured)


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    port = free_ports()
    with socket.create_server(("127.0.0.1", port + 1)), pytest.raises(BusError, match=str(port + 1)):
        Bus(tmp_path, CacheSettings(node_port=port))
