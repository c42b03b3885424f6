"""``headstart cache`` on a bus that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from redis_server import RedisServer
from tests_shared import DIGEST_KEY, Bus, wait_for

from cachebus.chunk import key_id
from cachebus.messages_tools import CHUNKS_MAX
from cachebus.settings import CacheSettings
from deploy.cli import main


def cache(bus: Bus, *arguments: str) -> int:
    return main(["cache", *arguments, "--set", f"cache.run_dir={bus.run_dir}"])


def test_the_tiers_and_the_chunks_are_shown(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.store(b"a" * 32, b"b" * 32)
    assert cache(bus, "stat") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:2] == ["dram", "answers"]
    assert shown[2].split()[:4] == ["nvme", "not", "in", "use"]
    assert cache(bus, "ls", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["key"] for row in found["chunks"]} == {"61" * 32, "62" * 32}
    assert cache(bus, "ls", "--limit", "1") == 0
    assert "1 of 2 chunks; --limit 0 shows all" in capsys.readouterr().out


def test_a_pinned_chunk_says_so_and_a_cleared_tier_is_empty(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.store(b"a" * 32, b"b" * 32)
    assert cache(bus, "pin", "6161") == 0
    assert cache(bus, "ls") == 0
    assert "pinned" in capsys.readouterr().out.split("\n", 1)[1]
    assert cache(bus, "unpin", "6161") == 0
    assert cache(bus, "clear", "dram", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"dropped": 2}
    assert cache(bus, "ls", "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"] == 0


def test_a_key_that_is_not_there_is_named(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache(bus, "pin", "beef") == 2
    assert "'beef' is the beginning of 0 chunks' keys" in capsys.readouterr().err


def test_more_chunks_than_a_page_holds_are_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {n.to_bytes(4, "big") * 8 for n in range(2 * CHUNKS_MAX + 5)}
    server = RedisServer(tmp_path)
    bus = Bus(tmp_path, CacheSettings(remote_url=server.url))
    try:
        server.client.mset({f"headstart:1:{key_id(DIGEST_KEY).hex()}:{{{key.hex()}}}": b"" for key in keys})
        bus.stop()
        bus.start()
        wait_for(lambda: bus.daemon.statistics().get("redis_chunks") == len(keys))
        assert cache(bus, "ls", "--limit", "0", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["total"] == len(keys)
        assert {bytes.fromhex(row["key"]) for row in found["chunks"]} == keys
        assert cache(bus, "pin", max(keys).hex()) == 0, "a key of the last page is known"
    finally:
        bus.stop()
        bus.holder.close()
        server.stop()
