"""The command lines of the benchmarks of many requests, and of the plots."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.bench import goals

_RIVALS = f"{goals.OURS},{goals.OFFLOADING},{goals.LMCACHE}"
_DEFAULT = "(default: %(default)s)"


def add_to(benches: Any, common: argparse.ArgumentParser, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the benchmarks; ``common`` has every command's options, ``parents`` those of commands with a model and JSON."""
    for add in (_add_chat, _add_reuse, _add_trace, _add_decode, _add_handover):
        add(benches, [common, *parents])
    _add_scaling(benches, [common, parents[-1]])
    _add_index(benches, [common, parents[-1]])
    _add_soak(benches, [common, parents[-1]])
    plot = benches.add_parser("plot", parents=[common], help="draw what the benchmarks' JSON files hold")
    plot.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what --output wrote")
    plot.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help=f"where the figures go {_DEFAULT}")
    plot.add_argument("--format", choices=("png", "svg"), default="png", help=f"of the figures {_DEFAULT}")


def _add_chat(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    chat = benches.add_parser("chat", parents=parents, help="time to first token of each turn of a conversation that changes workers")
    _number(chat, "--turns", 10, "turns of a conversation")
    _number(chat, "--turn-tokens", 2048, "tokens that a turn adds: the user's message and the answer")
    _number(chat, "--answer-tokens", 64, "tokens of an answer")
    chat.add_argument("--concurrency", default="1,8", help=f"conversations beside each other {_DEFAULT}")
    _number(chat, "--runs", 3, "measurements of each figure")
    chat.add_argument("--pause", type=float, default=1.0, metavar="SECONDS", help=f"from an answer to the next message {_DEFAULT}")
    _engines(chat, f"{goals.PLAIN},{_RIVALS}", 0)


def _add_reuse(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    reuse = benches.add_parser("reuse", parents=parents, help="requests a second where most begin with one of a few system prompts")
    _number(reuse, "--prompts", 12, "system prompts")
    _number(reuse, "--prompt-tokens", 32768, "tokens of a system prompt")
    _number(reuse, "--question-tokens", 64, "tokens of a question")
    _number(reuse, "--answer-tokens", 64, "tokens of an answer")
    reuse.add_argument("--concurrency", default="10,50,200", help=f"clients {_DEFAULT}")
    reuse.add_argument("--reuse", default="80,95", help="percentage of the requests that begin with a system prompt, in steps of 5 (default: 80,95)")
    reuse.add_argument("--warm-seconds", type=float, default=10.0, help=f"before anything counts {_DEFAULT}")
    reuse.add_argument("--window-seconds", type=float, default=10.0, help=f"of a measurement {_DEFAULT}")
    _number(reuse, "--runs", 3, "measurements of each rate, one after the other")
    _engines(reuse, f"{goals.CONTROL},{goals.PLAIN},{_RIVALS}", 16)


def _add_trace(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    trace = benches.add_parser("trace", parents=parents, help="a replay of a trace: hits as a share of the most that could be")
    trace.add_argument("--trace", type=Path, required=True, metavar="FILE", help="the trace, JSON lines as Mooncake's, may be .gz")
    trace.add_argument("--seconds", type=float, default=120.0, help=f"how long requests arrive {_DEFAULT}")
    trace.add_argument("--speed", type=float, default=1.0, help=f"seconds of the trace in a second {_DEFAULT}")
    trace.add_argument("--share", type=float, default=0.5, help=f"share of the conversations that is replayed {_DEFAULT}")
    _number(trace, "--block-tokens", 512, "tokens that stand for a block of 512 in prompts and answers")
    _number(trace, "--answer-tokens-max", 512, "tokens of the longest answer")
    trace.add_argument("--drain-seconds", type=float, default=60.0, help=f"how long answers are waited for after the last arrival {_DEFAULT}")
    _engines(trace, f"{goals.PLAIN},{_RIVALS}", 16)


def _add_index(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    index = benches.add_parser("index", parents=parents, help="chunks that a router looks up in a second, on one core, in a full index")
    _number(index, "--chunks", 1_000_000, "in the index")
    _number(index, "--prompt-chunks", 512, "of a prompt")
    _number(index, "--workers", 8, "in whose HBM a hundredth of the chunks lies")
    _number(index, "--runs", 5, "measurements of each figure")
    index.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")


def _add_scaling(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    text = "a day of a trace on simulated workers in simulated time: pools scaled by the router's rule, against fixed ones"
    scaling = benches.add_parser("scaling", parents=parents, help=text, description=text)
    scaling.add_argument("--trace", type=Path, required=True, metavar="FILE", help="arrivals in Mooncake's format, .jsonl or .jsonl.gz")
    _number(scaling, "--trace-requests", 1_000_000, "how many of them, from the first on")
    _number(scaling, "--requests", 60_000, "of the day; the trace is played as often as that takes, each time with prefixes of its own")
    scaling.add_argument("--low", type=float, default=0.1, help=f"the lowest hour's rate, as a share of the highest one's {_DEFAULT}")
    _number(scaling, "--seed", 1, "of what is asked again by night")
    scaling.add_argument("--ttft", type=float, default=10.0, help=f"goal: seconds to the first token beyond what the prompt takes alone {_DEFAULT}")
    scaling.add_argument("--itl", type=float, default=0.05, help=f"goal: mean seconds between a request's tokens {_DEFAULT}")
    scaling.add_argument("--share", type=float, default=0.95, help=f"share of the requests that is to meet both goals {_DEFAULT}")
    scaling.add_argument("--busy", type=float, default=0.5, help=f"share of their time that prefill workers may compute {_DEFAULT}")
    _number(scaling, "--prefill-max", 12, "most prefill workers")
    _number(scaling, "--decode-max", 8, "most decode workers")
    scaling.add_argument("--start-seconds", type=float, default=90.0, help=f"until a new worker takes requests {_DEFAULT}")
    scaling.add_argument("--store-tokens", type=float, default=8e6, help=f"tokens of prefixes that all tiers keep {_DEFAULT}")
    _number(scaling, "--gpus", 8, "GPUs of a worker")
    scaling.add_argument(
        "--profile", type=Path, metavar="FILE", help="the workers' rates and sizes, as headstart sim takes it (default: 405B, assumed)"
    )
    scaling.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")


def _add_soak(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    text = "requests through a router, a bus and simulated workers that are killed, stopped, drained and added: every token compared, nothing left"
    soak = benches.add_parser("soak", parents=parents, help=text, description=text)
    _number(soak, "--requests", 1_000_000, "in all")
    soak.add_argument("--seed", type=int, help="of all that is asked and broken (default: drawn, and printed)")
    _number(soak, "--clients", 160, "requests at a time")
    _number(soak, "--fault-every", 4000, "requests from one fault to the next, in the mean")
    _number(soak, "--prefill", 2, "prefill workers, each a process")
    _number(soak, "--decode", 3, "decode workers, each a process")
    _number(soak, "--router-processes", 1, "processes of the router (router.processes)")
    soak.add_argument("--speed", type=float, default=1.0, help=f"how many times faster time passes for the workers {_DEFAULT}")
    soak.add_argument("--folder", type=Path, metavar="DIR", help="where the NVMe tier's files go for the time (default: the system's /tmp)")
    soak.add_argument("--logs", type=Path, metavar="DIR", help="keep the processes' output there")
    soak.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too, each minute")


def _add_decode(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    decode = benches.add_parser("decode", parents=parents, help="time from token to token of a batch while long prompts arrive")
    _number(decode, "--batch", 32, "requests that generate")
    _number(decode, "--batch-tokens", 1024, "tokens of each one's prompt")
    _number(decode, "--batch-answer-tokens", 8192, "tokens that each may generate; more than it gets to")
    _number(decode, "--arrivals", 8, "prompts that arrive, each with a prefix of its own")
    _number(decode, "--prefix-tokens", 32768, "tokens of a prefix")
    _number(decode, "--question-tokens", 64, "tokens that follow it")
    decode.add_argument("--interval", type=float, default=0.5, metavar="SECONDS", help=f"between arrivals {_DEFAULT}")
    decode.add_argument("--lead-seconds", type=float, default=5.0, help=f"before the first one {_DEFAULT}")
    _number(decode, "--runs", 3, "measurements of each case")
    _engines(decode, f"{goals.PLAIN},{_RIVALS}", 0)


def _add_handover(benches: Any, parents: list[argparse.ArgumentParser]) -> None:
    handover = benches.add_parser("handover", parents=parents, help="time to first token where one engine computes and another answers")
    handover.add_argument("--lengths", default="2048,8192,32768", help=f"tokens of the prompts {_DEFAULT}")
    _number(handover, "--runs", 3, "measurements of each length")
    _engines(handover, f"{goals.PLAIN},{goals.OURS},{goals.OURS_HBM}", 0)


def _number(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    parser.add_argument(name, type=_positive, default=default, help=f"{text} {_DEFAULT}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give at least 1")
    return number


def _engines(parser: argparse.ArgumentParser, systems: str, kv_cache_gb: float) -> None:
    taken = "0: what the engine takes; default: %(default)s"
    parser.add_argument("--systems", default=systems, help=f"what to measure {_DEFAULT}")
    parser.add_argument("--kv-cache-gb", type=float, default=kv_cache_gb, help=f"gigabytes of KV in an engine's own memory ({taken})")
    parser.add_argument("--load-format", default="auto", help=f"vLLM's; dummy: weights that it makes up {_DEFAULT}")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep the engines' output there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there, too")
