"""The tiers below DRAM as one thing for the daemon: opens those that are configured, hands out jobs, collects outcomes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cachebus.chunk import key_id
from cachebus.disk import DiskTier
from cachebus.effects import Effect, Job, Outcome, Wipe
from cachebus.lanes import DiskLane, Lane, Memory
from cachebus.messages import Event
from cachebus.peer_places import PeerPlaces
from cachebus.peers import PeerLane
from cachebus.redis import Remote, RemoteSettings
from cachebus.redis_shares import ShareSettings
from cachebus.remote_lane import RemoteLane
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.shelf import Shelf
from cachebus.tiers import Tiers
from cachebus.wire import Tier
from cachebus.zeromq_peers import PeerAddress

log = logging.getLogger("headstart.cachebus")

DISK_READERS, DISK_WRITERS = 4, 2
CLOSE_SECONDS_MAX = 10.0
HEADER_PAGE_BYTES = 4096


def remote_writers(cache: CacheSettings) -> int:
    """Threads that write to the shared tier. One keeps a server busy, more take the processor from a server that runs beside them: measured."""
    return max(1, cache.remote_connections // 4)


class Below:
    """``tiers`` is the state machine, ``lanes`` are the threads of each tier that is configured."""

    def __init__(self, tiers: Tiers, lanes: dict[Tier, Lane]) -> None:
        self.tiers = tiers
        self._lanes = lanes

    @classmethod
    def open(cls, cache: CacheSettings, security: SecuritySettings, memory: Memory, wake: Callable[[], None]) -> Below:
        """The tiers of these settings; what is elsewhere may come later.

        Raises TierError where the disk can't be used, BusError where a peer has no key.
        """
        # Chunks that are sealed are foreign to a node that does not seal, and the other way round.
        name = key_id(memory.sealer.key if memory.sealer else memory.digest_key)
        tiers = Tiers(key_id=name, write_behind_bytes_max=int(cache.write_behind_gb_max * 1e9))
        lanes: dict[Tier, Lane] = {}
        if cache.local_disk:
            disk = DiskTier(Path(cache.local_disk).absolute(), int(cache.max_local_disk_size * 1e9), name)
            tiers.disk = Shelf(disk.capacity, disk.slots, cache.eviction, HEADER_PAGE_BYTES, cache.tenant_share_max)
            lanes["nvme"] = DiskLane(disk, memory, DISK_READERS, DISK_WRITERS, wake)
            for job in tiers.adopt_disk(disk.records()):
                lanes["nvme"].start(job)
            log.info("nvme: %s holds %d chunks, %.2f GB of room", cache.local_disk, len(tiers.disk.index), disk.capacity / 1e9)
        if cache.remote_url:
            shares = ShareSettings(cache.tenant_share_max, int(cache.remote_capacity_gb * 1e9), cache.remote_ttl_seconds)
            remote = Remote(RemoteSettings(cache.remote_url, name, cache.remote_ttl_seconds, cache.remote_timeout_ms, shares))
            lanes["redis"] = RemoteLane(remote, memory, cache.remote_connections, remote_writers(cache), wake)
        if cache.peers or cache.peers_dns:
            places = PeerPlaces(cache, security)
            lanes["peer"] = PeerLane(places, memory, name, cache.peer_timeout_ms, cache.peer_streams, wake, tells_workers=cache.peer_workers)
        return cls(tiers, lanes)

    def start(self, job: Job) -> None:
        """Hands a job to its tier. What is to be forgotten of a tier that there is not is forgotten."""
        lane = self._lanes.get(job.tier)
        if lane is not None or not isinstance(job, Wipe):
            self._lanes[job.tier].start(job)

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """What ended since the last call."""
        for lane in self._lanes.values():
            yield from lane.outcomes()

    def changes(self) -> list[Effect]:
        """Tells the state machine which tiers can be used now, and what a tier that came (back) holds."""
        self.tiers.usable = {tier for tier, lane in self._lanes.items() if lane.usable}
        self.tiers.writable = {tier for tier, lane in self._lanes.items() if lane.writable}
        for lane in self._lanes.values():
            self.tiers.distances.update(lane.distances())
        return [effect for lane in self._lanes.values() for held in lane.held() for effect in self.tiers.learn(held)]

    def news(self) -> Iterator[tuple[str, Event]]:
        """What other nodes said of their workers since the last call, with the node's name."""
        for lane in self._lanes.values():
            yield from lane.news()

    def keepers(self) -> dict[str, tuple[bytes, PeerAddress]]:
        """The nodes that are heard and keep claims for others, by name: who each is among those, and where."""
        return {name: keeper for lane in self._lanes.values() for name, keeper in lane.keepers().items()}

    def share(self, shares: Mapping[bytes, float]) -> None:
        """From now on these tenants may take these shares of the shared tier."""
        for lane in self._lanes.values():
            lane.share(shares)

    def close(self) -> None:
        """Does what is queued and ends the threads."""
        for lane in self._lanes.values():
            lane.close(CLOSE_SECONDS_MAX)
