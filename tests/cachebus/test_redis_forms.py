"""Every form that cache.remote_url may have, on real servers: TLS, user names, database numbers, a cluster, a sentinel."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis_forms import Certificates, RedisCluster, TlsServer, Watched
from redis_server import RedisServer
from test_redis import TIMEOUT_MS, chunk, remote
from tests_shared import wait_for

from cachebus.chunk import ChunkHeader
from cachebus.errors import TierError
from cachebus.redis import Remote, RemoteUnavailable
from cachebus.redis_names import PART_BYTES

NUMBERS = range(30)


def served(tier: Remote, header: ChunkHeader, payload: memoryview) -> bool:
    """Whether the chunk comes; what comes must be what was written."""
    into = bytearray(len(payload))
    try:
        if tier.get(header, memoryview(into)) is None:
            return False
    except RemoteUnavailable:
        return False
    assert into == payload
    return True


def works(tier: Remote) -> None:
    """All that a tier can be asked."""
    chunks = {n: chunk(n, 3 * PART_BYTES + 1 if n == 0 else 5000 + n) for n in NUMBERS}
    assert all(tier.put(*item) for item in chunks.values())
    keys = [header.key for header, _ in chunks.values()]
    assert tier.probe([*keys, b"x" * 32]) == [*[header for header, _ in chunks.values()], None]
    assert all(served(tier, *item) for item in chunks.values())
    assert sorted(tier.scan()) == sorted(keys)
    assert tier.delete(keys[:2]) == 2
    assert tier.probe(keys[:3]) == [None, None, chunks[2][0]]
    assert "used_memory" in tier.info()
    assert tier.ping() > 0
    assert tier.clear() == 2 * (len(keys) - 2), "header and part of the 28 chunks that are left"
    assert not list(tier.scan())
    assert tier.counts["timeouts"] == 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def tls_server(tmp_path: Path, certificates: Certificates) -> Iterator[Callable[..., TlsServer]]:
    """Starts one with the options given, and ends all that it started."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> TlsServer:
            made = TlsServer(tmp_path, certificates, **options)
            stack.callback(made.stop)
            return made

        yield start


def test_tls_with_an_authority_of_ones_own(tls_server: Callable[..., TlsServer], certificates: Certificates) -> None:
    works(remote(f"{tls_server().url}?ssl_ca_certs={certificates.ca}"))


def test_a_server_that_is_not_trusted_is_refused_and_named(
    tls_server: Callable[..., TlsServer], tmp_path: Path, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    server = tls_server()
    other = Certificates(tmp_path / "other")
    for url in (server.url, f"{server.url}?ssl_ca_certs={other.ca}"):
        caplog.clear()
        assert not remote(url).available
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    caplog.clear()
    assert not remote(server.url.replace("rediss", "redis")).available
    assert "does not answer" in caplog.text
    assert remote(f"{server.url}?ssl_ca_certs={certificates.ca}").available, "the control"
    elsewhere = tls_server(address="10.1.2.3")
    assert not remote(f"{elsewhere.url}?ssl_ca_certs={certificates.ca}").available
    assert remote(f"{elsewhere.url}?ssl_ca_certs={certificates.ca}&ssl_check_hostname=false").available, "the control"


def test_tls_that_asks_who_comes(tls_server: Callable[..., TlsServer], certificates: Certificates) -> None:
    server = tls_server(known_only=True)
    certificate, key = certificates.sign("node")
    assert not remote(f"{server.url}?ssl_ca_certs={certificates.ca}").available
    assert remote(f"{server.url}?ssl_ca_certs={certificates.ca}&ssl_certfile={certificate}&ssl_keyfile={key}").put(*chunk(1, 1000))


def test_a_user_who_may_do_what_is_needed_and_nothing_else(tmp_path: Path, server: RedisServer) -> None:
    may = ["+get", "+set", "+del", "+unlink", "+scan", "+ping", "+info", "+select"]
    server.client.execute_command("ACL", "SETUSER", "cache", "on", ">se cret/1", "~headstart:*", *may)
    secret = tmp_path / "password"
    secret.write_text("se cret/1\n")
    host = f"127.0.0.1:{server.port}"
    works(remote(f"redis://cache:se%20cret%2F1@{host}/0"))
    works(remote(f"redis://cache@{host}/0?password_file={secret}"))
    assert not remote(f"redis://cache:wrong@{host}/0").available
    server.client.execute_command("ACL", "SETUSER", "default", "off")
    assert not remote(f"redis://{host}/0").available


def test_databases_are_apart(server: RedisServer) -> None:
    header, payload = chunk(1, 1000)
    for url in (f"redis://127.0.0.1:{server.port}/3", f"redis://127.0.0.1:{server.port}?db=4"):
        assert remote(url).put(header, payload)
    assert [server.client.execute_command("SELECT", n) and server.client.dbsize() for n in (0, 3, 4)] == [0, 2, 2]
    server.client.execute_command("SELECT", 0)


def test_a_new_connection_to_a_paused_server_costs_one_silence(server: RedisServer) -> None:
    """redis-py by itself would try ten times more."""
    tier = remote(server.url, timeout_ms=TIMEOUT_MS)
    tier._local.lines.clear()
    server.pause()
    started = time.perf_counter()
    assert not served(tier, *chunk(1, 5000))
    assert TIMEOUT_MS / 1000 <= time.perf_counter() - started < 5 * TIMEOUT_MS / 1000


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://here:1/0?ssl_sa_certs=x", "ssl_sa_certs"),
        ("rediss://here:1/0?ssl_min_version=soon", "ssl_min_version"),
        ("redis://here:port/0", "port"),
        ("redis+cluster://here:1,there:2/1", "one database"),
        ("redis+cluster://here:1,,there:2", "no HOST:PORT"),
        ("redis+sentinel://me:secret@here:1/main?pasword=x", "pasword"),
    ],
)
def test_a_url_that_says_nothing_is_refused_at_once(url: str, said: str) -> None:
    with pytest.raises(TierError, match=said) as found:
        remote(url)
    assert "secret" not in str(found.value)


