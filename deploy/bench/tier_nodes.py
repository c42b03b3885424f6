"""Headstart's tier of other nodes: two daemons, each a process with a region of its own; one holds the chunks, the other is asked for them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from cachebus import security
from cachebus.client import BusClient
from cachebus.engine import process_tree
from cachebus.errors import BusError, HeadstartError
from cachebus.holder import Holder
from cachebus.messages import Acquire, Commit, Granted, NewEntry, Release, Reserve, Reserved, Stat, StatReply, WrittenEntry
from cachebus.messages_tools import Clear
from cachebus.ports import free_port
from cachebus.region import Region
from cachebus.settings import CacheSettings, SecuritySettings
from cachebus.table import State
from cachebus.zeromq_peers import new_pair
from deploy.bench.tier_goals import OURS
from deploy.bench.tier_lanes import LAYOUT, shared_memory
from deploy.bench.tier_values import GET, KEY_BYTES, PATIENCE_MS, Load, Subject, fill, key

_HOST = "127.0.0.1"
_ANSWER_MS = 10_000
_START_SECONDS_MAX = 30.0
_END_SECONDS_MAX = 15.0
_GET_SECONDS_MAX = 60.0
_POLL_SECONDS = 0.0005
_SPARE_BYTES = 64 << 20
_NODE_PORTS = 3
_TORN_READS_MAX = 20


class Node:
    """A daemon in a process of its own, and a client of it."""

    def __init__(self, folder: Path, region: Path, cache: CacheSettings, secured: SecuritySettings) -> None:
        folder.mkdir(mode=0o700)
        cache = msgspec.structs.replace(cache, run_dir=str(folder), region_path=str(region))
        file = folder / "headstart.yaml"
        # JSON is YAML, too.
        file.write_text(json.dumps({"cache": msgspec.to_builtins(cache), "security": msgspec.to_builtins(secured)}))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADSTART_")}
        self._log = folder / "log"
        with self._log.open("wb") as out:
            command = [sys.executable, "-m", "deploy", "cachebus", "--config", str(file)]
            self._process = process_tree.start(command, environment, stdout=out, stderr=out)
        self._await(BusClient(folder, "bench"))
        self.holder = Holder(folder)
        self.client = BusClient(folder, "bench", self.holder)
        self.digest_key = self.client.connect(_ANSWER_MS).digest_key
        self.region = Region.map(region)

    def _await(self, client: BusClient) -> None:
        deadline = time.monotonic() + _START_SECONDS_MAX
        while True:
            try:
                client.connect(500)
                client.close()
                return
            except BusError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self._process.kill()
                    raise HeadstartError(f"a cachebus did not start: {self.last_words()}") from error

    def last_words(self) -> str:
        """The end of the daemon's log."""
        return self._log.read_text(errors="replace")[-500:]

    def statistics(self) -> dict[str, float]:
        """The daemon's gauges and counters."""
        reply = self.client.call(Stat(), _ANSWER_MS)
        assert isinstance(reply, StatReply)
        return reply.values

    def store(self, load: Load) -> None:
        """Puts all chunks into the node's DRAM tier."""
        content = memoryview(bytearray(load.total))
        fill(content, load)
        wanted = [NewEntry(key(number), load.size) for number in range(load.count)]
        reserved = self.client.call(Reserve(self.holder.id, LAYOUT, wanted), _ANSWER_MS)
        if not isinstance(reserved, Reserved) or len(reserved.slots) != load.count:
            raise HeadstartError("the region has no room for the chunks")
        written = []
        for slot in reserved.slots:
            number = int.from_bytes(slot.key, "big")
            chunk = content[number * load.size : (number + 1) * load.size]
            self.region.data[slot.offset : slot.offset + load.size] = chunk
            written.append(WrittenEntry(slot.slot, slot.generation, blake3(chunk, key=self.digest_key).digest()))
        self.client.submit(Commit(self.holder.id, written))

    def close(self) -> None:
        """Ends the daemon."""
        self.region.close()
        self.client.close()
        self.holder.close()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS_MAX)
        process_tree.kill_tree(self._process)


