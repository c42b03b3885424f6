"""``headstart demo``: a cluster, four scenarios, every answer compared with plain vLLM's."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cachebus.engine.command import served_name
from deploy.client import Answer, ask
from deploy.launcher import Cluster, private_run_dir
from deploy.prompts import Prompts
from deploy.reference import PlainEngine
from deploy.settings import Settings

CHAT = "/v1/chat/completions"
COLD_TOKENS, PREFIX_TOKENS, CHAT_TOKENS = 8192, 4096, 2048
CLIENTS, TURNS, ANSWER_TOKENS = 16, 4, 24


@dataclass
class Row:
    """One request of the demo. ``promised``: the route it must take, "" where either is right."""

    name: str
    body: dict[str, Any]
    answer: Answer
    promised: str = ""
    elsewhere_than: str = ""
    matches: bool = False

    @property
    def worker(self) -> str:
        """The decode worker that answered."""
        return self.answer.headers["x-headstart-worker"]

    @property
    def route(self) -> str:
        """The route it took."""
        return self.answer.headers["x-headstart-route"]

    def keeps_promise(self) -> bool:
        """Whether it went the promised way, to the promised worker."""
        return self.promised in ("", self.route) and self.worker != self.elsewhere_than

    def as_json(self) -> dict[str, Any]:
        """The row as ``--json`` gives it."""
        headers = self.answer.headers
        return {
            "name": self.name,
            "route": self.route,
            "worker": self.worker,
            "prompt_tokens": self.answer.usage.get("prompt_tokens", 0),
            "cached_tokens": int(headers["x-headstart-cached-tokens"]),
            "cache_source": headers["x-headstart-cache-source"],
            "ttft_seconds": round(self.answer.ttft_seconds, 4),
            "total_seconds": round(self.answer.total_seconds, 4),
            "matches_vllm": self.matches,
        }


def run(settings: Settings, *, json_output: bool) -> int:
    """Runs the demo; 0 where every answer equals plain vLLM's and every request went as promised."""
    pool = msgspec.structs.replace(settings.decode, count=2)
    settings = msgspec.structs.replace(
        settings,
        prefill=msgspec.structs.replace(settings.prefill, count=1),
        decode=pool,
        router=msgspec.structs.replace(settings.router, port=0),
    )
    with tempfile.TemporaryDirectory(prefix="headstart-demo-") as folder, private_run_dir(settings) as private:
        logs = Path(folder)
        _say("starting a cachebus, a prefill worker, two decode workers and a router")
        cluster = Cluster(private, logs)
        cluster.start(_progress)
        try:
            in_turn = cluster.add_router("router-in-turn", "router.policy=least_loaded")
            _say(f"cluster ready at {cluster.url}/v1")
            rows, at_once = _scenarios(cluster.url, in_turn, private)
        finally:
            _say("stopping the cluster")
            cluster.stop()
        _say("asking plain vLLM the same")
        _compare(rows, private, logs)
    computed = sum(row.as_json()["cached_tokens"] < PREFIX_TOKENS // 2 for row in at_once)
    single_flight = {"clients": CLIENTS, "computed": computed}
    ok = all(row.matches and row.keeps_promise() for row in rows) and computed == 1
    if json_output:
        print(json.dumps({"ok": ok, "requests": [row.as_json() for row in rows], "single_flight": single_flight}))
    else:
        _table(rows)
        print(f"\n{CLIENTS} clients at once with one new prefix of {PREFIX_TOKENS} tokens: computed {computed} time(s)")
    for row in rows:
        if not row.matches:
            _say(f"FAILED: {row.name}: its tokens differ from plain vLLM's")
        if not row.keeps_promise():
            _say(f"FAILED: {row.name}: route {row.route} on {row.worker}, promised {row.promised or 'any'} not on {row.elsewhere_than or 'none'}")
    _say("every answer equals plain vLLM's" if ok else "the demo FAILED")
    return 0 if ok else 1


def _scenarios(url: str, in_turn: str, settings: Settings) -> tuple[list[Row], list[Row]]:
    """All requests, and those that came at once.

    ``in_turn``: a router that looks at no HBM. Through it a hit is pulled; the other one would send it to the worker that has it.
    """
    model = served_name(settings.model)
    prompts = Prompts(settings.model, seed=time.time_ns())
    rows: list[Row] = []

    def send(name: str, messages: list[dict[str, str]], promised: str, elsewhere_than: str = "", through: str = url) -> Row:
        body = {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        row = Row(name, body, ask(through, CHAT, body), promised, elsewhere_than)
        _say(f"{name}: first token after {row.answer.ttft_seconds:.3f} s, {row.route}")
        return row

    question = "What is the first item of the list?"
    system = {"role": "system", "content": prompts.system_for(COLD_TOKENS, question)}
    rows.append(send("cold", [system, {"role": "user", "content": question}], "prefill+decode", through=in_turn))
    other = [system, {"role": "user", "content": "And which item comes last?"}]
    rows.append(send("same system prompt, other question", other, "decode", rows[0].worker, in_turn))

    history = [{"role": "system", "content": prompts.text(CHAT_TOKENS)}]
    for turn in range(1, TURNS + 1):
        history = [*history, {"role": "user", "content": prompts.text(20)}]
        row = send(f"chat, turn {turn}", history, "decode" if turn > 1 else "")
        history = [*history, {"role": "assistant", "content": row.answer.text}]
        rows.append(row)

    prefix = {"role": "system", "content": prompts.text(PREFIX_TOKENS)}
    with ThreadPoolExecutor(CLIENTS) as clients:
        wanted = [[prefix, {"role": "user", "content": f"Question {number}"}] for number in range(CLIENTS)]
        names = [f"at once, client {number + 1}" for number in range(CLIENTS)]
        at_once = list(clients.map(send, names, wanted, [""] * CLIENTS))
    return rows + at_once, at_once


def _compare(rows: list[Row], settings: Settings, logs: Path) -> None:
    engine = PlainEngine(settings.model, settings.decode, logs / "plain.log")
    engine.start(_progress)
    try:
        for number, row in enumerate(rows, 1):
            _progress(f"comparing {number} of {len(rows)}")
            row.matches = bool(row.answer.token_ids) and ask(engine.url, CHAT, row.body).token_ids == row.answer.token_ids
    finally:
        engine.stop()


def _table(rows: list[Row]) -> None:
    print(f"\n{'request':36} {'TTFT s':>8} {'total s':>8}  {'route':15} {'worker':10} {'prompt':>7} {'cached':>7}  {'source':9} equals vLLM")
    for row in rows:
        r = row.as_json()
        print(
            f"{r['name']:36} {r['ttft_seconds']:8.3f} {r['total_seconds']:8.3f}  {r['route']:15} {r['worker']:10} "
            f"{r['prompt_tokens']:7} {r['cached_tokens']:7}  {r['cache_source']:9} {'yes' if r['matches_vllm'] else 'NO'}"
        )


def _say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr)


def _progress(text: str) -> None:
    """On a terminal one line that changes; in a log nothing, since the milestones are said anyway."""
    if sys.stderr.isatty():
        print(f"\r\033[Kdemo: {text}", end="\r", file=sys.stderr, flush=True)
