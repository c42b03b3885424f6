"""The command ``headstart sim``: workers without a model, many of them in one process if wished."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import uvloop

from cachebus.client import BusClient
from cachebus.engine.worker_process import EXIT_DRAINED, EXIT_ENGINE_DIED
from cachebus.errors import SettingsError
from cachebus.region import Region
from cachebus.settings import WorkerSettings
from deploy.settings import Settings
from deploy.sim.engine import EngineSpec
from deploy.sim.profile import Profile, read_profile
from deploy.sim.worker import BUS_MS_MAX, Place, SimulatedWorker

log = logging.getLogger("headstart.sim")

_WATCH_SECONDS = 0.2
_TURN_SECONDS = 0.0005
"""How long one of the many threads keeps the interpreter while another waits for it."""


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Runs ``options.workers`` workers until SIGTERM or SIGINT; returns the exit code. Raises HeadstartError where they can't start."""
    pool: WorkerSettings = settings.prefill if options.role == "prefill" else settings.decode
    profile = read_profile(options.profile)
    _check(settings, options, profile)
    names = worker_names(options.name or f"sim-{options.role}-{socket.gethostname()}-{os.getpid()}", options.workers)
    run_dir = settings.cache.resolved_run_dir(os.environ)
    verify = settings.security.verify_digests
    specs = [EngineSpec(name, options.role, run_dir, profile, options.speed, settings.cache, verify) for name in names]
    _raise_open_files()
    sys.setswitchinterval(_TURN_SECONDS)
    code: int = uvloop.run(_serve(specs, Place(pool.host, options.port, pool.drain_seconds_max), _region(run_dir)))
    return code


def worker_names(first: str, count: int) -> list[str]:
    """A name for each worker: the one given, with a number where there are several."""
    return [first] if count == 1 else [f"{first}-{number}" for number in range(count)]


async def _serve(specs: list[EngineSpec], place: Place, region: Region) -> int:
    ending, forced = asyncio.Event(), asyncio.Event()

    def asked_to_end() -> None:
        (forced if ending.is_set() else ending).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end)
    workers = []
    for spec in specs:
        worker = SimulatedWorker(spec, place, region)
        await worker.start()
        workers.append(worker)
    while not ending.is_set():
        if any(worker.failed for worker in workers):
            log.error("an engine died: ending this process")
            return EXIT_ENGINE_DIED
        try:
            await asyncio.wait_for(ending.wait(), _WATCH_SECONDS)
        except TimeoutError:
            continue
    log.info("%d workers drain: running requests may take %d s", len(workers), place.drain_seconds_max)
    await asyncio.gather(*(worker.drain(forced) for worker in workers))
    return EXIT_DRAINED


def _region(run_dir: Path) -> Region:
    """The node's region, mapped once for all workers of the process. Raises BusUnavailable, RegionError."""
    client = BusClient(run_dir, "sim")
    try:
        return Region.map(Path(client.connect(BUS_MS_MAX).region_path))
    finally:
        client.close()


def _check(settings: Settings, options: argparse.Namespace, profile: Profile) -> None:
    if options.workers < 1:
        raise SettingsError(f"--workers {options.workers}: give at least 1")
    if options.workers > 1 and options.port:
        raise SettingsError(f"--port: {options.workers} workers can't share port {options.port}")
    if not options.speed > 0:
        raise SettingsError(f"--speed {options.speed}: give more than 0")
    if settings.cache.chunk_size % profile.block_size:
        raise SettingsError(f"cache.chunk_size {settings.cache.chunk_size} is no multiple of the profile's block_size {profile.block_size}")


def _raise_open_files() -> None:
    """Each worker has a port, a region and seven connections to the bus: some eighty files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
