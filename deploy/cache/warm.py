"""``headstart cache warm``: has prompts computed ahead of traffic, by asking the router for one token of each."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import queue
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

from cachebus.errors import HeadstartError
from deploy.cache.progress import Progress, eta
from deploy.cache.prompts import Prompt, read_prompts
from deploy.client import ask
from deploy.settings import Settings
from router.settings import RouterSettings

CONNECT_SECONDS_MAX = 5.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Warmed:
    """What became of a line: its prompt's tokens, how many of them were cached before, the way it went, seconds; or ``error``."""

    line: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    route: str = ""
    seconds: float = 0.0
    error: str = ""


@dataclass
class _Warming:
    """The prompts under way. The threads are daemons: a person who ends the command does not wait for answers, and the router sees them leave."""

    url: str
    api_key: str
    waiting: queue.SimpleQueue[Prompt]
    results: queue.SimpleQueue[Warmed] = field(default_factory=queue.SimpleQueue)

    def begin(self, concurrency: int) -> None:
        for number in range(concurrency):
            threading.Thread(target=self._work, name=f"warm-{number}", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                prompt = self.waiting.get_nowait()
            except queue.Empty:
                return
            self.results.put(self._warm(prompt))

    def _warm(self, prompt: Prompt) -> Warmed:
        if prompt.body is None:
            return Warmed(prompt.line, error=prompt.problem)
        started = time.monotonic()
        try:
            answer = ask(self.url, prompt.path, prompt.body, self.api_key)
            tokens = int(answer.usage.get("prompt_tokens") or 0)
            cached = int(answer.headers.get("x-headstart-cached-tokens") or answer.cached_tokens)
        except (HeadstartError, ValueError, TypeError, AttributeError) as error:
            # What answers may be no router; whatever it says, the other prompts go on.
            return Warmed(prompt.line, seconds=round(time.monotonic() - started, 3), error=str(error))
        route = answer.headers.get("x-headstart-route", "")
        return Warmed(prompt.line, tokens, cached, route, round(answer.total_seconds, 3))


@dataclass
class _Sums:
    total: int
    rows: list[Warmed] = field(default_factory=list)
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, row: Warmed) -> None:
        self.rows.append(row)
        self.failed += bool(row.error)
        self.prompt_tokens += row.prompt_tokens
        self.cached_tokens += row.cached_tokens

    def text(self, seconds: float) -> str:
        pace = self.prompt_tokens / max(seconds, 1e-9)
        left = eta(seconds, len(self.rows), self.total)
        return f"{len(self.rows)} of {self.total} prompts, {self.cached_tokens} tokens were cached, {pace:.0f} tokens/s{left}"


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Warms every prompt and prints what became of it; 1 where one failed, 130 where a person ended it.

    Raises HeadstartError where the file can't be read or nothing answers at the router's address.
    """
    prompts = read_prompts(options.file, options.model, system=options.system)
    url = _url(options.url, settings.router)
    _look_for(url)
    warming = _Warming(url, options.api_key or os.environ.get("HEADSTART_API_KEY", ""), queue.SimpleQueue())
    for prompt in prompts:
        warming.waiting.put(prompt)
    sums = _Sums(len(prompts))
    progress = Progress(sums.text)
    ended = False
    if not options.json:
        print(f"{'line':>6} {'tokens':>8} {'cached':>8} {'seconds':>8} route", flush=True)
    try:
        warming.begin(min(options.concurrency, len(prompts)))
        _collect(warming, sums, progress, table=not options.json)
        progress.show(last=True)
    except KeyboardInterrupt:
        ended = True
        progress.clear()
    _summary(sums, progress.seconds, ended=ended, json_output=options.json)
    return 130 if ended else 1 if sums.failed else 0


def _collect(warming: _Warming, sums: _Sums, progress: Progress, *, table: bool) -> None:
    while len(sums.rows) < sums.total:
        progress.show()
        try:
            row = warming.results.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            continue
        sums.add(row)
        progress.clear()
        if row.error:
            print(f"headstart: line {row.line}: {row.error}", file=sys.stderr)
        elif table:
            print(f"{row.line:6} {row.prompt_tokens:8} {row.cached_tokens:8} {row.seconds:8.2f} {row.route or '-'}", flush=True)


def _summary(sums: _Sums, seconds: float, *, ended: bool, json_output: bool) -> None:
    done = len(sums.rows) - sums.failed
    if json_output:
        totals = {"total": sums.total, "warmed": done, "failed": sums.failed, "not_asked": sums.total - len(sums.rows), "ended": ended}
        tokens = {"prompt_tokens": sums.prompt_tokens, "cached_tokens": sums.cached_tokens, "seconds": round(seconds, 3)}
        print(json.dumps({**totals, **tokens, "prompts": [asdict(row) for row in sums.rows]}))
        return
    text = f"warmed {done} of {sums.total} prompts, {sums.failed} failed: {sums.prompt_tokens} tokens, {sums.cached_tokens} of them cached before"
    print(f"{text}, in {seconds:.1f} s" + ("; ended before the last" if ended else ""))


def _url(given: str | None, router: RouterSettings) -> str:
    """The router's address, without the /v1 that OpenAI clients are given."""
    if given:
        url = given.rstrip("/").removesuffix("/v1")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise HeadstartError(f"--url {given}: give an address such as http://127.0.0.1:8000")
        return url
    if not router.port:
        raise HeadstartError("router.port is 0, which is a free port: give --url")
    host = router.host
    try:
        if ipaddress.ip_address(host).is_unspecified:
            host = "::1" if ":" in host else "127.0.0.1"
    except ValueError:
        pass
    return f"http://[{host}]:{router.port}" if ":" in host else f"http://{host}:{router.port}"


def _look_for(url: str) -> None:
    """Raises HeadstartError where nothing takes a connection, so that not every line has to say so."""
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), CONNECT_SECONDS_MAX).close()
    except OSError as error:
        raise HeadstartError(f"no router answers at {url}: {error.strerror or error}; start one with `headstart router`, or give --url") from error
