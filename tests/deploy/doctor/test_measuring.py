"""Measuring on what is really there: a folder, a redis-server, a bus, another node; nothing is left behind."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peer_nodes import Nodes
from redis_server import RedisServer
from tests_shared import DIGEST_KEY, Bus

from cachebus.chunk import key_id
from cachebus.peer_places import peer_addresses
from cachebus.settings import CacheSettings, SecuritySettings
from deploy.doctor import measure_bus, measure_disk, measure_keys, measure_machine, measure_redis

SIZE = 4 * measure_disk.PIECE_BYTES
MOUNTS = r"""22 1 253:0 / / rw - ext4 /dev/vda rw
30 22 0:30 / /data rw - tmpfs none rw
31 22 0:31 / /data rw - xfs /dev/vdb rw
32 31 0:32 / /data/far\040away rw shared:1 - nfs4 host:/x rw
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, "--maxmemory", "200mb", "--maxmemory-policy", "volatile-lru")
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "ext4"), ("/database", "ext4"), ("/data/x", "xfs"), ("/data/far away/x", "nfs4"), ("/data/far", "xfs")]
)
def test_the_innermost_and_last_mount_counts(path: str, kind: str) -> None:
    assert measure_machine.file_system_kind(Path(path), MOUNTS) == kind


def test_the_machine_tells() -> None:
    assert measure_machine.file_system_kind(Path("/dev/shm")) == "tmpfs"
    assert measure_machine.limits().files


def test_a_region_that_is_there_counts_as_room(tmp_path: Path) -> None:
    region = tmp_path / "none" / "region"
    assert measure_machine.shared_memory(region).own == 0
    region.parent.mkdir()
    region.write_bytes(bytes(1 << 20))
    facts = measure_machine.shared_memory(region)
    assert facts.own >= 1 << 20
    assert facts.size > facts.free > 0


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "not there yet"
    facts = measure_disk.speed(folder, SIZE)
    assert not facts.error
    assert facts.size == SIZE
    assert facts.read > 0 < facts.written
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"written": 0, "read": 0}
    write, read = os.pwrite, os.preadv

    def pwrite(descriptor: int, piece: Any, offset: int) -> int:
        moved["written"] += len(piece)
        return write(descriptor, piece, offset)

    def preadv(descriptor: int, pieces: Any, offset: int) -> int:
        count = read(descriptor, pieces, offset)
        moved["read"] += count
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "preadv", preadv)
    measure_disk.speed(tmp_path, SIZE)
    assert moved == {"written": SIZE, "read": 3 * SIZE}