def test_a_cluster_keeps_chunks_on_all_of_its_nodes(cluster: RedisCluster) -> None:
    tier = remote(cluster.url)
    works(tier)
    for number in NUMBERS:
        tier.put(*chunk(number, 5000))
    held = [node.client.dbsize() for node in cluster.nodes]
    assert sum(held) == 2 * len(NUMBERS)
    assert all(held)


def test_a_node_that_dies_takes_its_chunks_and_no_others(plain_cluster: RedisCluster) -> None:
    # One node is named, and it is the one that dies: the others are known by then.
    tier = remote(f"redis+cluster://127.0.0.1:{plain_cluster.nodes[1].port}")
    for number in NUMBERS:
        assert tier.put(*chunk(number, 5000))
    victim = plain_cluster.nodes[1]
    lost = victim.client.dbsize() // 2
    victim.kill()
    found = [served(tier, *chunk(number, 5000)) for number in NUMBERS]
    assert found.count(False) == lost > 0
    assert tier.available
    wait_for(lambda: tier.tick() or True)
    assert found == [served(tier, *chunk(number, 5000)) for number in NUMBERS]
    assert [header is not None for header in tier.probe([chunk(number, 1)[0].key for number in NUMBERS])] == found
    assert len(set(tier.scan())) == len(NUMBERS) - lost
    assert tier.ping() > 0
    assert tier.counts["timeouts"] < 5, "a dead node is left alone"
    victim.start()
    wait_for(tier.tick, 10)
    assert found == [served(tier, *chunk(number, 5000)) for number in NUMBERS], "it came back empty"
    wait_for(lambda: bool(tier.tick() or all(put_again(tier, number) for number in NUMBERS)), 10)
    assert all(served(tier, *chunk(number, 5000)) for number in NUMBERS)


def put_again(tier: Remote, number: int) -> bool:
    try:
        return tier.put(*chunk(number, 5000))
    except RemoteUnavailable:
        return False


def test_a_cluster_that_gives_up_as_a_whole_is_found_again(tmp_path: Path) -> None:
    cluster = RedisCluster(tmp_path, whole=True)
    tier = remote(cluster.url)
    for number in NUMBERS:
        assert tier.put(*chunk(number, 5000))
    cluster.nodes[2].kill()

    def given_up() -> bool:
        tier.tick()
        for number in NUMBERS:
            served(tier, *chunk(number, 5000))
        return not tier.available

    wait_for(given_up, 15)
    assert not tier.tick(), "a node that says PONG and nothing else does not count"
    cluster.nodes[2].start()
    wait_for(tier.tick, 15)
    wait_for(lambda: tier.tick() or sum(served(tier, *chunk(number, 5000)) for number in NUMBERS) >= 10, 10)
    cluster.stop()


