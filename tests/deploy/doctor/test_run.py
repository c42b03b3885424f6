"""The command as people and programs see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peer_nodes import Nodes
from tests_shared import Bus

from cachebus import security
from cachebus.zeromq_peers import new_pair
from deploy import cli
from deploy.doctor import measure_disk


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the developer's own, and a file that is written in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_disk, "FILE_BYTES_MAX", 2 * measure_disk.PIECE_BYTES)


def doctor(capsys: pytest.CaptureFixture[str], *settings: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit code, findings by check, and what went to stderr."""
    code = cli.main(["doctor", "--json", *(part for setting in settings for part in ("--set", setting))])
    said = capsys.readouterr()
    shown = json.loads(said.out)
    assert shown["bad"] == sum(finding["verdict"] == "bad" for finding in shown["findings"])
    assert code == (1 if shown["bad"] else 0)
    return code, {finding["check"]: finding for finding in shown["findings"]}, said.err


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "disk"
    settings = [f"cache.run_dir={tmp_path / 'none'}", f"cache.local_disk={folder}", "cache.max_local_disk_size=0.1", "cache.max_local_cpu_size=0.01"]
    cli.main(["doctor", *(part for setting in settings for part in ("--set", setting))])
    said = capsys.readouterr()
    assert "disk speed" in said.out
    assert "chunks fit tiers skipped  no cachebus runs" in said.out
    assert said.out.splitlines()[-1].endswith("skipped")
    assert str(folder) in said.err
    assert not folder.exists()


def test_what_is_bad_fails_and_what_is_only_suspicious_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = f"cache.run_dir={tmp_path / 'none'}"
    code, found, said = doctor(capsys, none, "cache.max_local_cpu_size=0.01", "model.max_model_len=200000")
    assert found["chunk size"]["verdict"] == "warn"
    assert code == 0
    assert "headstart: asking the cachebus" in said
    code, found, _ = doctor(capsys, none, "cache.max_local_cpu_size=1000000")
    assert found["shared memory"]["verdict"] == "bad"
    assert code == 1


def test_a_disk_without_room_and_a_redis_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = [f"cache.local_disk={tmp_path / 'disk'}", "cache.max_local_disk_size=10000000"]
    code, found, _ = doctor(capsys, f"cache.run_dir={tmp_path / 'none'}", *disk, f"cache.remote_url=unix://{tmp_path}/none.sock")
    assert code == 1
    assert found["disk space"]["verdict"] == found["redis"]["verdict"] == "bad"
    assert found["disk speed"]["verdict"] != "skipped"


def test_a_running_bus_is_asked(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    bus.register("d0", "decode", "http://127.0.0.1:9001")
    _, found, _ = doctor(capsys, f"cache.run_dir={bus.run_dir}", "cache.max_local_cpu_size=0.01")
    assert found["workers agree"]["measured"] == "1 of m: block size 16, chunk size 256"
    assert found["chunks fit tiers"]["verdict"] == "ok"
    assert found["chunk size"]["measured"] == "256 tokens, contexts of up to 8192"


def test_workers_of_other_nodes_are_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = Nodes(tmp_path, 2, keys=True)
    try:
        own, other = nodes.buses
        own.register("d0", "decode", "http://127.0.0.1:9001")
        other.register("d1", "decode", "http://127.0.0.1:9002")
        settings = [f"cache.run_dir={own.run_dir}", f"cache.peers={json.dumps(own.cache.peers)}", f"security.keys_dir={own.security.keys_dir}"]
        _, found, _ = doctor(capsys, *settings)
        assert found["workers agree"]["verdict"] == found["peer 1"]["verdict"] == found["keys folder"]["verdict"] == "ok"
        other.register_engine("d2", "decode", "m2", **{"KV dtype": "fp8"})
        other.register_engine("d1", "decode", "m", **{"KV dtype": "fp8"})
        code, found, _ = doctor(capsys, *settings)
        assert found["workers agree"]["verdict"] == "ok", "what one does not tell is not compared"
        own.register_engine("d0", "decode", "m", **{"KV dtype": "auto"})
        code, found, _ = doctor(capsys, *settings)
        assert found["workers agree"]["measured"] == "KV dtype is auto in d0 but fp8 in d1 of 1"
        assert code == 1
    finally:
        nodes.stop()


def test_a_peer_without_a_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    security.begin(tmp_path / "keys")
    own = security.add(tmp_path / "keys", "a", "node", new_pair)
    settings = [f"cache.run_dir={tmp_path / 'none'}", "cache.peers=[b@127.0.0.1:9]", f"security.keys_dir={own}"]
    code, found, _ = doctor(capsys, *settings)
    assert code == 1
    assert "no key of 'b'" in found["peers"]["measured"]
    (own / "own.secret").chmod(0o644)
    _, found, _ = doctor(capsys, *settings)
    assert "chmod 600" in found["keys folder"]["advice"]
