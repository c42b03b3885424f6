"""Nodes that really run, each with its own region, and keys for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from test_below import get, put
from tests_shared import Bus, wait_for

from cachebus import security
from cachebus.ports import free_port
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.zeromq_peers import new_pair

__all__ = ["get", "put", "Nodes", "free_ports"]


def free_ports(count: int = 3) -> int:
    """The first of some free ports in a row."""
    return free_port("127.0.0.1", count)


class Nodes:
    """Nodes called "0", "1", ... that all know each other; with keys where there are some."""

    def __init__(self, folder: Path, count: int, *, keys: bool, encrypt_bytes: bool = True, caches: Sequence[CacheSettings] = ()) -> None:
        self.folder = folder
        self.ports = [free_ports() for _ in range(count)]
        self.keys = folder / "keys"
        self.buses: list[Bus] = []
        if keys:
            security.begin(self.keys)
            for number in range(count):
                security.add(self.keys, str(number), "node", new_pair)
            # For a node that comes later.
            security.add(self.keys, "later", "node", new_pair)
        for number in range(count):
            run_dir = folder / f"node{number}"
            run_dir.mkdir()
            others = [other for other in range(count) if other != number]
            peers = [f"{other}@127.0.0.1:{self.ports[other]}" if keys else f"127.0.0.1:{self.ports[other]}" for other in others]
            base = caches[number] if caches else CacheSettings()
            settings = msgspec.structs.replace(base, node_port=self.ports[number], peers=peers)
            secured = SecuritySettings(keys_dir=str(self.keys / str(number)), encrypt_peer_bytes=encrypt_bytes) if keys else SecuritySettings()
            self.buses.append(Bus(run_dir, settings, secured))

    def in_touch(self, *numbers: int) -> None:
        """Returns once these nodes (all of them where none is named) hear all others that run."""
        chosen = [self.buses[n] for n in numbers] or self.buses
        wait_for(lambda: all(bus.daemon.statistics()["peers"] == len(bus.cache.peers) for bus in chosen), 10)

    def stop(self) -> None:
        for bus in self.buses:
            bus.stop()
