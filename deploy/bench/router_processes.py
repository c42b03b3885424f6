"""How many requests a second Headstart's router serves by its number of processes: the part ``--processes`` of ``headstart bench router``.

Each process of the router has a core of its own. Clients are processes too, since one of them is busy long before several routers are; they and the
simulated workers share the other cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from cachebus.errors import SettingsError
from deploy.bench import quiet

RATE, CORES = "requests_per_second", "router_cores_busy"
_CORES_OF_CLIENTS_MIN = 1

Load = Callable[[str, int, int, int], None]
"""Sends requests to a URL and returns when all are answered: the URL, the number of clients, of requests, and what tells its bodies from others'."""


def counts(text: str, cores: int) -> list[int]:
    """The numbers of processes of ``--processes``. Raises SettingsError where they are none, or leave no core to clients and workers."""
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise SettingsError(f"--processes {text}: give numbers of processes with commas, such as 1,2,4") from error
    if found and not 1 <= min(found) <= max(found) <= cores - _CORES_OF_CLIENTS_MIN:
        raise SettingsError(f"--processes {text}: each has a core of its own, and of {cores} one at least is the clients'")
    return found


def rates(url: str, pid: int, load: Load, clients: Sequence[int], requests: int, runs: int) -> tuple[list[float], list[float]]:
    """Requests a second, and how many cores the processes below ``pid`` kept busy meanwhile, ``runs`` times.

    ``clients``: how many each process of clients has; ``requests``: of each process.
    """
    per_second, busy = [], []
    with ProcessPoolExecutor(len(clients), get_context("spawn")) as pool:
        # Begun, connected and warm before the first measurement.
        _together(pool, url, load, clients, max(clients), 0)
        for run in range(1, runs + 1):
            used, started = quiet.tree_seconds(pid), time.perf_counter()
            _together(pool, url, load, clients, requests, run)
            seconds = time.perf_counter() - started
            per_second.append(len(clients) * requests / seconds)
            busy.append((quiet.tree_seconds(pid) - used) / seconds)
    return per_second, busy


def _together(pool: ProcessPoolExecutor, url: str, load: Load, clients: Sequence[int], requests: int, run: int) -> None:
    for ended in [pool.submit(load, url, count, requests, run * len(clients) + number) for number, count in enumerate(clients)]:
        ended.result()
