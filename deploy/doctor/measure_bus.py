"""What the node's running cachebus and its peers tell."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from cachebus.client import BusClient
from cachebus.codec import decode_reply, encode_request
from cachebus.errors import BusError, BusUnavailable
from cachebus.messages import Denied, Ping, Pong, Reply, Request, Snapshot, SnapshotReply, Stat, StatReply
from cachebus.zeromq_peers import PeerAddress, PeerLink
from deploy.doctor.facts import BusFacts, PeerFacts

_ANSWER_MS_MAX = 2000
_PINGS = 11
_TIERS = ("dram", "nvme")


def bus(run_dir: Path) -> BusFacts | None:
    """What the cachebus of ``run_dir`` tells; None where none runs."""
    client = BusClient(run_dir, "doctor")
    try:
        pong = client.call(Ping(), _ANSWER_MS_MAX)
        snapshot, stat = client.call(Snapshot(), _ANSWER_MS_MAX), client.call(Stat(), _ANSWER_MS_MAX)
    except BusUnavailable:
        return None
    finally:
        client.close()
    assert isinstance(pong, Pong)
    assert isinstance(snapshot, SnapshotReply)
    assert isinstance(stat, StatReply)
    capacities = {tier: stat.values[name] for tier in _TIERS if (name := f"{tier}_capacity_bytes") in stat.values}
    return BusFacts({worker.worker: worker for worker in snapshot.workers}, capacities, pong.key_id)


def peers(addresses: Mapping[str, PeerAddress]) -> list[PeerFacts]:
    """What each peer tells."""
    found = []
    for name, address in addresses.items():
        link = PeerLink(address, events=False)
        try:
            found.append(_peer(name, link))
        except BusError as error:
            found.append(PeerFacts(name, error=f"{address.host}:{address.port}: {error}"))
        finally:
            link.close()
    return found


def _peer(name: str, link: PeerLink) -> PeerFacts:
    seconds = []
    # The first one also waits for the connection.
    pong = _asked(link, Ping(), 1)
    for ticket in range(2, 2 + _PINGS):
        started = time.perf_counter()
        pong = _asked(link, Ping(), ticket)
        seconds.append(time.perf_counter() - started)
    snapshot = _asked(link, Snapshot(), 2 + _PINGS)
    assert isinstance(pong, Pong)
    assert isinstance(snapshot, SnapshotReply)
    workers = {f"{worker.worker} of {name}": worker for worker in snapshot.workers}
    return PeerFacts(name, statistics.median(seconds), pong.key_id, workers)


def _asked(link: PeerLink, request: Request, ticket: int) -> Reply:
    deadline = time.monotonic() + _ANSWER_MS_MAX / 1000
    if not link.send(encode_request(ticket, request), _ANSWER_MS_MAX):
        raise BusUnavailable("can't be reached")
    while (left := deadline - time.monotonic()) > 0:
        for frame in link.receive(1000 * left)[0]:
            reply = decode_reply(frame)
            if isinstance(reply.body, Denied):
                raise BusError(reply.body.reason)
            if reply.ticket == ticket:
                return reply.body
    raise BusUnavailable("does not answer")
