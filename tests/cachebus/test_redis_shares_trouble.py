"""Tenants' shares on servers that have no limit, refuse what accounts need, are silent, or come back empty."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer
from share_nodes import CAPACITY, SIZE, A, counted, header, mend, node, put, there
from tests_shared import wait_for

from cachebus.redis import RemoteUnavailable

MAY = ("+get", "+set", "+del", "+unlink", "+scan", "+ping", "+info", "+select")
MAY_WITH_SHARES = (*MAY, "+zadd", "+zrem", "+zrangebyscore", "+zscan", "+expire")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    made = RedisServer(tmp_path, "--unixsocket", str(tmp_path / "redis.sock"))
    yield made
    made.stop()


def test_a_server_without_a_limit_has_no_shares_and_it_is_said_once(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    tier = node(server.url, capacity=0)
    for number in range(20):
        put(tier, [number])
        mend(tier)
    assert len(there(tier, range(20))) == 20
    assert [record.getMessage() for record in caplog.records if "shares" in record.getMessage()] == [
        "redis: tenants' shares do not hold: it has no maxmemory, and cache.remote_capacity_gb is 0"
    ]
    server.client.config_set("maxmemory", 10 * CAPACITY)
    tier.shares.share({A: 0.025})
    mend(tier)
    assert len(tier.shares.keep()) == 10, "it is asked again"


def test_a_user_who_may_keep_no_accounts_stores_all_the_same(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    server.client.execute_command("ACL", "SETUSER", "cache", "on", ">secret", "~headstart:*", *MAY)
    tier = node(f"redis://cache:secret@127.0.0.1:{server.port}/0")
    for number in range(20):
        assert put(tier, [number]) == [True]
        mend(tier)
        assert tier.shares.keep() == []
    assert len(there(tier, range(20))) == 20
    assert tier.available
    assert tier.counts == {**tier.counts, "timeouts": 0, "refused": 0}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert "shares do not hold" in caplog.text
    server.client.execute_command("ACL", "SETUSER", "cache", *MAY_WITH_SHARES)
    mend(tier)
    assert len(tier.shares.keep()) == 10


def test_a_user_who_loses_the_right_meanwhile_goes_on_storing(server: RedisServer) -> None:
    server.client.execute_command("ACL", "SETUSER", "cache", "on", ">secret", "~headstart:*", *MAY_WITH_SHARES)
    tier = node(f"redis://cache:secret@127.0.0.1:{server.port}/0")
    put(tier, range(5))
    server.client.execute_command("ACL", "SETUSER", "cache", "-zadd")
    assert put(tier, range(10, 13)) == [True] * 3
    assert tier.get(header(1), memoryview(bytearray(SIZE)))
    assert put(tier, range(20, 40)) == [True] * 20, "no share holds"
    assert tier.counts == {**tier.counts, "timeouts": 0, "refused": 0}


def test_the_rights_that_the_readme_names_are_enough(server: RedisServer) -> None:
    server.client.execute_command("ACL", "SETUSER", "cache", "on", ">secret", "~headstart:*", *MAY_WITH_SHARES)
    for url in (f"redis://cache:secret@127.0.0.1:{server.port}/0", f"unix://cache:secret@{server._folder}/redis.sock"):
        tier = node(url)
        put(tier, range(12))
        mend(tier)
        tier.shares.keep()
        assert tier.get(header(11), memoryview(bytearray(SIZE)))
        assert len(counted(server)) == 10
        tier.shares.forget(A)
        assert tier.clear() == 20
        assert tier.counts["timeouts"] == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_silent_server_costs_one_silence(server: RedisServer, known: bool) -> None:
    tier = node(server.url, timeout_ms=40)
    if known:
        put(tier, range(10))
    server.pause()
    started = time.perf_counter()
    with pytest.raises(RemoteUnavailable):
        put(tier, [11])
    assert time.perf_counter() - started < (0.04 * 10 if known else 0.04) + 0.3
    for ask in (lambda: put(tier, [12]), lambda: tier.shares.keep() and None, lambda: tier.shares.mend(set(), tier.probe)):
        started = time.perf_counter()
        silently(ask)
        assert time.perf_counter() - started < 0.02
    server.go_on()
    wait_for(tier.tick, 5)
    mend(tier)
    assert put(tier, range(20, 23)) == [True] * 3


def silently(ask: Callable[[], object]) -> None:
    try:
        ask()
    except RemoteUnavailable:
        pass


def test_a_server_that_came_back_empty_owes_nobody(server: RedisServer) -> None:
    tier = node(server.url)
    put(tier, range(10))
    server.kill()
    with pytest.raises(RemoteUnavailable):
        put(tier, [11])
    server.start()
    wait_for(tier.tick, 5)
    mend(tier)
    assert put(tier, range(30, 40)) == [True] * 10
    assert len(there(tier, range(40))) == 10
