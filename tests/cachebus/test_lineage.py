"""A worker that comes with another namespace than that of the chunks held is named in the log, over restarts of worker and cachebus, too."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
from tests_shared import ANSWER_MS, LAYOUT, NAMESPACE, Bus

from cachebus.errors import Refused
from cachebus.lineage import Lineage
from cachebus.messages import Leave, RegisterEngine
from cachebus.settings import CacheSettings

KEY = b"c" * 32


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def engine(weights: str = "w", namespace: bytes = NAMESPACE, worker: str = "d1", model: str = "m") -> RegisterEngine:
    return RegisterEngine(worker, "decode", "h", model, namespace, {"weights": weights}, LAYOUT, {"block size": "16"}, 16, 256, 4096)


def register(bus: Bus, weights: str, namespace: bytes) -> None:
    """A worker ends, and starts again."""
    client = bus.client(bus.holder)
    client.connect(ANSWER_MS)
    client.call(Leave("d1"), ANSWER_MS)
    client.call(msgspec.structs.replace(engine(weights, namespace), holder=bus.holder.id), ANSWER_MS)
    client.close()


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_the_log_says_whether_what_is_held_can_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, disk: bool, restarted: bool) -> None:
    cache = CacheSettings(local_disk=str(tmp_path / "disk"), max_local_disk_size=0.02) if disk else CacheSettings()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    bus = Bus(run_dir, cache)
    register(bus, "w", NAMESPACE)
    bus.store(KEY)
    assert "than before" not in caplog.text

    def again(weights: str, namespace: bytes) -> str:
        if restarted:
            bus.stop()
            bus.start()
        caplog.clear()
        register(bus, weights, namespace)
        return caplog.text

    assert ("as before: it can read what is held" in again("w", NAMESPACE)) == restarted
    said = again("new", b"o" * 32)
    assert "d1 serves 'm' otherwise than before" in said
    assert "weights was w and is new" in said
    assert "(0 chunks" not in said
    assert "than before" not in again("new", b"o" * 32)
    bus.stop()


def test_who_is_refused_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bus = Bus(tmp_path)
    bus.register_engine("d1", "decode")
    with pytest.raises(Refused, match="disagree"):
        bus.register_engine("d2", "decode", weights="other")
    register(bus, "w", NAMESPACE)
    assert "than before" not in caplog.text
    bus.stop()


def test_models_are_told_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lineage = Lineage(tmp_path)
    lineage.register(engine(model="one"), 1)
    lineage.register(engine("other", b"o" * 32, model="two"), 1)
    assert "before" not in caplog.text
    lineage.register(engine("new", b"x" * 32, model="two"), 1)
    assert "serves 'two' otherwise" in caplog.text


def test_the_same_weights_that_lie_otherwise_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lineage = Lineage(tmp_path)
    lineage.register(engine(), 1)
    lineage.register(msgspec.structs.replace(engine(), layout=b"m" * 16, layout_parts={"block size": "32"}), 1)
    assert "block size was 16 and is 32" in caplog.text


@pytest.mark.parametrize("damage", ["garbage", "a folder"])
def test_a_file_that_is_not_right_costs_a_line_only(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    if damage == "garbage":
        (tmp_path / "engines.json").write_bytes(b"{")
    else:
        (tmp_path / "engines.json").mkdir()
    lineage = Lineage(tmp_path)
    assert "can't be read" in caplog.text
    lineage.register(engine(), 0)
    assert ("can't be written" in caplog.text) == (damage == "a folder")
