"""How far and how fast the shared tier is, by the calls that the tier itself makes.

Chunks are stored under a digest key's id that is made up, so no node takes them for its own; they are removed, and expire where that fails.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from cachebus.chunk import DIGEST_KEY_ID_BYTES, ChunkHeader
from cachebus.errors import TierError
from cachebus.redis import Remote, RemoteSettings
from cachebus.settings import CacheSettings
from deploy.doctor.facts import RedisFacts

CHUNK_BYTES = 8 << 20
_STREAMS_MAX = 8
_KEEP_SECONDS = 60
_TIMEOUT_MS = 2000
"""Longer than the tier's own: a slow server is to be measured, not given up."""

_PINGS, _ROUNDS, _SECONDS_MAX = 21, 5, 2.0


def measure(cache: CacheSettings) -> RedisFacts:
    """Asks, writes and reads the server of ``cache.remote_url``."""
    try:
        facts = _traffic(cache)
    except (TierError, OSError) as error:
        return RedisFacts(error=str(error))
    told = _told(cache)
    limit = told.get("maxmemory")
    return replace(facts, maxmemory=None if limit is None else int(limit), policy=str(told.get("maxmemory_policy", "")))


def _traffic(cache: CacheSettings) -> RedisFacts:
    remote = _remote(cache)
    round_trip = statistics.median(remote.ping() for _ in range(_PINGS))
    streams = min(cache.remote_connections, _STREAMS_MAX)
    headers = [ChunkHeader(secrets.token_bytes(32), bytes(16), bytes(32), CHUNK_BYTES, bytes(DIGEST_KEY_ID_BYTES)) for _ in range(streams)]
    payload, buffers = memoryview(os.urandom(CHUNK_BYTES)), [memoryview(bytearray(CHUNK_BYTES)) for _ in headers]
    try:
        with ThreadPoolExecutor(max(1, streams // 2)) as writers, ThreadPoolExecutor(streams) as readers:
            # Lists, so that a miss does not leave others on their way.
            written = _speed(lambda: all([*writers.map(lambda header: remote.put(header, payload), headers)]), streams)
            read = _speed(lambda: None not in [*readers.map(remote.get, headers, buffers)], streams) if written else 0.0
    finally:
        with contextlib.suppress(TierError):
            remote.clear()
    return RedisFacts(round_trip, read, written, streams, lost=not read)


def _speed(move: Callable[[], bool], chunks: int) -> float:
    """Bytes per second of the median round; 0 where one failed."""
    speeds: list[float] = []
    begun = time.perf_counter()
    while len(speeds) < _ROUNDS and (not speeds or time.perf_counter() - begun < _SECONDS_MAX):
        started = time.perf_counter()
        if not move():
            return 0.0
        speeds.append(chunks * CHUNK_BYTES / (time.perf_counter() - started))
    return statistics.median(speeds)


def _told(cache: CacheSettings) -> dict[str, Any]:
    """What the server says of itself; nothing where it is not allowed to, as some managed ones are not."""
    try:
        return _remote(cache).info()
    except (TierError, OSError):
        return {}


def _remote(cache: CacheSettings) -> Remote:
    settings = RemoteSettings(cache.remote_url, secrets.token_bytes(DIGEST_KEY_ID_BYTES), _KEEP_SECONDS, max(_TIMEOUT_MS, cache.remote_timeout_ms))
    remote = Remote(settings)
    remote.tick()
    return remote
