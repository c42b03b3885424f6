"""Redis in the forms that several files of tests need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_forms import Certificates, RedisCluster, Watched


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path / "certificates")


@pytest.fixture(params=["plain", "tls"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, certificates: Certificates) -> Iterator[RedisCluster]:
    made = RedisCluster(tmp_path, certificates if request.param == "tls" else None)
    yield made
    made.stop()


@pytest.fixture
def plain_cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    made = RedisCluster(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path, "open sesame")
    yield made
    made.stop()
