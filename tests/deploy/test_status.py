from __future__ import annotations

import json

import pytest
from tests_shared import ANSWER_MS, Bus

from cachebus.errors import BusUnavailable
from cachebus.messages_hbm import OpenHbm, ReportHbm
from deploy import status
from deploy.settings import Settings, read_settings


@pytest.fixture
def settings(bus: Bus) -> Settings:
    return read_settings(None, [f"cache.run_dir={bus.run_dir}"], {})


def test_workers_tier_and_counters_are_shown(bus: Bus, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    bus.register("p0", "prefill", "http://127.0.0.1:9001")
    bus.register("d0", "decode", "http://127.0.0.1:9003")
    client = bus.client()
    client.call(OpenHbm("d0", bus.holder.id), ANSWER_MS)
    client.call(ReportHbm("d0", bus.holder.id, [b"k" * 32, b"l" * 32], []), ANSWER_MS)
    client.close()
    bus.store(b"k" * 32)
    assert status.run(settings, json_output=False) == 0
    text = capsys.readouterr().out
    assert "p0" in text
    assert "http://127.0.0.1:9001" in text
    assert "1 chunks" in text
    (known,) = (line for line in text.splitlines() if line.startswith("d0"))
    (unknown,) = (line for line in text.splitlines() if line.startswith("p0"))
    assert "2 chunks" in known
    assert "not known" in unknown


def test_json_is_one_object(bus: Bus, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    bus.register("d0", "decode", "http://127.0.0.1:9002", model="m")
    assert status.run(settings, json_output=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["workers"] == [
        {"worker": "d0", "role": "decode", "state": "ready", "model": "m", "url": "http://127.0.0.1:9002", "hbm_chunks": None}
    ]
    assert shown["values"]["chunks"] == 0


def test_an_empty_bus_says_so(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.run(settings, json_output=False) == 0
    assert "no worker is registered" in capsys.readouterr().out


def test_no_bus_is_an_error(tmp_path: object) -> None:
    with pytest.raises(BusUnavailable, match="headstart cachebus"):
        status.run(read_settings(None, [f"cache.run_dir={tmp_path}/none"], {}), json_output=True)
