"""What the host can do, by tools that owe nothing to Headstart: fio on the disk, redis-benchmark on the server, a bare ZeroMQ stream."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachebus.below import DISK_READERS, DISK_WRITERS
from cachebus.engine import process_tree
from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from cachebus.redis_names import PART_BYTES
from cachebus.resp import Line, command_parts
from cachebus.settings import CacheSettings
from cachebus.zeromq_peers import PIECE_BYTES
from deploy.bench.tier_goals import FIO, REDIS_BENCHMARK, ZEROMQ, ZEROMQ_OWN_MEMORY
from deploy.bench.tier_values import GET, PUT, Load, Subject

_HOST = "127.0.0.1"
_SECONDS_MAX = 300.0
_START_SECONDS_MAX = 10.0
_WRITERS = 2
"""Connections that redis-benchmark writes by, beside one: more than the tier has, since its best counts."""


def fio(load: Load, folder: Path) -> list[Subject]:
    """The disk under ``folder``: a block a chunk, O_DIRECT, as many jobs as the tier has threads. Nothing where fio is missing."""
    if not shutil.which("fio"):
        return []

    def measure() -> dict[str, float]:
        found = {}
        for metric, kind, jobs in ((PUT, "write", DISK_WRITERS), (GET, "read", DISK_READERS)):
            share = load.total // jobs // load.size * load.size
            command = ["fio", "--name=tier", f"--filename={folder / 'fio'}", f"--rw={kind}", f"--bs={load.size}", f"--size={share}"]
            command += [f"--offset_increment={share}", f"--numjobs={jobs}", "--thread", "--ioengine=psync", "--direct=1"]
            found[metric] = fio_speed(output_of([*command, "--group_reporting", "--output-format=json"]), kind)
        return found

    return [Subject(FIO, "nvme", {PUT: DISK_WRITERS, GET: DISK_READERS}, measure)]


def fio_speed(text: str, kind: str) -> float:
    """Bytes per second of ``kind`` (read or write) out of fio's JSON, before which it may have warned."""
    return float(json.loads(text[text.index("{") :])["jobs"][0][kind]["bw_bytes"])


def redis_benchmark(load: Load, host: str, port: int) -> list[Subject]:
    """The server with values of the size that the tier gives it, by one connection and by as many as the tier has. Nothing without the tool."""
    if not shutil.which("redis-benchmark"):
        return []
    size = min(load.size, PART_BYTES)
    count = max(1, load.total // size)
    many = CacheSettings().remote_connections
    _set_all(host, port, size, count)

    def one(connections: dict[str, int]) -> Subject:
        def measure() -> dict[str, float]:
            found = {}
            for metric, test in ((PUT, "set"), (GET, "get")):
                command = ["redis-benchmark", "-h", host, "-p", str(port), "-t", test, "-d", str(size), "-n", str(count), "-r", str(count)]
                found[metric] = size * redis_rate(output_of([*command, "-c", str(connections[metric]), "--csv"]), test)
            return found

        return Subject(REDIS_BENCHMARK, "redis", connections, measure)

    return [one({PUT: 1, GET: 1}), one({PUT: _WRITERS, GET: many})]


def redis_rate(text: str, test: str) -> float:
    """Requests per second of ``test`` (set or get) out of redis-benchmark's CSV."""
    for line in csv.reader(text.splitlines()):
        if line and line[0] == test.upper():
            return float(line[1])
    raise HeadstartError(f"redis-benchmark says nothing of {test}: {text[:200]!r}")


def _set_all(host: str, port: int, size: int, count: int) -> None:
    """Makes every key that redis-benchmark may ask for: what is not there is answered at once and would count as bytes."""
    payload = bytes(size)
    with socket.create_connection((host, port)) as connected:
        line = Line(connected, connected.close, _START_SECONDS_MAX)
        for number in range(count):
            line.send(command_parts([b"SET", b"key:%012d" % number, payload]))
            if error := line.receive_status():
                raise HeadstartError(f"the server takes no values: {error}")


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """A redis-server of the benchmark's own, with nothing on disk; gives its port."""
    program = shutil.which("redis-server")
    if not program:
        raise HeadstartError("there is no redis-server: `apt-get install redis-server`, or name a server that runs with --redis-url")
    port = free_port(_HOST)
    command = [program, "--port", str(port), "--bind", _HOST, "--save", "", "--appendonly", "no", "--dir", str(folder)]
    server = process_tree.start(command, {}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_SECONDS_MAX
        while True:
            try:
                socket.create_connection((_HOST, port)).close()
                break
            except OSError as error:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise HeadstartError("redis-server did not start") from error
                time.sleep(0.02)
        yield port
    finally:
        server.kill()
        server.wait()


def zeromq_streams(load: Load) -> list[Subject]:
    """PUSH to PULL between two processes in frames as large as a peer's pieces, by one stream and by as many as the tier has.

    From one buffer into one, which the caches hold, and from memory as large as the load's into as much, as chunks lie.
    """
    size = min(load.size, PIECE_BYTES)
    many = CacheSettings().peer_streams

    def one(system: str, case: str, streams: int, how: Sequence[str]) -> Subject:
        frames = max(1, load.total // size // streams)
        command = [sys.executable, "-m", "deploy.bench.zeromq_stream", str(size), str(frames), str(streams), *how]
        return Subject(system, case, {GET: streams}, lambda: {GET: float(output_of(command))})

    kinds = ((ZEROMQ, "peer", ("plain", "one")), (ZEROMQ_OWN_MEMORY, "peer", ("plain", "own")), (ZEROMQ, "peer, CURVE", ("curve", "one")))
    return [one(system, case, streams, how) for system, case, how in kinds for streams in dict.fromkeys((1, many))]


def output_of(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a tool says on stdout. Raises HeadstartError where it fails."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=_SECONDS_MAX)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HeadstartError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise HeadstartError(f"{' '.join(command[:6])}...: exit code {done.returncode}: {(done.stderr or done.stdout)[-600:]}")
    return done.stdout
