"""``headstart cache`` on a bus that runs."""

from __future__ import annotations

import json

import pytest
from tests_shared import Bus

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