def test_a_slot_that_moves_is_a_miss_that_heals(plain_cluster: RedisCluster) -> None:
    tier = remote(plain_cluster.url)
    header, payload = chunk(1, 2 * PART_BYTES + 1)
    assert tier.put(header, payload)
    name = tier._name(header.key).encode()
    for _ in range(3):
        plain_cluster.move(name, (plain_cluster.node_of(name) + 1) % 3)
        assert tier.probe([header.key]) == [None]
        assert not served(tier, header, payload)
        assert tier.available
        assert not tier.put(header, payload)
        tier.tick()
        assert tier.probe([header.key]) == [header]
        assert served(tier, header, payload)
    plain_cluster.begin_to_move(name, (plain_cluster.node_of(name) + 1) % 3)
    assert tier.probe([header.key]) == [None]
    assert not served(tier, header, payload)
    assert not tier.put(header, payload)
    assert tier.counts == {**tier.counts, "timeouts": 0, "refused": 0}


@pytest.fixture
def watched_with_tls(tmp_path: Path, certificates: Certificates) -> Iterator[Watched]:
    made = Watched(tmp_path, "open sesame", certificates, "who/watches")
    yield made
    made.stop()


def test_a_sentinel_tells_the_master_and_a_failover_is_found(watched: Watched) -> None:
    tier = remote(watched.url)
    works(tier)
    header, payload = chunk(1, 100_000)
    assert tier.put(header, payload)
    wait_for(watched.replicated)
    watched.master.kill()
    started = time.monotonic()
    assert not served(tier, header, payload)
    wait_for(tier.tick, 20)
    assert watched.master_port() == watched.replica.port
    assert served(tier, header, payload), "the replica had it"
    assert tier.put(*chunk(2, 5000))
    print(f"found {time.monotonic() - started:.1f} s after the master died")


def test_a_master_that_becomes_a_replica_is_left(watched: Watched) -> None:
    tier = remote(watched.url, timeout_ms=TIMEOUT_MS * 10)
    assert tier.put(*chunk(1, 5000))
    watched.master.client.replicaof("127.0.0.1", str(watched.replica.port))
    watched.replica.client.replicaof("NO", "ONE")
    with pytest.raises(RemoteUnavailable):
        tier.put(*chunk(2, 5000))
    assert not tier.available
    assert tier.counts["refused"] == 0


def test_a_sentinel_with_tls_that_asks_for_its_own_user(watched_with_tls: Watched, tmp_path: Path, certificates: Certificates) -> None:
    secret = tmp_path / "sentinel-password"
    secret.write_text("who/watches\n")
    trusted, user = f"?ssl_ca_certs={certificates.ca}", "&sentinel_username=watcher"
    tier = remote(f"{watched_with_tls.url}{trusted}{user}&sentinel_password_file={secret}", timeout_ms=TIMEOUT_MS * 10)
    works(tier)
    header, payload = chunk(1, 100_000)
    assert tier.put(header, payload)
    wait_for(watched_with_tls.replicated)
    watched_with_tls.master.kill()
    assert not served(tier, header, payload)
    wait_for(tier.tick, 20)
    assert watched_with_tls.master_port() == watched_with_tls.replica.port
    assert served(tier, header, payload), "the replica had it"


def test_a_sentinel_tells_nothing_to_those_it_does_not_know(
    watched_with_tls: Watched, tmp_path: Path, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    secret, wrong = tmp_path / "sentinel-password", tmp_path / "wrong"
    secret.write_text("who/watches")
    wrong.write_text("who")
    trusted, user = f"?ssl_ca_certs={certificates.ca}", "&sentinel_username=watcher"
    own = f"&sentinel_password_file={secret}"
    other = Certificates(tmp_path / "other")
    for query in (trusted, f"{trusted}{user}&sentinel_password_file={wrong}", f"?ssl_ca_certs={other.ca}{user}{own}"):
        caplog.clear()
        assert not remote(watched_with_tls.url + query).available, query
        assert "does not answer" in caplog.text
        assert "who" not in caplog.text
    plain = watched_with_tls.url.replace("rediss", "redis")
    assert not remote(f"{plain}?{user}{own}").available
    assert remote(f"{watched_with_tls.url}{trusted}{user}{own}").available, "the control"
