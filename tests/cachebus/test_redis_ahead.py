"""Values of a chunk that are on their way at once: asked for and sent ahead, in step with the answers whatever those are."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from redis_server import RedisServer

from cachebus.chunk import ChunkHeader
from cachebus.redis import Remote, RemoteSettings, _sent
from cachebus.redis_names import PART_BYTES
from cachebus.resp import Line, command

KEY_ID = b"i" * 8
DIGEST_KEY = b"k" * 32
LENGTH = 5 * PART_BYTES + 12_345


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


def chunk(number: int) -> tuple[ChunkHeader, bytes]:
    payload = random.Random(number).randbytes(LENGTH)
    return ChunkHeader(bytes([number]) * 32, b"l" * 16, blake3(payload, key=DIGEST_KEY).digest(), LENGTH, KEY_ID), payload


def remote(server: RedisServer) -> Remote:
    found = Remote(RemoteSettings(server.url, KEY_ID, 0, 2000))
    for _ in range(50):
        if found.available or found.tick():
            break
    return found


def test_more_parts_than_are_asked_for_ahead(server: RedisServer) -> None:
    tier = remote(server)
    for number in (1, 2):
        header, payload = chunk(number)
        assert tier.put(header, memoryview(payload))
        into = bytearray(LENGTH)
        assert tier.get(header, memoryview(into)) == header
        assert into == payload


def test_a_part_that_is_gone_is_a_miss_and_the_next_chunk_is_whole(server: RedisServer) -> None:
    tier = remote(server)
    chunks = [chunk(number) for number in (1, 2)]
    for header, payload in chunks:
        assert tier.put(header, memoryview(payload))
    names = [name for name in server.client.scan_iter() if name.endswith(b":3") and (b"01" * 32) in name]
    assert server.client.delete(*names) == 1
    into = bytearray(LENGTH)
    assert tier.get(chunks[0][0], memoryview(into)) is None
    assert tier.get(chunks[1][0], memoryview(into)) == chunks[1][0]
    assert into == chunks[1][1]


def test_a_full_server_gets_no_header_without_its_parts(server: RedisServer) -> None:
    tier = remote(server)
    used = int(server.client.info("memory")["used_memory"])  # type: ignore[index]
    server.client.config_set("maxmemory", used + 2 * PART_BYTES)
    server.client.config_set("maxmemory-policy", "noeviction")
    header, payload = chunk(1)
    assert not tier.put(header, memoryview(payload))
    server.client.config_set("maxmemory", 0)
    assert tier.probe([header.key]) == [None]


@pytest.mark.parametrize("refused", range(1, 15))
def test_of_chunks_that_go_together_those_before_a_refusal_are_there(server: RedisServer, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    """Two parts and a header each; whichever is refused, nothing is said to be there that is not, and nothing is there without its parts."""
    tier = remote(server)
    payloads = [random.Random(number).randbytes(PART_BYTES + 1) for number in range(4)]
    headers = [ChunkHeader(bytes([n]) * 32, b"l" * 16, blake3(p, key=DIGEST_KEY).digest(), len(p), KEY_ID) for n, p in enumerate(payloads, 1)]
    answered = Line.receive_status
    statuses: list[str] = []

    def refusing(line: Line) -> str:
        status = answered(line)
        statuses.append(status)
        return "OOM full" if len(statuses) == refused else status

    monkeypatch.setattr(Line, "receive_status", refusing)
    stored = tier.put_all([(header, memoryview(payload)) for header, payload in zip(headers, payloads, strict=True)])
    monkeypatch.undo()
    whole = (refused - 1) // 3
    assert stored == [number < whole for number in range(4)]
    found = tier.probe([header.key for header in headers])
    assert found[:whole] == headers[:whole]
    assert not any(found[whole + 1 :])
    # A header whose own answer was taken for a refusal may be there, with all of its parts.
    for header, payload, there in zip(headers, payloads, found, strict=True):
        into = bytearray(len(payload))
        assert (tier.get(header, memoryview(into)) == header and into == payload) if there else True
    assert tier.counts["refused"] == (refused <= 12)


@pytest.fixture
def line_and_server() -> Iterator[tuple[Line, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield Line(ours, ours.close, 5.0), theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("refused", range(4))
def test_after_a_refusal_nothing_is_sent_and_every_answer_is_taken(line_and_server: tuple[Line, socket.socket], refused: int) -> None:
    line, server = line_and_server
    seen: list[bytes] = []

    def serve() -> None:
        with server.makefile("rb") as requests:
            while requests.readline():
                requests.readline()
                word = requests.readline().strip()
                seen.append(word)
                server.sendall(b"-OOM full\r\n" if word == str(refused).encode() else b"+OK\r\n")

    threading.Thread(target=serve, daemon=True).start()
    answers = _sent(line, [[command(str(number).encode())] for number in range(4)])
    # One more is on its way when the refusal comes.
    count = min(4, refused + 2)
    assert answers == ["OOM full" if number == refused else "" for number in range(count)]
    line.send([command(b"next")])
    assert line.receive_status() == ""
    assert seen == [*(str(number).encode() for number in range(count)), b"next"]


def test_a_refused_last_part_takes_its_header_along(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = remote(server)
    header, payload = chunk(1)
    answered = Line.receive_status
    statuses: list[str] = []

    def refusing(line: Line) -> str:
        status = answered(line)
        statuses.append(status)
        return "OOM full" if len(statuses) == 6 else status

    monkeypatch.setattr(Line, "receive_status", refusing)
    assert not tier.put(header, memoryview(payload))
    monkeypatch.undo()
    assert tier.probe([header.key]) == [None]
