"""The shared tier on a real server: what goes in comes out, or is a miss; a server in trouble costs little and comes back by itself."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from redis_server import RedisServer
from tests_shared import DIGEST_KEY, wait_for

from cachebus.breaker import Breaker
from cachebus.chunk import HEADER_BYTES, ChunkHeader, key_id
from cachebus.redis import Remote, RemoteSettings, RemoteUnavailable, redacted
from cachebus.redis_names import PART_BYTES

TIMEOUT_MS = 40
PATIENT_MS = 2000
"""For tests of what comes back, not of when: a busy machine may be silent for longer than 40 ms."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, "--unixsocket", str(tmp_path / "redis.sock"), "--unixsocketperm", "700")
    yield server
    server.stop()


def remote(url: str, digest_key: bytes = DIGEST_KEY, ttl: int = 60, timeout_ms: int = PATIENT_MS) -> Remote:
    made = Remote(RemoteSettings(url, key_id(digest_key), ttl, timeout_ms))
    made.tick()
    return made


def chunk(number: int, length: int) -> tuple[ChunkHeader, memoryview]:
    payload = random.Random(number).randbytes(length)
    digest = blake3(payload, key=DIGEST_KEY).digest()
    return ChunkHeader(number.to_bytes(32, "big"), b"l" * 16, digest, length, key_id(DIGEST_KEY)), memoryview(payload)


def good(header: ChunkHeader, payload: bytes | bytearray) -> bool:
    return blake3(payload, key=DIGEST_KEY).digest() == header.digest


@pytest.mark.parametrize("length", [1, 4097, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 12345])
def test_a_chunk_comes_back_byte_for_byte(server: RedisServer, length: int) -> None:
    tier = remote(server.url)
    header, payload = chunk(length, length)
    assert tier.put(header, payload)
    assert tier.probe([b"x" * 32, header.key]) == [None, header]
    into = bytearray(length)
    assert tier.get(header, memoryview(into))
    assert into == payload
    assert list(tier.scan()) == [header.key]
    assert all(0 < server.client.ttl(name) <= 60 for name in server.client.keys("*"))
    assert tier.delete([header.key]) == 1
    assert not server.client.keys("*")
    assert tier.probe([header.key]) == [None]
    assert not tier.get(header, memoryview(into))


def test_by_unix_socket_and_password(tmp_path: Path, server: RedisServer) -> None:
    header, payload = chunk(1, 5000)
    assert remote(f"unix://{tmp_path}/redis.sock").put(header, payload)
    (tmp_path / "locked").mkdir()
    locked = RedisServer(tmp_path / "locked", "--requirepass", "open sesame")
    secret = tmp_path / "password"
    secret.write_text("open sesame\n")
    try:
        assert not remote(locked.url).available
        assert remote(f"{locked.url}?password_file={secret}").put(header, payload)
    finally:
        locked.stop()


def test_no_password_is_told() -> None:
    assert redacted("rediss://me:secret@host:1/0") == "rediss://me:***@host:1/0"
    assert redacted("redis://host:1/0") == "redis://host:1/0"


def test_chunks_of_another_digest_key_are_not_seen(server: RedisServer) -> None:
    header, payload = chunk(1, 100)
    assert remote(server.url).put(header, payload)
    other = remote(server.url, digest_key=b"o" * 32)
    assert other.probe([header.key]) == [None]
    assert not list(other.scan())
    assert other.clear() == 0
    assert remote(server.url).probe([header.key]) == [header]


def test_a_missing_part_is_a_miss(server: RedisServer) -> None:
    tier = remote(server.url)
    header, payload = chunk(1, 2 * PART_BYTES)
    assert tier.put(header, payload)
    server.client.delete(next(name for name in server.client.keys("*") if name.endswith(b":1")))
    assert not tier.get(header, memoryview(bytearray(len(payload))))
    # The connection is still in step.
    assert tier.probe([header.key]) == [header]


