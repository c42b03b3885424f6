"""The arguments of ``headstart cache``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_WARM = """Sends prompts to the router, each for one token, so that their prefixes are cached before traffic comes.

FILE ends in .jsonl or .json: a JSON value a line, {"messages": [...]} or {"prompt": "..."} (or token ids), with "model" and whatever else
shapes the prompt. Any other FILE is one prompt: its whole text, as /v1/completions takes it, or with --system as a chat's system message."""
_EXPORT = """Writes a node's chunks to one file, for `headstart cache import` on a node with the same digest key.

The file holds the KV of prompts, from which they can be guessed: it is made with mode 0600, and encrypted if security.encrypt_at_rest is set.
Chunks of lower tiers pass through DRAM, least recently used first, so that those used last are in DRAM again in the end."""
_IMPORT = """Puts the chunks of an exported file into DRAM, from where they go down to the other tiers as an engine's do.

Every chunk is checked first; one that fails is never imported. Exit code 1 if any failed or found no room, or if the file is cut."""


def add_to(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers ``commands``; ``parents`` are what every action takes."""
    cache = commands.add_parser("cache", help="look into a node's cache, change it, fill it, carry it to another node")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("stat", parents=parents, help="the tiers: what they hold, and what happened")
    listing = actions.add_parser("ls", parents=parents, help="the chunks and where they are, last used first")
    listing.add_argument("--limit", type=int, default=20, help="how many to show; 0: all (default: %(default)s)")
    for action, text in (("pin", "keep chunks in DRAM"), ("unpin", "let pinned chunks be evicted again")):
        pin = actions.add_parser(action, parents=parents, help=text)
        pin.add_argument("keys", nargs="+", metavar="KEY", help="a chunk's key as `cache ls` shows it, or its beginning")
    text = "drop chunks, pinned ones too: all of some tiers, or a tenant's"
    clear = actions.add_parser("clear", parents=parents, help=text, description=text)
    clear.add_argument("tiers", nargs="*", choices=("dram", "nvme", "redis", []), metavar="TIER", help="dram, nvme or redis; needed without --tenant")
    clear.add_argument("--tenant", metavar="NAME", help="only this tenant's, in every tier of the node and in the shared one")
    _add_warm(actions, parents)
    _add_files(actions, parents)


def _add_warm(actions: Any, parents: list[argparse.ArgumentParser]) -> None:
    warm = actions.add_parser("warm", parents=parents, help="compute prompts ahead of traffic", description=_WARM, formatter_class=_Plain)
    warm.add_argument("file", type=Path, metavar="FILE", help="the prompts")
    warm.add_argument("--url", help="the router's address (default: from router.host and router.port)")
    warm.add_argument("--concurrency", type=_count, default=2, metavar="N", help="requests at one time (default: %(default)s)")
    warm.add_argument("--model", metavar="NAME", help="the model of prompts that name none (default: the one that is served)")
    warm.add_argument("--system", action="store_true", help="FILE is text: send it as a chat's system message")
    warm.add_argument("--api-key", metavar="KEY", help="bearer token; better in HEADSTART_API_KEY, where no process list shows it")


def _add_files(actions: Any, parents: list[argparse.ArgumentParser]) -> None:
    export = actions.add_parser(
        "export", parents=parents, help="write chunks to a file (KV of prompts: mode 0600)", description=_EXPORT, formatter_class=_Plain
    )
    export.add_argument("file", type=Path, metavar="FILE", help="where to; FILE.part until it is whole")
    export.add_argument("--keys", nargs="+", metavar="PREFIX", help="only chunks whose keys, as `cache ls` shows them, begin so")
    export.add_argument("--tier", choices=("dram", "nvme", "redis"), help="only chunks that this tier holds")
    bring = actions.add_parser("import", parents=parents, help="take an exported file's chunks in", description=_IMPORT, formatter_class=_Plain)
    bring.add_argument("file", type=Path, metavar="FILE", help="what `cache export` wrote")


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Paragraphs stay as they are written."""


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; give at least 1")
    return number
