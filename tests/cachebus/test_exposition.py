"""The HTTP port of a cachebus and of a worker's supervisor: metrics, whether it lives, whether it is ready."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests_shared import has_ipv6, wait_for

from cachebus.daemon import Daemon
from cachebus.errors import HeadstartError
from cachebus.exposition import expose
from cachebus.metrics import SILENCE_SECONDS, BusMetrics
from cachebus.region import Region
from cachebus.settings import CacheSettings


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_what_is_not_well_is_503_and_says_why() -> None:
    problem = ["it starts"]
    port = expose("it.port", ("127.0.0.1", 0), CollectorRegistry(), lambda: "", lambda: problem[0])
    assert get(port, "/health") == (200, "ok\n")
    assert get(port, "/ready?probe=1") == (503, "it starts\n")
    problem[0] = ""
    assert get(port, "/ready") == (200, "ok\n")


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(HeadstartError, match=r"it\.port: can't listen"):
            expose("it.port", taken.getsockname(), CollectorRegistry(), lambda: "", lambda: "")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_address_of_the_other_family_works() -> None:
    assert get(expose("it.port", ("::1", 0), CollectorRegistry(), lambda: "", lambda: ""), "/health", "[::1]") == (200, "ok\n")


def test_a_cachebus_is_ready_once_it_goes_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = BusMetrics()
    port = metrics.serve("127.0.0.1", 0)
    assert get(port, "/health")[0] == 200
    assert get(port, "/ready") == (503, "the cachebus starts\n")
    region = Region.make_or_adopt(tmp_path / "region", 8 << 20, may_replace=True)
    daemon = Daemon(tmp_path, region, b"k" * 32, metrics, CacheSettings())
    thread = threading.Thread(target=daemon.run, daemon=True)
    thread.start()
    wait_for(lambda: get(port, "/ready")[0] == 200)
    assert "headstart_tier_capacity_bytes" in get(port, "/metrics")[1]
    daemon.stop()
    thread.join()
    daemon.close()
    now = metrics._heard_at + SILENCE_SECONDS + 1
    monkeypatch.setattr("cachebus.metrics.time.monotonic", lambda: now)
    assert get(port, "/health") == (503, "the cachebus does nothing, 16 s\n")