def pulled(node: Node, load: Load) -> dict[str, float]:
    """Has a node pull all chunks from its peer: bytes per second from the question to the last chunk that was checked and committed there.

    Raises HeadstartError where a chunk does not come, or does not come from the peer.
    """
    started = time.perf_counter()
    request = Acquire(node.holder.id, LAYOUT, [key(number) for number in range(load.count)], 2000)
    granted = node.client.call(request, _ANSWER_MS)
    if not isinstance(granted, Granted) or len(granted.extents) != load.count or {e.source for e in granted.extents} != {"peer"}:
        raise HeadstartError("the chunks were not all granted from the peer")
    for extent in granted.extents:
        if not _committed(node.region, extent.slot, started + _GET_SECONDS_MAX):
            raise HeadstartError(f"a chunk of the peer did not come: {node.last_words()}")
    seconds = time.perf_counter() - started
    last = granted.extents[-1].offset
    if node.region.data[last : last + KEY_BYTES] != granted.extents[-1].key:
        raise HeadstartError("the peer's bytes are not those that were stored there")
    node.client.submit(Release([granted.lease]))
    node.client.call(Clear(["dram"]), _ANSWER_MS)
    return {GET: load.total / seconds}


def _committed(region: Region, slot: int, deadline: float) -> bool:
    """Waits until a record says what became of the chunk. One that can't be read is just being written, unless that stays so."""
    torn = 0
    while time.perf_counter() < deadline and torn < _TORN_READS_MAX:
        record = region.table.record(slot)
        if record is not None and record.state != State.RESERVED:
            return record.state == State.COMMITTED
        torn = torn + 1 if record is None else 0
        time.sleep(_POLL_SECONDS)
    return False


@contextlib.contextmanager
def subjects(load: Load) -> Iterator[list[Subject]]:
    """The tier of other nodes: without keys, as on one machine, and with CURVE on the bytes too."""
    with two_nodes(load, keys=False) as plain, two_nodes(load, keys=True) as curve:
        streams = {GET: CacheSettings().peer_streams}
        yield [Subject(OURS, "peer", streams, plain), Subject(OURS, "peer, CURVE", streams, curve)]


@contextlib.contextmanager
def two_nodes(load: Load, *, keys: bool) -> Iterator[Callable[[], dict[str, float]]]:
    """A node that holds the chunks and one that knows it; gives what has the second pull them."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headstart-bench-")))
        secured = list(_secured(folder, keys=keys))
        base = CacheSettings(max_local_cpu_size=(1.02 * load.total + _SPARE_BYTES) / 1e9, peer_timeout_ms=PATIENCE_MS)
        ports = [free_port(_HOST, _NODE_PORTS), 0]
        caches = [
            msgspec.structs.replace(base, node_port=ports[0]),
            msgspec.structs.replace(base, peers=[f"{'first@' if keys else ''}{_HOST}:{ports[0]}"]),
        ]
        nodes = []
        for number in range(2):
            node = Node(folder / str(number), stack.enter_context(shared_memory()), caches[number], secured[number])
            stack.callback(node.close)
            nodes.append(node)
        nodes[0].store(load)
        deadline = time.monotonic() + _START_SECONDS_MAX
        while nodes[1].statistics().get("peer_chunks", 0) < load.count:
            if time.monotonic() > deadline:
                raise HeadstartError("the nodes do not find each other")
            time.sleep(0.05)
        yield lambda: pulled(nodes[1], load)


def _secured(folder: Path, *, keys: bool) -> Iterator[SecuritySettings]:
    if not keys:
        shared = folder / "digest.key"
        shared.write_bytes(secrets.token_bytes(security.DIGEST_KEY_BYTES))
        shared.chmod(0o600)
        yield from [SecuritySettings(digest_key_file=str(shared))] * 2
        return
    security.begin(folder / "keys")
    for name in ("first", "second"):
        security.add(folder / "keys", name, "node", new_pair)
    for name in ("first", "second"):
        yield SecuritySettings(keys_dir=str(folder / "keys" / name))
