"""What is measured. Sizes are bytes, speeds bytes per second, times seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cachebus.messages import Worker


@dataclass(frozen=True)
class SharedMemoryFacts:
    """Where the region lies. ``kind`` is the file system's type; ``own``: what the region there takes already."""

    folder: str
    kind: str
    size: int
    free: int
    own: int = 0


@dataclass(frozen=True)
class LimitFacts:
    """Limits of this process, which what it starts inherits; None: unlimited."""

    files: int | None
    files_max: int | None
    locked_bytes: int | None
    has_gpu: bool


@dataclass(frozen=True)
class DiskFacts:
    """Where the NVMe tier lies. ``taken``: what its files take already."""

    folder: str
    kind: str
    free: int
    taken: int = 0


@dataclass(frozen=True)
class DiskSpeed:
    """What reading and writing a file of ``size`` bytes took. ``direct``: past the page cache. With ``error`` nothing was measured."""

    size: int = 0
    read: float = 0.0
    written: float = 0.0
    streams: int = 1
    direct: bool = True
    error: str = ""


@dataclass(frozen=True)
class RedisFacts:
    """What the shared tier does. ``maxmemory``: None where it does not tell, 0 where it has none. With ``error`` nothing was measured.

    ``lost``: it refused to be written, or had forgotten a moment later.
    """

    round_trip: float = 0.0
    read: float = 0.0
    written: float = 0.0
    streams: int = 1
    lost: bool = False
    maxmemory: int | None = None
    policy: str = ""
    error: str = ""


@dataclass(frozen=True)
class KeyFacts:
    """A file or folder of secrets; ``mode`` None: it is not there. ``forbidden``: the bits that must not be set."""

    path: str
    mode: int | None
    forbidden: int = 0o077
    size: int = 0
    error: str = ""


@dataclass(frozen=True)
class BusFacts:
    """What a running cachebus tells. ``capacities`` by tier; ``key_id`` names its digest key."""

    workers: Mapping[str, Worker] = field(default_factory=dict)
    capacities: Mapping[str, float] = field(default_factory=dict)
    key_id: bytes = b""


@dataclass(frozen=True)
class PeerFacts:
    """What another node tells."""

    name: str
    round_trip: float = 0.0
    key_id: bytes = b""
    workers: Mapping[str, Worker] = field(default_factory=dict)
    error: str = ""
