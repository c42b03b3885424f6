"""The benchmark ``headstart bench router``: what a gateway itself costs: its processor time for a request, and the time it adds to one.

The gateway has a core of its own, simulated workers and clients share the others. All prompts of a size begin alike and end differently, as those
of one application do, so a gateway that knows what is cached finds most of each. Processor time comes from the kernel's accounts of the gateway's
processes, so what the workers do meanwhile, tokenising too, is in nobody's figure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import msgspec

from cachebus.errors import HeadstartError, SettingsError
from deploy.bench import quiet, report, router_processes
from deploy.bench.gateways import OURS, SMG, VLLM_ROUTER, Gateway, chosen, running
from deploy.bench.sim_cluster import SimPlan, sim_cluster
from deploy.sim.profile import Profile, read_profile
from deploy.sim.vocabulary import FIRST_WORD, WORDS, text_of_words

PATH = "/v1/completions"
_GATEWAY_CORE = 0
_OWN_TOKENS = 16
_EVENTS = 64
_SECONDS_MAX = 120.0
_PART = 1 << 20
"""Numbers of bodies that one process of clients has for itself."""
_STREAMED = f", {_EVENTS} events"
_RATE_TOKENS, _RATE_REQUESTS = 2400, 2000
_CLIENT_PROCESSES_MAX = 6
CPU, LATENCY = "cpu_ms_per_request", "added_latency_ms"
_METRICS = {
    CPU: "CPU ms a request",
    LATENCY: "added ms, one client",
    router_processes.RATE: "requests a second",
    router_processes.CORES: "cores that the router keeps busy",
}


@dataclass
class _Bodies:
    """Requests of one size: ``tokens`` each, all but the last few the same."""

    tokens: int
    model: str
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def next(self, events: int) -> bytes:
        """A body that nobody has sent before; ``events`` 0: an answer of one token that is no stream."""
        number = next(self._numbers)
        shared = [FIRST_WORD + place * 7919 % WORDS for place in range(max(0, self.tokens - _OWN_TOKENS))]
        own = [FIRST_WORD + (number * 104729 + place * 31) % WORDS for place in range(min(self.tokens, _OWN_TOKENS))]
        body: dict[str, Any] = {"model": self.model, "prompt": text_of_words(shared + own), "max_tokens": max(1, events), "temperature": 0}
        return msgspec.json.encode(body | ({"stream": True, "ignore_eos": True} if events else {}))

    @property
    def label(self) -> str:
        """A case's name: the body's size."""
        size = len(self.next(0))
        return f"{size} B" if size < 1000 else f"{size / 1000:.0f} KB"


@dataclass(frozen=True)
class Cost:
    """One measurement."""

    system: str
    case: str
    tokens: int
    concurrency: int
    metric: str
    values: Sequence[float]


def run(options: argparse.Namespace) -> int:
    """Measures, prints a table or one JSON object. Raises HeadstartError."""
    gateways = chosen(options.systems, {VLLM_ROUTER: options.vllm_router, SMG: options.smg})
    try:
        sizes = [int(part) for part in options.tokens.split(",")]
    except ValueError as error:
        raise SettingsError(f"--tokens {options.tokens}: give prompt lengths with commas, such as 32,2400,128000") from error
    if len(os.sched_getaffinity(0)) < 2:
        raise HeadstartError("this measures one core beside others: it needs two at least")
    processes = router_processes.counts(options.processes, len(os.sched_getaffinity(0)))
    profile = read_profile(options.profile)
    rows: list[report.Row] = []
    command = ["headstart", "bench", "router", *(sys.argv[sys.argv.index("router") + 1 :] if "router" in sys.argv else ())]
    parts = itertools.chain(
        (_measure(gateway, sizes, profile, options) for gateway in gateways), (_measure_processes(count, profile, options) for count in processes)
    )
    for costs in parts:
        rows += [_row(cost, profile.model) for cost in costs]
        result = report.document(rows, command, {})
        if options.output:
            # After each system: one that does not come to its end takes nothing of the others' with it.
            report.write(options.output, result)
    print(json.dumps(result) if options.json else table(rows))
    return 0


def table(rows: Sequence[report.Row]) -> str:
    """Processor time by case, in Markdown, and what one client waits longer."""
    cases = list(dict.fromkeys((row.case, row.metric, row.concurrency) for row in rows))
    systems = list(dict.fromkeys(row.system for row in rows))
    known = {(row.system, row.case, row.metric, row.concurrency): row for row in rows}
    lines = ["| | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    for case, metric, concurrency in cases:
        cells = [_cell(known.get((system, case, metric, concurrency))) for system in systems]
        lines.append(f"| {_METRICS[metric]}, {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: report.Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.median:.2f}, p99 {row.p99:.2f}" if row.metric == LATENCY else f"{row.median:.{0 if row.metric == router_processes.RATE else 2}f}"


def _row(cost: Cost, model: str) -> report.Row:
    return report.Row(
        "router", cost.system, model, "", cost.case, cost.tokens, cost.concurrency, cost.metric, *report.figure(cost.values), len(cost.values)
    )


def _measure(gateway: Gateway, sizes: Sequence[int], profile: Profile, options: argparse.Namespace) -> list[Cost]:
    found = []
    with _without_cores([_GATEWAY_CORE]):
        plan = SimPlan(options.prefill, options.decode, options.speed, options.profile, options.region_gb)
        with sim_cluster(plan, options.logs) as cluster, running(gateway, cluster, options.logs, [_GATEWAY_CORE]) as gate:
            for tokens in sizes:
                bodies = _Bodies(tokens, profile.model)
                label, requests = bodies.label, max(options.clients, options.requests if tokens < 10_000 else options.requests // 5)
                asyncio.run(_load(gate.url, bodies, options.clients, options.clients, 0))
                for events, case in ((0, label), (_EVENTS, label + _STREAMED)):
                    seconds = []
                    for _ in range(options.runs):
                        used = quiet.tree_seconds(gate.pid)
                        asyncio.run(_load(gate.url, bodies, options.clients, requests, events))
                        seconds.append((quiet.tree_seconds(gate.pid) - used) * 1e3 / requests)
                    found.append(Cost(gateway.label, case, tokens, options.clients, CPU, seconds))
                    _say(f"{gateway.label}: {case}: {statistics.median(seconds):.2f} CPU ms a request")
                added = asyncio.run(_added(gate.url, cluster.urls("decode")[0], bodies, max(20, requests // 2)))
                found.append(Cost(gateway.label, label, tokens, 1, LATENCY, added))
                _say(f"{gateway.label}: {label}: adds {statistics.median(added):.2f} ms")
    return found


def _measure_processes(count: int, profile: Profile, options: argparse.Namespace) -> list[Cost]:
    """Ours with so many processes, each with a core: workers are apart from each other, so that not one core of theirs is the limit."""
    cores = sorted(os.sched_getaffinity(0))
    parts = max(1, min(_CLIENT_PROCESSES_MAX, (len(cores) - count) // 2))
    with _without_cores(cores[:count]):
        plan = SimPlan(1, max(options.decode, parts), options.speed, options.profile, options.region_gb, apart=True)
        gateway = Gateway(OURS, "", processes=count)
        with sim_cluster(plan, options.logs) as cluster, running(gateway, cluster, options.logs, cores[:count]) as gate:
            load = partial(_load_part, _RATE_TOKENS, profile.model)
            # Some for each process of the router, or it would be idle for want of requests.
            clients = [options.clients * count // parts or 1] * parts
            found = router_processes.rates(gate.url, gate.pid, load, clients, max(options.requests, _RATE_REQUESTS) * count // parts, options.runs)
    case = f"{_Bodies(_RATE_TOKENS, profile.model).label}, {count} process{'es' if count > 1 else ''}"
    _say(f"{case}: {statistics.median(found[0]):.0f} requests a second, {statistics.median(found[1]):.2f} cores busy")
    metrics = (router_processes.RATE, router_processes.CORES)
    return [Cost(OURS, case, _RATE_TOKENS, sum(clients), metric, values) for metric, values in zip(metrics, found, strict=True)]


def _load_part(tokens: int, model: str, url: str, clients: int, requests: int, part: int) -> None:
    """What one process of clients does; bodies of different ``part`` are different."""
    asyncio.run(_load(url, _Bodies(tokens, model, itertools.count(part * _PART)), clients, requests, 0))


@contextlib.contextmanager
def _without_cores(gateway: Iterable[int]) -> Iterator[None]:
    """Leaves cores to the gateway meanwhile: workers and clients inherit what this process may use."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before - set(gateway))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _load(url: str, bodies: _Bodies, clients: int, requests: int, events: int) -> None:
    """So many requests by so many clients, each a connection that it keeps."""
    made = iter([bodies.next(events) for _ in range(requests)])

    async def client(session: aiohttp.ClientSession) -> None:
        for body in made:
            await _ask(session, url, body)

    async with _session(clients) as session, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client(session))


async def _added(url: str, worker: str, bodies: _Bodies, requests: int) -> list[float]:
    """By how many milliseconds each answer through the gateway took longer than the median one of a worker asked directly, taken in turn."""
    through: list[float] = []
    direct: list[float] = []
    async with _session(1) as session:
        for _ in range(requests):
            for address, seconds in ((url, through), (worker, direct)):
                body = bodies.next(0)
                started = time.perf_counter()
                await _ask(session, address, body)
                seconds.append(time.perf_counter() - started)
    return [(one - statistics.median(direct)) * 1e3 for one in through]


def _session(clients: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=2 * clients, keepalive_timeout=1)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(_SECONDS_MAX), read_bufsize=1 << 20)


async def _ask(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    async with session.post(url + PATH, data=body, headers={"content-type": "application/json"}) as answer:
        text = await answer.read()
        if answer.status != 200:
            raise HeadstartError(f"{url} answered {answer.status}: {text[:300].decode(errors='replace')}")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
