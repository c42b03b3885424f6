"""The command: measures, checks, and shows what was found."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from cachebus.errors import BusError
from cachebus.peer_places import peer_addresses
from deploy.doctor import (
    check_disk,
    check_keys,
    check_machine,
    check_peers,
    check_redis,
    check_workers,
    measure_bus,
    measure_disk,
    measure_keys,
    measure_machine,
    measure_redis,
)
from deploy.doctor.facts import BusFacts, DiskSpeed, PeerFacts, RedisFacts
from deploy.doctor.finding import Finding, gigabytes, skipped
from deploy.settings import Settings

_NO_BUS = "no cachebus runs"


def run(settings: Settings, *, json_output: bool) -> int:
    """0 where nothing is bad, else 1. Progress goes to stderr."""
    found = diagnose(settings, os.environ)
    counts = Counter(finding.verdict for finding in found)
    if json_output:
        print(json.dumps({"findings": [asdict(finding) for finding in found], **{verdict: counts[verdict] for verdict in ("bad", "warn")}}))
    else:
        _show(found)
        print(f"\n{counts['bad']} bad, {counts['warn']} to look at, {counts['ok']} ok, {counts['skipped']} skipped")
    return 1 if counts["bad"] else 0


def diagnose(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """All findings, in the order in which they are shown."""
    cache, security = settings.cache, settings.security
    run_dir = cache.resolved_run_dir(environ)
    _say(f"asking the cachebus at {run_dir}")
    bus, bus_findings = _bus(run_dir)
    key = measure_keys.digest_key(cache, security, run_dir)
    redis = _measured_redis(settings)
    given = bool(security.digest_key_file or security.keys_dir)
    own_key_id = bus.key_id if bus else measure_keys.digest_key_id(key)
    peers, peer_findings = _peers(settings, own_key_id)
    return [
        *bus_findings,
        *_machine(settings, environ),
        *_disk(settings),
        *_redis(settings, redis),
        check_keys.digest_key(key, given=given, shares=bool(cache.remote_url or cache.peers)),
        check_keys.keys_folder(measure_keys.keys_folder(security)),
        *_workers(settings, bus, peers, redis),
        *peer_findings,
    ]


def _bus(run_dir: Path) -> tuple[BusFacts | None, list[Finding]]:
    try:
        return measure_bus.bus(run_dir), []
    except BusError as error:
        return None, [Finding("cachebus", "bad", str(error), "run one version of Headstart on all nodes")]


def _machine(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    wanted, limits = int(settings.cache.max_local_cpu_size * 1e9), measure_machine.limits()
    memory = measure_machine.shared_memory(settings.cache.resolved_region_path(environ))
    return [check_machine.shared_memory(memory, wanted), check_machine.open_files(limits), check_machine.locked_memory(limits, wanted)]


def _disk(settings: Settings) -> list[Finding]:
    if not settings.cache.local_disk:
        return [skipped(check_disk.SPEED, "cache.local_disk is not set")]
    folder, wanted = Path(settings.cache.local_disk).absolute(), int(settings.cache.max_local_disk_size * 1e9)
    try:
        place = measure_disk.place(folder)
    except OSError as error:
        return [check_disk.speed(DiskSpeed(error=f"{folder}: {error.strerror}"))]
    size = measure_disk.file_bytes(wanted, place.free)
    _say(f"writing and reading {gigabytes(size)} in {folder}")
    return [check_disk.file_system(place), check_disk.space(place, wanted), check_disk.speed(measure_disk.speed(folder, size))]


def _measured_redis(settings: Settings) -> RedisFacts | None:
    if not settings.cache.remote_url:
        return None
    _say("writing to and reading from the shared tier")
    return measure_redis.measure(settings.cache)


def _redis(settings: Settings, facts: RedisFacts | None) -> list[Finding]:
    if facts is None:
        return [skipped(check_redis.REDIS, "cache.remote_url is not set")]
    return check_redis.redis(facts, settings.cache.remote_timeout_ms, settings.cache.remote_ttl_seconds)


def _workers(settings: Settings, bus: BusFacts | None, peers: Sequence[PeerFacts], redis: RedisFacts | None) -> list[Finding]:
    own = bus.workers if bus else {}
    everybody = {**own, **{name: worker for peer in peers for name, worker in peer.workers.items()}}
    size = check_workers.chunk_size(settings.cache.chunk_size, settings.model.max_model_len, own)
    agree = check_workers.agree(everybody) if bus or everybody else skipped(check_workers.AGREE, _NO_BUS)
    if bus is None:
        return [agree, skipped(check_workers.FIT, _NO_BUS), size]
    shared = {"redis": float(redis.maxmemory)} if redis and redis.maxmemory else {}
    return [agree, check_workers.fit(own, {**bus.capacities, **shared}), size]


def _peers(settings: Settings, own_key_id: bytes) -> tuple[list[PeerFacts], list[Finding]]:
    if not settings.cache.peers:
        return [], [skipped("peers", "cache.peers is not set")]
    try:
        addresses = peer_addresses(settings.cache, settings.security)
    except BusError as error:
        return [], [Finding("peers", "bad", str(error), "the cachebus does not start so")]
    _say(f"asking {len(addresses)} other nodes")
    found = measure_bus.peers(addresses)
    return found, [check_peers.peer(facts, own_key_id, settings.cache.peer_timeout_ms) for facts in found]


def _show(found: Sequence[Finding]) -> None:
    width = max(len(finding.check) for finding in found)
    print(f"{'check':{width}} {'verdict':8} measured, and what to change")
    for finding in found:
        print(f"{finding.check:{width}} {finding.verdict:8} {finding.measured}")
        if finding.advice:
            print(f"{'':{width}} {'':8} -> {finding.advice}")


def _say(text: str) -> None:
    print(f"headstart: {text} ...", file=sys.stderr, flush=True)
