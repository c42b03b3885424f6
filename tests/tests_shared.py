"""What tests of several packages share: a bus that really runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cachebus.client import BusClient
from cachebus.daemon import Daemon
from cachebus.holder import Holder
from cachebus.messages import Commit, NewEntry, RegisterEngine, RegisterWorker, Reserve, Reserved, Snapshot, SnapshotReply, WrittenEntry
from cachebus.metrics import BusMetrics
from cachebus.region import Region
from cachebus.settings import CacheSettings, SecuritySettings

LAYOUT = b"l" * 16
NAMESPACE = b"n" * 32
REGION_BYTES = 8 << 20
ANSWER_MS = 3000
DIGEST_KEY = b"k" * 32


class Bus:
    """A daemon in a thread, which can be ended and started again over its region."""

    def __init__(
        self,
        run_dir: Path,
        cache: CacheSettings = CacheSettings(),  # noqa: B008
        security: SecuritySettings = SecuritySettings(),  # noqa: B008
    ) -> None:
        self.run_dir = run_dir
        self.cache, self.security = cache, security
        self.digest_key = DIGEST_KEY
        self.holder = Holder(run_dir)
        self.start()

    def start(self) -> None:
        region = Region.make_or_adopt(self.run_dir / "region", REGION_BYTES, may_replace=True)
        self.daemon = Daemon(self.run_dir, region, self.digest_key, BusMetrics(), self.cache, self.security)
        # A test that fails may leave it running: the tests end all the same.
        self._thread = threading.Thread(target=self.daemon.run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.daemon.stop()
        self._thread.join()
        self.daemon.close()

    def client(self, holder: Holder | None = None) -> BusClient:
        return BusClient(self.run_dir, "test", holder)

    def snapshot(self) -> SnapshotReply:
        client = self.client()
        reply = client.call(Snapshot(), ANSWER_MS)
        client.close()
        assert isinstance(reply, SnapshotReply)
        return reply

    def store(self, *keys: bytes) -> None:
        client = self.client()
        reserved = client.call(Reserve(self.holder.id, LAYOUT, [NewEntry(key, 4096) for key in keys]), ANSWER_MS)
        assert isinstance(reserved, Reserved)
        client.submit(Commit(self.holder.id, [WrittenEntry(s.slot, s.generation, b"d" * 32) for s in reserved.slots]))
        wait_for(lambda: self.daemon.statistics()["writing"] == 0)
        client.close()

    def register_engine(self, worker: str, role: str, model: str = "m", **differing: str) -> None:
        client = self.client(self.holder)
        client.connect(ANSWER_MS)
        parts = {"weights": "w", **differing}
        engine = RegisterEngine(worker, role, self.holder.id, model, NAMESPACE, parts, LAYOUT, {"block size": "16"}, 16, 256, 4096)  # type: ignore[arg-type]
        client.call(engine, ANSWER_MS)
        client.close()

    def register(self, worker: str, role: str, url: str, model: str = "m", *, takes_ids: bool = True, adapters: dict[str, str] | None = None) -> None:
        self.register_engine(worker, role, model)
        client = self.client(self.holder)
        client.call(RegisterWorker(worker, role, self.holder.id, url, model, 8192, takes_ids, adapters or {}), ANSWER_MS)  # type: ignore[arg-type]
        client.close()


def has_ipv6() -> bool:
    """Whether there is a loopback of that family: containers are often without."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Returns once the condition holds; fails where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
