"""Every trap fires, and what is healthy passes, by the facts alone."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from cachebus.messages import Worker
from deploy.doctor import check_disk, check_keys, check_machine, check_peers, check_redis, check_workers
from deploy.doctor.facts import DiskFacts, DiskSpeed, KeyFacts, LimitFacts, PeerFacts, RedisFacts, SharedMemoryFacts
from deploy.doctor.finding import Finding

GB = 10**9
MEMORY = SharedMemoryFacts("/dev/shm", "tmpfs", 64 * GB, 60 * GB)
LIMITS = LimitFacts(65536, 1 << 20, 8 << 20, has_gpu=False)
DISK = DiskFacts("/cache", "ext4", 500 * GB)
FAST = DiskSpeed(GB, 6.9e9, 4e9, 4)
REDIS = RedisFacts(0.0002, 3.1e9, 2.5e9, 4, maxmemory=64 * GB, policy="allkeys-lru")
KEY = KeyFacts("/keys/digest.key", 0o600, size=32)
FOLDER = KeyFacts("/keys", 0o700, 0o022)
PEER = PeerFacts("b", 0.0004, b"k" * 8)
WORKER = Worker("d0", "decode", "http://x", "m", b"n" * 32, 16, 256, 8192, True, False, 32 << 20, {"KV dtype": "fp8", "weights": "w"})


def changed(**fields: object) -> Worker:
    return msgspec.structs.replace(WORKER, **fields)


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        (MEMORY, "ok", "/dev/shm"),
        (replace(MEMORY, free=GB), "bad", "lower cache.max_local_cpu_size"),
        (replace(MEMORY, free=GB, own=4 * GB), "ok", ""),
        (replace(MEMORY, size=64 << 20, free=64 << 20), "bad", "--shm-size"),
        (replace(MEMORY, size=64 << 30, free=64 << 20), "bad", "remount"),
        (replace(MEMORY, kind="ext4"), "warn", "region_path"),
    ],
)
def test_shared_memory(facts: SharedMemoryFacts, verdict: str, words: str) -> None:
    agrees(check_machine.shared_memory(facts, 5 * GB), verdict, words)


@pytest.mark.parametrize(
    ("files", "verdict", "words"), [(65536, "ok", "65536"), (None, "ok", "unlimited"), (1024, "warn", "ulimit -n"), (256, "bad", "ulimit -n")]
)
def test_open_files(files: int | None, verdict: str, words: str) -> None:
    agrees(check_machine.open_files(replace(LIMITS, files=files)), verdict, words)


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        (LIMITS, "skipped", "no GPU"),
        (replace(LIMITS, has_gpu=True), "warn", "memlock"),
        (replace(LIMITS, has_gpu=True, locked_bytes=None), "ok", "unlimited"),
        (replace(LIMITS, has_gpu=True, locked_bytes=6 * GB), "ok", "6 GB"),
    ],
)
def test_locked_memory(facts: LimitFacts, verdict: str, words: str) -> None:
    agrees(check_machine.locked_memory(facts, 5 * GB), verdict, words)


@pytest.mark.parametrize(
    ("kind", "verdict", "words"),
    [
        ("ext4", "ok", "ext4"),
        ("xfs", "ok", "xfs"),
        ("tmpfs", "bad", "memory, not a disk"),
        ("nfs4", "warn", "network"),
        ("fuse.sshfs", "warn", "network"),
        ("overlay", "warn", "volume"),
    ],
)
def test_disk_file_system(kind: str, verdict: str, words: str) -> None:
    agrees(check_disk.file_system(replace(DISK, kind=kind)), verdict, words)


@pytest.mark.parametrize(("free", "taken", "verdict"), [(500, 0, "ok"), (100, 0, "bad"), (100, 100, "ok"), (100, 99, "bad")])
def test_disk_space_counts_what_the_tier_has_already(free: int, taken: int, verdict: str) -> None:
    agrees(check_disk.space(replace(DISK, free=free * GB, taken=taken * GB), 200 * GB), verdict, "max_local_disk_size" if verdict == "bad" else "")


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        (FAST, "ok", "6.90 GB/s"),
        (replace(FAST, read=5.9e9), "warn", "70B model wants 6 GB/s"),
        (replace(FAST, read=0.15e9), "bad", "computing is faster"),
        (replace(FAST, direct=False), "warn", "no O_DIRECT"),
        (DiskSpeed(error="/cache: Permission denied"), "bad", "Permission denied"),
    ],
)
def test_disk_speed(facts: DiskSpeed, verdict: str, words: str) -> None:
    agrees(check_disk.speed(facts), verdict, words)


@pytest.mark.parametrize(
    ("facts", "check", "verdict", "words"),
    [
        (replace(REDIS, round_trip=0.05), check_redis.ROUND_TRIP, "bad", "remote_timeout_ms"),
        (replace(REDIS, round_trip=0.012), check_redis.ROUND_TRIP, "warn", "rack"),
        (replace(REDIS, read=0.117e9, written=0.117e9), check_redis.SPEED, "bad", "that is a 1 GbE link"),
        (replace(REDIS, written=0.116e9), check_redis.SPEED, "bad", "that is a 1 GbE link"),
        (replace(REDIS, read=0.3e9), check_redis.SPEED, "bad", "io-threads"),
        (replace(REDIS, read=1.17e9), check_redis.SPEED, "warn", "25 GbE"),
        (replace(REDIS, lost=True), check_redis.SPEED, "bad", "did not keep"),
        (replace(REDIS, maxmemory=0, policy="noeviction"), check_redis.MEMORY, "warn", "set maxmemory"),
        (replace(REDIS, policy="noeviction"), check_redis.MEMORY, "bad", "allkeys-lru"),
        (replace(REDIS, policy="allkeys-random"), check_redis.MEMORY, "warn", "allkeys-lru"),
        (replace(REDIS, maxmemory=None, policy=""), check_redis.MEMORY, "skipped", "does not tell"),
        (replace(REDIS, policy=""), check_redis.MEMORY, "skipped", "does not tell"),
    ],
)
def test_redis(facts: RedisFacts, check: str, verdict: str, words: str) -> None:
    found = {finding.check: finding for finding in check_redis.redis(facts, 40, 60)}
    agrees(found.pop(check), verdict, words)
    assert {finding.verdict for finding in found.values()} == {"ok"}


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru"])
def test_a_healthy_redis(policy: str) -> None:
    found = check_redis.redis(replace(REDIS, policy=policy), 40, 60)
    assert [finding.verdict for finding in found] == ["ok", "ok", "ok"]
    assert "1 GbE" not in found[1].measured


def test_a_volatile_policy_evicts_nothing_that_has_no_ttl() -> None:
    agrees(check_redis.redis(replace(REDIS, policy="volatile-lru"), 40, 0)[2], "bad", "remote_ttl_seconds")


def test_a_redis_that_does_not_answer_is_one_finding() -> None:
    (found,) = check_redis.redis(RedisFacts(error="nobody there"), 40, 60)
    agrees(found, "bad", "nobody there")


@pytest.mark.parametrize(
    ("facts", "given", "shares", "verdict", "words"),
    [
        (KEY, True, True, "ok", "0600"),
        (KEY, False, False, "ok", "0600"),
        (replace(KEY, mode=None), False, False, "ok", "will make one"),
        (KEY, False, True, "warn", "share nothing"),
        (replace(KEY, mode=0o644), True, True, "bad", "chmod 600 /keys/digest.key"),
        (replace(KEY, mode=0o620), True, True, "bad", "others can change it"),
        (replace(KEY, size=31), True, True, "bad", "31 bytes"),
        (replace(KEY, mode=None), True, True, "bad", "is not there"),
        (replace(KEY, mode=None, error="Permission denied"), False, False, "bad", "Permission denied"),
    ],
)
def test_digest_key(facts: KeyFacts, given: bool, shares: bool, verdict: str, words: str) -> None:
    agrees(check_keys.digest_key(facts, given=given, shares=shares), verdict, words)


@pytest.mark.parametrize(
    ("facts", "verdict", "words"),
    [
        ([], "skipped", "keys_dir is not set"),
        ([FOLDER, KEY], "ok", "/keys"),
        ([replace(FOLDER, mode=0o755), KEY], "ok", "/keys"),
        ([replace(FOLDER, mode=0o777), KEY], "bad", "chmod 755 /keys"),
        ([FOLDER, replace(KEY, mode=0o640)], "bad", "chmod 600 /keys/digest.key"),
        ([FOLDER, replace(KEY, mode=None)], "bad", "headstart keys add"),
    ],
)
def test_keys_folder(facts: list[KeyFacts], verdict: str, words: str) -> None:
    agrees(check_keys.keys_folder(facts), verdict, words)


@pytest.mark.parametrize(
    ("other", "verdict", "words"),
    [
        (changed(), "ok", "2 of m: KV dtype fp8, block size 16, chunk size 256"),
        (changed(parts={"KV dtype": "auto", "weights": "w"}), "bad", "KV dtype is fp8 in a but auto in b"),
        (changed(block_size=32), "bad", "block size is 16 in a but 32 in b"),
        (changed(chunk_size=512), "bad", "chunk size is 256 in a but 512 in b"),
        (changed(parts={"KV dtype": "fp8", "weights": "v"}), "bad", "weights is w in a but v in b"),
        (changed(parts={}), "ok", ""),
        (changed(model="n", block_size=32), "ok", "1 of m"),
    ],
)
def test_workers_agree(other: Worker, verdict: str, words: str) -> None:
    agrees(check_workers.agree({"a": WORKER, "b": other}), verdict, words)


def test_without_workers_nothing_is_said_of_them() -> None:
    assert check_workers.agree({}).verdict == check_workers.fit({}, {"dram": GB}).verdict == "skipped"


@pytest.mark.parametrize(
    ("capacities", "verdict", "words"),
    [
        ({"dram": 5 * GB, "nvme": 100 * GB, "redis": 64 * GB}, "ok", "33.6 MB"),
        ({"dram": 5 * GB, "nvme": 30e6}, "bad", "raise cache.max_local_disk_size"),
        ({"dram": 30e6}, "bad", "raise cache.max_local_cpu_size"),
        ({"dram": 5 * GB, "redis": 30e6}, "bad", "maxmemory"),
        ({"dram": 1.0 * GB}, "warn", "the longest prompt takes 1.07 GB"),
    ],
)
def test_chunks_fit_their_tiers(capacities: dict[str, float], verdict: str, words: str) -> None:
    agrees(check_workers.fit({"a": WORKER}, capacities), verdict, words)


LONG = changed(max_model_len=200_000)


@pytest.mark.parametrize(
    ("configured", "length", "workers", "verdict", "words"),
    [
        (256, 0, {}, "skipped", "max_model_len is not set"),
        (256, 131_072, {}, "ok", "131072"),
        (256, 131_073, {}, "warn", "cache.chunk_size to 512"),
        (512, 200_000, {}, "ok", "200000"),
        (256, 0, {"a": LONG}, "warn", "cache.chunk_size to 512"),
        (256, 0, {"a": WORKER}, "ok", "8192"),
        (512, 0, {"a": WORKER, "b": LONG}, "warn", "256 tokens"),
        (256, 0, {"a": msgspec.structs.replace(LONG, chunk_size=512)}, "ok", "512 tokens"),
    ],
)
def test_long_contexts_want_long_chunks(configured: int, length: int, workers: dict[str, Worker], verdict: str, words: str) -> None:
    agrees(check_workers.chunk_size(configured, length, workers), verdict, words)


@pytest.mark.parametrize(
    ("facts", "own", "verdict", "words"),
    [
        (PEER, b"k" * 8, "ok", "the same digest key"),
        (PEER, b"", "ok", "not compared"),
        (PEER, b"j" * 8, "bad", "another digest key"),
        (replace(PEER, round_trip=0.3), b"k" * 8, "bad", "peer_timeout_ms"),
        (replace(PEER, round_trip=0.02), b"k" * 8, "warn", "rack"),
        (PeerFacts("b", error="can't be reached"), b"k" * 8, "bad", "node_port"),
    ],
)
def test_peers(facts: PeerFacts, own: bytes, verdict: str, words: str) -> None:
    agrees(check_peers.peer(facts, own, 200), verdict, words)


def agrees(found: Finding, verdict: str, words: str) -> None:
    """The verdict, words that must be said, and advice exactly where something is to be changed."""
    assert found.verdict == verdict, found
    assert words in f"{found.measured} {found.advice}"
    assert bool(found.advice) == (verdict in ("warn", "bad"))