def test_nothing_that_was_changed_on_the_server_is_accepted(server: RedisServer) -> None:
    tier = remote(server.url)
    header, payload = chunk(1, 40_000)
    assert tier.put(header, payload)
    name = next(name for name in server.client.keys("*") if name.endswith(b"}"))
    into = bytearray(len(payload))
    whole = server.client.get(name)
    for place in range(HEADER_BYTES):
        server.client.setrange(name, place, bytes([whole[place] ^ 1]))
        assert tier.probe([header.key]) == [None]
        assert not tier.get(header, memoryview(into))
        server.client.setrange(name, place, whole[place : place + 1])
    assert tier.get(header, memoryview(into))
    part, dice, came = name + b":0", random.Random(7), 0
    for _ in range(10_000):
        place, bit = dice.randrange(len(payload)), 1 << dice.randrange(8)
        server.client.setrange(part, place, bytes([payload[place] ^ bit]))
        came += tier.get(header, memoryview(into)) is not None
        assert not good(header, into)
        server.client.setrange(part, place, payload[place : place + 1])
    assert came == 10_000, "the control: without the digest all of them would have been served"


def test_a_paused_server_is_given_up_at_once_and_found_again(server: RedisServer) -> None:
    tier = remote(server.url, timeout_ms=TIMEOUT_MS)
    header, payload = chunk(1, 100_000)
    assert tier.put(header, payload)
    server.pause()
    started = time.perf_counter()
    with pytest.raises(RemoteUnavailable):
        tier.get(header, memoryview(bytearray(len(payload))))
    assert time.perf_counter() - started < 0.5
    assert not tier.available
    started = time.perf_counter()
    for _ in range(100):
        with pytest.raises(RemoteUnavailable):
            tier.probe([header.key])
    assert time.perf_counter() - started < 0.1
    time.sleep(1)
    assert not tier.tick()
    server.go_on()
    wait_for(tier.tick, 5)
    into = bytearray(len(payload))
    assert tier.get(header, memoryview(into))
    assert into == payload


class NeverOpens(Breaker):
    def failed(self, now: float) -> bool:
        return True


def test_without_the_breaker_a_paused_server_costs_a_silence_each_time(server: RedisServer) -> None:
    """The control of the test before: it's the breaker that makes a hundred questions cheap."""
    tier = remote(server.url, timeout_ms=TIMEOUT_MS)
    tier._breaker = NeverOpens(open=False)
    server.pause()
    started = time.perf_counter()
    for number in range(5):
        assert tier.probe([chunk(number, 1)[0].key]) == [None]
    assert time.perf_counter() - started >= 5 * TIMEOUT_MS / 1000
    assert tier.available


def test_a_server_that_comes_back_empty_has_nothing(server: RedisServer) -> None:
    tier = remote(server.url)
    header, payload = chunk(1, 100_000)
    assert tier.put(header, payload)
    server.kill()
    with pytest.raises(RemoteUnavailable):
        tier.probe([header.key])
    server.start()
    wait_for(tier.tick, 5)
    assert tier.probe([header.key]) == [None]
    assert tier.put(header, payload)
    assert list(tier.scan()) == [header.key]


def test_a_full_server_refuses_and_goes_on_being_read(server: RedisServer) -> None:
    tier = remote(server.url)
    header, payload = chunk(1, 100_000)
    assert tier.put(header, payload)
    server.client.config_set("maxmemory", "1mb")
    assert not tier.put(*chunk(2, 2 << 20))
    assert tier.counts["refused"] == 1
    assert not tier.put(*chunk(3, 100)), "it is left alone for a while"
    assert tier.counts["refused"] == 1
    assert tier.available
    into = bytearray(len(payload))
    assert tier.get(header, memoryview(into))
    assert into == payload


def test_late_bytes_of_a_timed_out_answer_land_nowhere(server: RedisServer) -> None:
    tier = remote(server.url, timeout_ms=TIMEOUT_MS)
    header, payload = chunk(1, 8 << 20)
    other, other_payload = chunk(2, 8 << 20)
    assert tier.put(header, payload)
    assert tier.put(other, other_payload)
    into = bytearray(len(payload))
    server.client.execute_command("CLIENT", "PAUSE", "300", "ALL")
    with pytest.raises(RemoteUnavailable):
        tier.get(header, memoryview(into))
    before = bytes(into)
    wait_for(tier.tick, 5)
    second = bytearray(len(payload))
    assert tier.get(other, memoryview(second))
    assert second == other_payload
    assert into == before


def test_nobody_there_is_known_in_time() -> None:
    tier = remote("redis://127.0.0.1:9/0", timeout_ms=TIMEOUT_MS)
    assert not tier.available
    with pytest.raises(RemoteUnavailable):
        tier.probe([os.urandom(32)])