def test_a_file_system_without_o_direct_is_measured_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, mode: int = 0o777) -> int:
        descriptor = real(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:
            # As the kernel does: the file has been made when it says no.
            os.close(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return descriptor

    forgotten = []
    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: forgotten.append(arguments[1:]))
    facts = measure_disk.speed(tmp_path, SIZE)
    assert forgotten == 3 * [(0, 0, os.POSIX_FADV_DONTNEED)], "the page cache would be measured"
    assert not facts.direct
    assert facts.read > 0
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_disk.speed(tmp_path, SIZE)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_can_not_be_used_says_why(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "Not a directory" in measure_disk.speed(file, SIZE).error
    assert "no room" in measure_disk.speed(tmp_path, 0).error


def test_the_files_size_is_bounded() -> None:
    assert measure_disk.file_bytes(10**12, 10**12) == 1 << 30
    assert measure_disk.file_bytes(100_000_000, 10**12) <= 100_000_000
    assert measure_disk.file_bytes(10**12, 100_000_000) <= 50_000_000
    assert measure_disk.file_bytes(10**12, 0) == 0


def test_what_the_tier_has_taken_is_counted(tmp_path: Path) -> None:
    (tmp_path / "segment-00000").write_bytes(bytes(1 << 20))
    facts = measure_disk.place(tmp_path)
    assert facts.taken >= 1 << 20
    assert facts.free > 0
    assert facts.kind != "unknown"


def test_redis_is_measured_and_left_as_it_was(server: RedisServer) -> None:
    server.client.set("somebody's", "own")
    facts = measure_redis.measure(CacheSettings(remote_url=server.url))
    assert not facts.error
    assert not facts.lost
    assert facts.read > 0 < facts.written
    assert 0 < facts.round_trip < 1
    assert (facts.maxmemory, facts.policy) == (200 << 20, "volatile-lru")
    assert server.client.keys() == [b"somebody's"]


def test_a_redis_that_is_full_is_named(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "10mb", "--maxmemory-policy", "noeviction")
    try:
        facts = measure_redis.measure(CacheSettings(remote_url=server.url))
        assert facts.lost
        assert facts.policy == "noeviction"
        assert server.client.keys() == []
    finally:
        server.stop()


def test_a_redis_that_denies_config_and_info_is_measured_all_the_same(tmp_path: Path) -> None:
    password = secrets.token_hex(8)
    server = RedisServer(tmp_path)
    try:
        server.client.execute_command("ACL", "SETUSER", "managed", "on", f">{password}", "~*", "+@all", "-config", "-info")
        facts = measure_redis.measure(CacheSettings(remote_url=server.url.replace("://", f"://managed:{password}@")))
        assert not facts.error
        assert facts.read > 0
        assert facts.maxmemory is None
    finally:
        server.stop()


def test_ctrl_c_leaves_no_chunk(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    there = []

    def interrupted(move: Callable[[], bool], _chunks: int) -> float:
        move()
        there.extend(server.client.keys())
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_redis, "_speed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_redis.measure(CacheSettings(remote_url=server.url))
    assert there
    assert server.client.keys() == []


def test_no_redis_is_an_error_in_words(server: RedisServer) -> None:
    server.kill()
    assert "does not answer" in measure_redis.measure(CacheSettings(remote_url=server.url)).error


def test_the_bus_tells_of_its_workers(bus: Bus) -> None:
    bus.register("d0", "decode", "http://127.0.0.1:9001")
    facts = measure_bus.bus(bus.run_dir)
    assert facts is not None
    worker = facts.workers["d0"]
    assert (worker.block_size, worker.chunk_size, worker.chunk_bytes, worker.max_model_len) == (16, 256, 4096, 8192)
    assert worker.parts == {"weights": "w", "block size": "16"}
    assert facts.key_id == key_id(DIGEST_KEY)
    assert 0 < facts.capacities["dram"] <= 8 << 20
    assert "nvme" not in facts.capacities


def test_where_no_bus_runs_there_are_no_facts(tmp_path: Path) -> None:
    assert measure_bus.bus(tmp_path) is None


@pytest.fixture(params=[True, False], ids=["keys", "no keys"])
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path, 2, keys=request.param)
    yield nodes
    nodes.stop()


def test_a_peer_tells_of_its_workers_and_its_key(nodes: Nodes) -> None:
    own, other = nodes.buses
    other.register("d1", "decode", "http://127.0.0.1:9001")
    (facts,) = measure_bus.peers(peer_addresses(own.cache, own.security))
    assert not facts.error
    assert 0 < facts.round_trip < 1
    assert facts.key_id == key_id(DIGEST_KEY)
    assert [name.split()[0] for name in facts.workers] == ["d1"]


def test_a_peer_that_is_gone_is_an_error_in_words(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_bus, "_ANSWER_MS_MAX", 300)
    own = nodes.buses[0]
    addresses = peer_addresses(own.cache, own.security)
    nodes.buses[1].stop()
    try:
        (facts,) = measure_bus.peers(addresses)
        assert "can't be reached" in facts.error
    finally:
        nodes.buses[1].start()


def test_the_keys_place_follows_the_settings(tmp_path: Path) -> None:
    disk, run = tmp_path / "disk", tmp_path / "run"
    cache = CacheSettings(local_disk=str(disk), max_local_disk_size=1)
    assert measure_keys.digest_key(CacheSettings(), SecuritySettings(), run).path == str(run / "digest.key")
    assert measure_keys.digest_key(cache, SecuritySettings(), run).path == str(disk / "digest.key")
    assert measure_keys.digest_key(cache, SecuritySettings(keys_dir="/k"), run).path == "/k/digest.key"
    assert measure_keys.digest_key(cache, SecuritySettings(keys_dir="/k", digest_key_file="/f"), run).path == "/f"


def test_a_key_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "digest.key"
    assert measure_keys.look(path).mode is None
    path.write_bytes(DIGEST_KEY)
    path.chmod(0o640)
    facts = measure_keys.look(path)
    assert (facts.mode, facts.size) == (0o640, 32)
    assert measure_keys.digest_key_id(facts) == key_id(DIGEST_KEY)


def test_measuring_ends_its_threads(tmp_path: Path) -> None:
    measure_disk.speed(tmp_path, SIZE)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
