"""Runs a cachebus as a process of its own: one a node, until a signal."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import signal
import threading
from pathlib import Path
from types import FrameType

from cachebus import holder
from cachebus.daemon import Daemon
from cachebus.errors import BusError, RegionError
from cachebus.metrics import BusMetrics
from cachebus.region import Region
from cachebus.security import DIGEST_KEY_BYTES, Keyring
from cachebus.service_manager import tell_ready
from cachebus.settings import CacheSettings, SecuritySettings

log = logging.getLogger("headstart.cachebus")


def run(cache: CacheSettings, security: SecuritySettings) -> int:
    """Runs a daemon until SIGTERM or SIGINT. Raises BusError or RegionError where it can't start."""
    run_dir = cache.resolved_run_dir(os.environ)
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(run_dir)
    size = int(cache.max_local_cpu_size * 1e9)
    path = cache.resolved_region_path(os.environ)
    living = holder.living(run_dir)
    if living and not path.exists():
        raise RegionError(f"{len(living)} living processes still use a region at {path} that is gone: stop the workers first")
    # From here on, since a signal in the middle of making a large region would leave what there is of it in memory.
    ending = _asked_to_end()
    region = Region.make_or_adopt(path, size, may_replace=not living)
    metrics = BusMetrics()
    daemon = Daemon(run_dir, region, _digest_key(cache, security, run_dir), metrics, cache, security, ending)
    if cache.metrics_port:
        metrics.serve(cache.metrics_host, cache.metrics_port)
    log.info("cachebus ready at %s: region %s, %.2f GB", run_dir, path, size / 1e9)
    if cache.node_port:
        log.info("other nodes reach it at %s:%d, %s", cache.node_host, cache.node_port, "with keys" if security.keys_dir else "without keys")
    # Its sockets are bound: who connects now is answered as soon as it runs.
    tell_ready(os.environ)
    try:
        daemon.run()
    finally:
        daemon.close()
        os.close(lock)
    log.info("cachebus stopped")
    return 0


def _asked_to_end() -> threading.Event:
    """Set by SIGTERM and SIGINT, which do nothing else any more."""
    ending = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return ending


def _lock(run_dir: Path) -> int:
    descriptor = os.open(run_dir / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BusError(f"a cachebus already runs at {run_dir}: stop it, or give this one its own cache.run_dir") from error
    return descriptor


def _digest_key(cache: CacheSettings, security: SecuritySettings, run_dir: Path) -> bytes:
    configured = security.digest_key_file
    if security.keys_dir and not configured:
        return Keyring(Path(security.keys_dir)).digest_key
    # Beside the disk tier's chunks, which nobody could check without it; the run directory may be gone after a reboot.
    folder = Path(cache.local_disk).absolute() if cache.local_disk else run_dir
    path = Path(configured) if configured else folder / "digest.key"
    if not configured and not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(DIGEST_KEY_BYTES))
    try:
        key = path.read_bytes()
    except OSError as error:
        raise BusError(f"security.digest_key_file: can't read {path}: {error.strerror}") from error
    if len(key) != DIGEST_KEY_BYTES:
        raise BusError(f"security.digest_key_file: {path} must hold {DIGEST_KEY_BYTES} bytes and holds {len(key)}")
    return key
