"""``headstart bench soak``: requests through a router, a bus and simulated workers, while processes are killed, stopped, drained and added.

Every answer is held against the oracle. Afterwards everything must be at rest, and nothing may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import uvloop

from deploy.bench import engines, report, soak_leaks
from deploy.bench.soak_client import BAD, CUT, REFUSED, WHOLE, Ended, ask
from deploy.bench.soak_cluster import SoakCluster, SoakPlan
from deploy.bench.soak_leaks import Size
from deploy.bench.soak_plan import PROFILE, Asked, Fault, Requests, faults

_TELL_SECONDS, _WRITE_SECONDS = 10.0, 60.0
_REFUSED_PAUSE_SECONDS = 0.2
_QUIET_SECONDS_MAX, _LOOK_SECONDS = 45.0, 0.5
_WARM = 0.3
"""Share of the requests after which router and bus count as warm: what they grow by from then on is held against a bound."""
_EXCUSED_SECONDS = 2.0
"""So long after a router's death a connection may still turn out to be cut."""
_SAMPLES_MAX = 20


@dataclass(frozen=True)
class Soak:
    """What is to be done."""

    plan: SoakPlan
    seed: int
    requests: int
    clients: int
    fault_every: int
    oracle: str = PROFILE.model


@dataclass
class Tally:
    """What has come of it so far. ``failures``: what must not happen, with its circumstances."""

    begun: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    apis: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    refused_connections: int = 0
    words: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    cut_at: list[tuple[float, str]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    warm: dict[str, Size] = field(default_factory=dict)
    now: dict[str, Size] = field(default_factory=dict)
    seconds: float = 0.0
    bus: Counter[str] = field(default_factory=Counter)

    def take(self, asked: Asked, ended: Ended, now: float) -> None:
        """A request ended."""
        self.outcomes[ended.outcome] += 1
        self.apis[f"{asked.path}{', streamed' if asked.stream else ''}"] += 1
        self.tokens += ended.tokens
        self.refused_connections += ended.refused_connections
        if ended.outcome == WHOLE:
            self.routes[ended.route] += 1
            self.prompt_tokens += asked.prompt_tokens
            self.cached_tokens += ended.cached
        elif ended.said:
            self.words[f"{ended.outcome}: {ended.said[:160]}"] += 1
        if ended.outcome == CUT:
            self.cut_at.append((now, f"request {asked.number}: {ended.said}"))
        if ended.outcome in BAD and len(self.failures) < _SAMPLES_MAX:
            self.failures.append(f"request {asked.number} ({asked.path}, {'stream' if asked.stream else 'whole'}): {ended.outcome}: {ended.said}")

    @property
    def ended(self) -> int:
        """Requests that have ended, one way or another."""
        return self.outcomes.total()


def run(options: argparse.Namespace) -> int:
    """Runs, prints a table or one JSON object; 1 where a token was wrong, a request hung or anything is left. Raises HeadstartError."""
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    plan = SoakPlan(options.prefill, options.decode, options.speed, options.router_processes, options.set, options.folder)
    wanted = Soak(plan, seed, options.requests, options.clients, options.fault_every)
    # What clients that leave do to their connections is no news.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        tally = uvloop.run(soak(wanted, logs, options.output))
    result = report.document(rows(wanted, tally), _command(), _host(wanted, tally))
    if options.output:
        report.write(options.output, result)
    print(json.dumps(result) if options.json else table(wanted, tally))
    return 1 if verdict(tally) else 0


async def soak(wanted: Soak, logs: Path, output: Path | None = None) -> Tally:
    """Starts the cluster, asks and breaks, looks at what is left, ends it. SIGINT ends it sooner. Raises HeadstartError where it does not start."""
    _say(f"seed {wanted.seed}: {wanted.requests:,} requests by {wanted.clients} clients, a fault every {wanted.fault_every} requests")
    tally, cluster = Tally(), SoakCluster(wanted.plan, logs)
    try:
        cluster.start()
        started = time.monotonic()
        driver = _Driver(wanted, cluster, tally)
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, driver.stop)
        telling = asyncio.create_task(_tell(wanted, cluster, tally, started, output))
        try:
            await driver.drive()
        finally:
            telling.cancel()
            tally.seconds = time.monotonic() - started
        _say("all have ended; what is left?")
        tally.leaks = await asyncio.to_thread(_at_rest, cluster)
        tally.bus.update(await asyncio.to_thread(engines.statistics, cluster.run_dir))
        tally.now = soak_leaks.sizes(cluster)
        tally.leaks += soak_leaks.grown(tally.warm, tally.now) + await cluster.end()
        tally.failures += cluster.done.failures + _unexcused(tally.cut_at, cluster.done.router_away)
        tally.words.update({f"fault: {name}": count for name, count in cluster.done.faults.items()})
    finally:
        await asyncio.to_thread(cluster.kill_all)
    return tally


