"""A tier behind a slow link: a prompt that would be pulled from it later than it is computed is computed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from offline_node import OfflineNode, offline_node
from redis_server import RedisServer
from tests_shared import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
LINK_BYTES_A_SECOND = 1 << 20
TOKENS = 1500
SEEDS = (1, 2, 3)
OPTIONS = {"dtype": "float32", "max_model_len": 2048, "disable_hybrid_kv_cache_manager": True}


class SlowLink:
    """Passes TCP connections on to ``port``; what the server says comes at ``LINK_BYTES_A_SECOND`` once ``slow``."""

    def __init__(self, port: int) -> None:
        self._server = port
        self.slow = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
            except OSError:
                return
            for source, target, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(source, target, answers), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if answers and self.slow:
                    time.sleep(len(data) / LINK_BYTES_A_SECOND)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, target):
                one.close()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SlowLink]:
    server = RedisServer(tmp_path)
    link = SlowLink(server.port)
    yield link
    link.close()
    server.stop()


def test_a_slow_tier_is_left_alone_once_it_is_known_to_be_slow(link: SlowLink, tmp_path: Path) -> None:
    settings = [f"cache.remote_url=redis://127.0.0.1:{link.port}/0", "cache.remote_timeout_ms=5000", "cache.promote_ms_max=5000"]
    with offline_node(0.5, tmp_path, OPTIONS, {"VLLM_CPU_KVCACHE_SPACE": "1"}, settings) as node:
        first = node.engine("first")
        cold = [first.ask(seed, TOKENS, 4) for seed in SEEDS]
        written_to_redis(node)
        first.stop()
        empty_dram(node)

        second = node.engine("second")
        for seed in (11, 12):
            second.ask(seed, TOKENS, 4)
        fast = second.ask(SEEDS[0], TOKENS, 4)
        assert fast.cached > TOKENS // 2, "over a fast link the same tier is used"
        assert fast.token_ids == cold[0].token_ids
        link.slow = True
        tried = second.ask(SEEDS[1], TOKENS, 4)
        assert tried.token_ids == cold[1].token_ids
        assert tried.seconds > 2 * fast.seconds, "the control: the link is slow"
        known = second.ask(SEEDS[2], TOKENS, 4)
        assert known.token_ids == cold[2].token_ids
        assert known.cached == 0
        assert known.seconds < tried.seconds
        second.stop()


def written_to_redis(node: OfflineNode) -> None:
    wait_for(lambda: node.statistics()["redis_chunks"] >= len(SEEDS) * (TOKENS // 256), seconds=20)


def empty_dram(node: OfflineNode) -> None:
    node.cluster.stop()
    node.settings.cache.resolved_region_path({}).unlink()
    node.cluster.start_bus(print)
