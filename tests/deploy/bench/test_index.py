"""The index benchmark: what it fills is what it says, and what it measures is printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.bench import index
from deploy.cli import main
from router.costs import NEAREST_FIRST


def test_the_index_holds_what_it_says() -> None:
    keys, replica = index.filled(3000, 2)
    assert replica.nearest_tiers(keys, NEAREST_FIRST) == ["dram"] * 3000
    assert replica.tiers(keys[0]) == {"dram", "nvme"}
    assert replica.tiers(keys[1000]) == {"dram"}
    assert replica.hbm_prefixes(keys[:100]) == {"decode-0": 30, "decode-1": 0}
    assert replica.hbm_prefixes(keys[30:100]) == {"decode-0": 0, "decode-1": 30}


def test_it_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "index.json"
    arguments = ["bench", "index", "--chunks", "2000", "--prompt-chunks", "64", "--workers", "2", "--runs", "2", "--output", str(output)]
    assert main(arguments) == 0
    assert "chunks a second" in capsys.readouterr().out
    rows = {row["case"]: row for row in json.loads(output.read_text())["rows"]}
    assert set(rows) == {"tiers, 2,000 chunks", "HBM of 2 workers, 2,000 chunks", "index, 2,000 chunks"}
    assert rows["tiers, 2,000 chunks"]["runs"] == 2
    assert rows["tiers, 2,000 chunks"]["median"] > 10_000


def test_a_prompt_longer_than_the_index_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "index", "--chunks", "10", "--prompt-chunks", "11"]) == 2
    assert "no prompt longer than the index" in capsys.readouterr().err