class _Driver:
    """The clients, and the faults among them."""

    def __init__(self, wanted: Soak, cluster: SoakCluster, tally: Tally) -> None:
        self._wanted, self._cluster, self._tally = wanted, cluster, tally
        self._requests: Iterator[Asked] = Requests(wanted.seed, wanted.oracle).take(wanted.requests)
        self._faults: list[Fault] = faults(wanted.seed, wanted.requests, wanted.fault_every)
        self._suffering: set[asyncio.Task[None]] = set()
        self._stopped = False

    def stop(self) -> None:
        """No more requests."""
        _say("ending: no more requests")
        self._stopped = True

    async def drive(self) -> None:
        """Returns when all clients and faults are done."""
        # Where the router closes a connection just as it is used again nobody is to blame: so it is the client that closes idle ones.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None), read_bufsize=1 << 18) as session:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._wanted.clients):
                    group.create_task(self._client(session))
            await asyncio.gather(*self._suffering)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        for asked in self._requests:
            self._tally.begun += 1
            self._break()
            ended = await ask(session, self._cluster.url, asked)
            self._tally.take(asked, ended, time.monotonic())
            if self._tally.ended == int(_WARM * self._wanted.requests):
                self._tally.warm = soak_leaks.sizes(self._cluster)
            if self._stopped:
                return
            if ended.outcome == REFUSED:
                await asyncio.sleep(_REFUSED_PAUSE_SECONDS)

    def _break(self) -> None:
        while self._faults and self._faults[0].after <= self._tally.begun:
            task = asyncio.create_task(self._cluster.suffer(self._faults.pop(0)))
            self._suffering.add(task)
            task.add_done_callback(self._suffering.discard)


async def _tell(wanted: Soak, cluster: SoakCluster, tally: Tally, started: float, output: Path | None) -> None:
    before, written = 0, started
    while True:
        await asyncio.sleep(_TELL_SECONDS)
        cluster.look()
        now = time.monotonic()
        tally.seconds, tally.now = now - started, soak_leaks.sizes(cluster)
        rate, before = (tally.ended - before) / _TELL_SECONDS, tally.ended
        left = (wanted.requests - tally.ended) / max(tally.ended / tally.seconds, 1e-9)
        took = ", ".join(f"{name} {size.memory >> 20} MiB {size.files} files" for name, size in tally.now.items())
        _say(f"{tally.ended:,} done, {rate:.0f}/s, {left:.0f} s left; {_counted(tally.outcomes)}; {cluster.done.faults.total()} faults; {took}")
        if output and now - written >= _WRITE_SECONDS:
            written = now
            report.write(output, report.document(rows(wanted, tally), _command(), _host(wanted, tally)))


def _at_rest(cluster: SoakCluster) -> list[str]:
    """What is still busy when there was time enough to come to rest."""
    deadline = time.monotonic() + _QUIET_SECONDS_MAX
    while (found := soak_leaks.busy(cluster)) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return found


def _unexcused(cut_at: Sequence[tuple[float, str]], away: Sequence[tuple[float, float]]) -> list[str]:
    """Connections that were cut though no router had been killed."""
    return [said for at, said in cut_at if not any(begun <= at <= back + _EXCUSED_SECONDS for begun, back in away)][:_SAMPLES_MAX]


def verdict(tally: Tally) -> list[str]:
    """Why it failed; nothing where it did not."""
    found = [f"{tally.outcomes[outcome]} {outcome}" for outcome in BAD if tally.outcomes[outcome]]
    return found + tally.failures + tally.leaks


def rows(wanted: Soak, tally: Tally) -> list[report.Row]:
    """Counts as rows; ``runs`` is how many requests ended."""
    case = f"{wanted.plan.prefill}+{wanted.plan.decode} workers, {wanted.plan.router_processes} router processes, a fault every {wanted.fault_every}"
    counts: dict[str, float] = {"requests": tally.ended, **{outcome.replace(" ", "_"): tally.outcomes[outcome] for outcome in _outcomes(tally)}}
    counts |= {"leaks": len(tally.leaks), "failures": len(tally.failures), "tokens_compared": tally.tokens}
    counts |= {"seconds": round(tally.seconds, 1), "requests_per_second": round(tally.ended / max(tally.seconds, 1e-9), 1)}
    counts |= {"cached_share": round(tally.cached_tokens / max(tally.prompt_tokens, 1), 4)}
    return [
        report.Row("soak", "headstart", PROFILE.model, "", case, 0, wanted.clients, name, value, value, tally.ended) for name, value in counts.items()
    ]


def _outcomes(tally: Tally) -> list[str]:
    return list(dict.fromkeys([WHOLE, *BAD, *sorted(tally.outcomes)]))


def _host(wanted: Soak, tally: Tally) -> dict[str, object]:
    """What the rows do not say: the seed first of all."""
    told: dict[str, object] = {"seed": wanted.seed, "routes": dict(tally.routes), "apis": dict(sorted(tally.apis.items()))}
    told |= {"faults": {name.removeprefix("fault: "): count for name, count in tally.words.items() if name.startswith("fault: ")}}
    told |= {"bus": {name: value for name, value in sorted(tally.bus.items()) if value and name.endswith("_total") and "messages" not in name}}
    told |= {"said": {name: count for name, count in tally.words.most_common(60) if not name.startswith("fault: ")}}
    sizes = {name: {"warm": tally.warm.get(name), "end": size} for name, size in tally.now.items()}
    told |= {"sizes": {n: {w: [s.files, s.memory] for w, s in one.items() if s} for n, one in sizes.items()}}
    return told | {"failed": verdict(tally)}


def table(wanted: Soak, tally: Tally) -> str:
    """Outcomes in Markdown, and the verdict."""
    lines = [f"| seed {wanted.seed} | requests |", "|---|---|", *(f"| {outcome} | {tally.outcomes[outcome]:,} |" for outcome in _outcomes(tally))]
    failed = verdict(tally)
    lines.append(f"\n{tally.ended:,} requests in {tally.seconds:.0f} s, {tally.tokens:,} tokens compared: " + ("FAILED" if failed else "all well"))
    return "\n".join([*lines, *failed])


def _counted(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in outcomes.most_common())


def _command() -> list[str]:
    return ["headstart", "bench", "soak", *(sys.argv[sys.argv.index("soak") + 1 :] if "soak" in sys.argv else ())]


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
