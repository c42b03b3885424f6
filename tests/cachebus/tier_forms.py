"""Every tier as something that chunks are put into and come back from, on daemons that really run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blake3 import blake3
from peer_nodes import Nodes
from redis_server import RedisServer
from test_below import clear, content, get, key, put, settled
from tests_shared import ANSWER_MS, DIGEST_KEY, LAYOUT, Bus, wait_for

from cachebus.messages import Commit, NewEntry, Reserve, Reserved, WrittenEntry
from cachebus.region import Region
from cachebus.settings import CacheSettings, SecuritySettings

DISK_BYTES = 6_000_000
REDIS_BYTES = 12_000_000
PATIENT_MS = 5000
"""These tests are of what comes back, not of when."""
SEALED = SecuritySettings(encrypt_at_rest=True, digest_key_file="elsewhere")


class Form:
    """A tier under test. What is ``put`` lies in it and nowhere above it; ``bus`` is where it is read from."""

    source = "dram"
    integrity = "integrity_failures_total"

    def __init__(self, folder: Path, cache: CacheSettings = CacheSettings(), security: SecuritySettings = SecuritySettings()) -> None:  # noqa: B008
        self.bus = Bus(folder, cache, security)

    def put(self, *numbers: int, length: int, tenant: bytes = bytes(8)) -> None:
        put(self.bus, *numbers, length=length, tenant=tenant)
        settled(self.bus)
        self.drop()

    def share(self, shares: dict[bytes, float]) -> None:
        """Gives tenants their shares of the tier, as the daemon does."""
        self.bus.daemon._directory.share(shares)
        self.bus.daemon._below.share(shares)

    def put_again(self, number: int, text: bytes) -> bool:
        """Puts another text under a key that is there; whether there was room for it above the tier."""
        client = self.bus.client(self.bus.holder)
        region = Region.map(self.bus.run_dir / "region")
        reserved = client.call(Reserve(self.bus.holder.id, LAYOUT, [NewEntry(key(number), len(text))]), ANSWER_MS)
        assert isinstance(reserved, Reserved)
        for slot in reserved.slots:
            region.data[slot.offset : slot.offset + len(text)] = text
            client.submit(Commit(self.bus.holder.id, [WrittenEntry(slot.slot, slot.generation, blake3(text, key=DIGEST_KEY).digest())]))
        wait_for(lambda: self.statistics()["writing"] == 0)
        settled(self.bus)
        client.close()
        region.close()
        return bool(reserved.slots)

    def get(self, *numbers: int, layout: bytes = LAYOUT, check: bool = True) -> list[tuple[bytes, str]]:
        return get(self.bus, *numbers, layout=layout, check=check)

    def drop(self) -> None:
        """What was read is forgotten above the tier."""

    def change(self, number: int, length: int) -> None:
        """Changes a bit of a chunk where it lies."""
        flip(self.bus, number)

    def forgotten(self, number: int) -> bool:
        """Whether nothing is left of a chunk that was found changed."""
        return key(number) not in self.bus.daemon._directory.dram.index

    def bytes_held(self) -> tuple[int, int]:
        """What the tier holds, and what it may."""
        found = self.statistics()
        return int(found["dram_bytes"]), int(found["dram_capacity_bytes"])

    def statistics(self) -> dict[str, float]:
        return self.bus.daemon.statistics()

    def stop(self) -> list[Bus]:
        """Ends everything; the buses that ran."""
        self.bus.stop()
        return [self.bus]


class Nvme(Form):
    source, integrity = "nvme", "nvme_integrity_failures_total"

    def __init__(self, folder: Path, security: SecuritySettings = SecuritySettings()) -> None:  # noqa: B008
        self.disk = folder / "disk"
        super().__init__(folder, CacheSettings(local_disk=str(self.disk), max_local_disk_size=DISK_BYTES / 1e9), security)

    def drop(self) -> None:
        clear(self.bus, "dram")

    def change(self, number: int, length: int) -> None:
        tiers = self.bus.daemon._directory.tiers
        assert tiers.disk is not None
        place = tiers.disk.index[key(number)].offset + 4096 + length // 2
        with (self.disk / "segment-00000").open("r+b") as file:
            file.seek(place)
            old = file.read(1)
            file.seek(place)
            file.write(bytes([old[0] ^ 1]))

    def forgotten(self, number: int) -> bool:
        tiers = self.bus.daemon._directory.tiers
        return tiers.disk is not None and key(number) not in tiers.disk.index

    def bytes_held(self) -> tuple[int, int]:
        return sum(path.stat().st_blocks * 512 for path in self.disk.iterdir()), DISK_BYTES


class Redis(Form):
    source, integrity = "redis", "redis_integrity_failures_total"

    def __init__(self, folder: Path, security: SecuritySettings = SecuritySettings()) -> None:  # noqa: B008
        self.server = RedisServer(folder, "--maxmemory", str(REDIS_BYTES))
        super().__init__(folder, CacheSettings(remote_url=self.server.url, remote_timeout_ms=PATIENT_MS), security)
        wait_for(lambda: bool(self.statistics()["redis_usable"]))

    def drop(self) -> None:
        clear(self.bus, "dram")

    def change(self, number: int, length: int) -> None:
        (name,) = self.server.client.keys(f"*{key(number).hex()}*:0")
        old = self.server.client.getrange(name, length // 2, length // 2)
        self.server.client.setrange(name, length // 2, bytes([old[0] ^ 1]))

    def forgotten(self, number: int) -> bool:
        return not self.server.client.keys(f"*{key(number).hex()}}}")

    def bytes_held(self) -> tuple[int, int]:
        # A command that begins below the limit may end above it.
        return int(self.server.client.info("memory")["used_memory"]), REDIS_BYTES + (1 << 20)

    def stop(self) -> list[Bus]:
        found = super().stop()
        self.server.stop()
        return found


class Peer(Form):
    source, integrity = "peer", "peer_integrity_failures_total"

    def __init__(self, folder: Path, *, keys: bool) -> None:
        self.nodes = Nodes(folder, 2, keys=keys, caches=[CacheSettings(peer_timeout_ms=PATIENT_MS)] * 2)
        self.home, self.bus = self.nodes.buses
        self.nodes.in_touch()

    def put(self, *numbers: int, length: int, tenant: bytes = bytes(8)) -> None:
        put(self.home, *numbers, length=length, tenant=tenant)
        self.drop()
        wait_for(lambda: not any(self.forgotten(number) for number in numbers))

    def share(self, shares: dict[bytes, float]) -> None:
        self.home.daemon._directory.share(shares)

    def drop(self) -> None:
        clear(self.bus, "dram")

    def change(self, number: int, length: int) -> None:
        flip(self.home, number)

    def forgotten(self, number: int) -> bool:
        return key(number) not in self.bus.daemon._below.tiers.keys()["peer"]

    def stop(self) -> list[Bus]:
        self.nodes.stop()
        return self.nodes.buses


FORMS: dict[str, Callable[[Path], Form]] = {
    "dram": Form,
    "nvme": Nvme,
    "nvme sealed": lambda folder: Nvme(folder, SEALED),
    "redis": Redis,
    "redis sealed": lambda folder: Redis(folder, SEALED),
    "peer": lambda folder: Peer(folder, keys=False),
    "peer with keys": lambda folder: Peer(folder, keys=True),
}


def flip(bus: Bus, number: int) -> None:
    """Changes a bit of a chunk in a region."""
    entry = bus.daemon._directory.dram.index[key(number)]
    bus.daemon._region.data[entry.offset + entry.length // 2] ^= 1


def texts(*numbers: int, length: int) -> list[bytes]:
    return [content(number, length) for number in numbers]


__all__ = ["FORMS", "Form", "texts"]
