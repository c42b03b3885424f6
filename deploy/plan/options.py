"""The arguments of ``headstart plan``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

_DESCRIPTION = """Says how many prefill and decode workers a traffic needs, which tiers at which size, the time to first token and the cost of a
million tokens, with the cache and without, and on what all that rests.

Times come from the model's shape and the GPU's figures, which fit what was measured on H200; --measured, --cold-seconds and --hit-seconds put
your own in their place. Traffic is described, or read from a trace."""
_EXAMPLE = """example: 128K-token prompts, 4 of 5 with a prefix that is known, an 8B model
  headstart plan --model llama-3.1-8b --gpu h200 --gpu-price 3.80 --rate 2 --prompt-tokens 131072 --output-tokens 300 \\
      --reuse 0.8 --prefixes 40 --prefix-tokens 130000

exit codes: 0 the cache pays; 1 it does not, or no number of workers keeps the objective; 2 wrong usage, or the model does not fit"""
_DEFAULT = "(default: %(default)s)"
DEFAULTS = {
    "model": "llama-3.1-8b",
    "gpu": "h200",
    "output_tokens": 256,
    "reuse": 0.0,
    "prefixes": 10,
    "zipf": 0.0,
    "burstiness": 1.0,
    "gpus_per_node": 8,
    "dram_gb": 1000.0,
    "dram_price": 0.0,
    "nvme_gb": 10_000.0,
    "nvme_price": 0.0,
    "nvme_speed": 6.0,
    "redis_gb": 4000.0,
    "redis_price": 0.005,
    "redis_speed": 3.0,
}
"""What a plan takes where nothing is given; whoever reads it is told that it is a rule."""


def add_to(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers ``commands``; ``parents`` are what commands take in common."""
    plan = commands.add_parser(
        "plan",
        parents=parents,
        help="how many GPUs and which tiers a traffic needs, and what that costs with the cache and without",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_engine(plan.add_argument_group("engine"))
    _add_traffic(plan.add_argument_group("traffic"))
    _add_tiers(plan.add_argument_group("tiers and prices"))
    _add_objective(plan.add_argument_group("objective"))


def _add_engine(group: Any) -> None:
    group.add_argument("--model", default=DEFAULTS["model"], metavar="NAME_OR_PATH", help=f"a known shape, or a folder with config.json {_DEFAULT}")
    group.add_argument("--gpu", default=DEFAULTS["gpu"], metavar="NAME", help=f"a100, b200, h100, h20, h200, l4 or l40s {_DEFAULT}")
    group.add_argument("--tp", type=_count, default=1, metavar="N", help=f"GPUs of a worker {_DEFAULT}")
    group.add_argument("--weights", choices=("bf16", "fp8"), default="bf16", help=f"type of the weights {_DEFAULT}")
    group.add_argument("--kv", choices=("bf16", "fp8"), default="bf16", help=f"type of the KV {_DEFAULT}")
    group.add_argument(
        "--cold-seconds", type=_positive, metavar="S", help="what a cold prompt of --prompt-tokens takes, in place of the computed time"
    )
    group.add_argument("--hit-seconds", type=_positive, metavar="S", help="what one takes whose first --prefix-tokens come from DRAM, rest included")
    group.add_argument("--measured", type=Path, metavar="FILE", help="cold and dram times by length, as `headstart bench hits --output` wrote them")
    group.add_argument("--profile", type=Path, metavar="FILE", help="a simulated engine's rates, as `headstart sim` takes them, in place of all that")


def _add_traffic(group: Any) -> None:
    group.add_argument("--rate", type=_positive, metavar="R", help="requests a second at the busiest (default: the trace's mean)")
    group.add_argument("--prompt-tokens", type=_count, metavar="N", help="tokens of a prompt")
    group.add_argument("--output-tokens", type=_count, default=DEFAULTS["output_tokens"], metavar="N", help=f"tokens of an answer {_DEFAULT}")
    group.add_argument(
        "--reuse", type=_share, default=DEFAULTS["reuse"], metavar="SHARE", help=f"requests that begin with a known prefix, 0 to 1 {_DEFAULT}"
    )
    group.add_argument("--prefixes", type=_count, default=DEFAULTS["prefixes"], metavar="N", help=f"how many known prefixes there are {_DEFAULT}")
    group.add_argument("--prefix-tokens", type=_count, metavar="N", help="tokens of a known prefix (default: the whole prompt)")
    group.add_argument(
        "--zipf", type=_not_negative, default=DEFAULTS["zipf"], metavar="A", help=f"exponent of the prefixes' popularity; 0: all alike {_DEFAULT}"
    )
    group.add_argument(
        "--burstiness", type=_positive, default=DEFAULTS["burstiness"], metavar="C2", help=f"squared variation of the gaps; 1: Poisson {_DEFAULT}"
    )
    group.add_argument("--trace", type=Path, metavar="FILE", help="arrivals in Mooncake's format, in place of lengths and reuse")
    group.add_argument("--requests", type=_count, metavar="N", help="so many of the trace, from the first on (default: all)")


def _add_tiers(group: Any) -> None:
    group.add_argument("--gpu-price", type=_positive, metavar="USD", help="of a GPU, an hour (default: a rough figure for its kind)")
    group.add_argument("--gpus-per-node", type=_count, default=DEFAULTS["gpus_per_node"], metavar="N", help=f"GPUs of a node {_DEFAULT}")
    group.add_argument(
        "--dram-gb", type=_not_negative, default=DEFAULTS["dram_gb"], metavar="GB", help=f"DRAM for the cache, of a node, at most {_DEFAULT}"
    )
    group.add_argument(
        "--dram-price", type=_not_negative, default=DEFAULTS["dram_price"], metavar="USD", help=f"a GB and hour; 0: in the GPUs' price {_DEFAULT}"
    )
    group.add_argument(
        "--nvme-gb", type=_not_negative, default=DEFAULTS["nvme_gb"], metavar="GB", help=f"NVMe for the cache, of a node, at most {_DEFAULT}"
    )
    group.add_argument(
        "--nvme-price", type=_not_negative, default=DEFAULTS["nvme_price"], metavar="USD", help=f"a GB and hour; 0: in the GPUs' price {_DEFAULT}"
    )
    group.add_argument(
        "--nvme-speed",
        type=_positive,
        default=DEFAULTS["nvme_speed"],
        metavar="GB/S",
        help=f"reads of a node; `headstart doctor` measures it {_DEFAULT}",
    )
    group.add_argument(
        "--redis-gb", type=_not_negative, default=DEFAULTS["redis_gb"], metavar="GB", help=f"Redis for the cluster, at most {_DEFAULT}"
    )
    group.add_argument("--redis-price", type=_not_negative, default=DEFAULTS["redis_price"], metavar="USD", help=f"a GB and hour {_DEFAULT}")
    group.add_argument("--redis-speed", type=_positive, default=DEFAULTS["redis_speed"], metavar="GB/S", help=f"reads of all together {_DEFAULT}")


def _add_objective(group: Any) -> None:
    group.add_argument("--ttft-mean", type=_positive, default=math.inf, metavar="S", help="mean time to first token at most (default: not asked)")
    twice = "its 99th percentile (default, where no --ttft-mean is given: twice what it is without waiting and without a cache)"
    group.add_argument("--ttft-p99", type=_positive, default=math.inf, metavar="S", help=twice)
    group.add_argument("--itl-ms", type=_positive, default=50.0, metavar="MS", help=f"mean time between tokens at most {_DEFAULT}")
    missing = f"prompts that lack at least so many tokens go through prefill {_DEFAULT}"
    group.add_argument("--prefill-tokens-min", type=_count, default=1024, metavar="N", help=missing)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is no amount")
    return number


def _positive(text: str) -> float:
    if (number := _number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: give more than 0")
    return number


def _not_negative(text: str) -> float:
    if (number := _number(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return number


def _share(text: str) -> float:
    if not 0 <= (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share is 0 to 1")
    return number


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return number
