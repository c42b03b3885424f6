"""``headstart cache``: what a node's tiers hold, and how people change it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from cachebus.client import BusClient
from cachebus.errors import BusError, SettingsError
from cachebus.messages import Stat, StatReply
from cachebus.messages_tools import ChunkInfo, Clear, Count, Pin
from cachebus.tenants import Tenants, read_tenants
from deploy.cache.asking import ANSWER_MS_MAX, ask, every_chunk
from deploy.settings import Settings

_KEY_LETTERS = 16
_TIERS = ("dram", "nvme", "redis", "peer")


def run(settings: Settings, options: argparse.Namespace) -> int:
    """Runs one action. Raises BusUnavailable where no cachebus answers, BusError where a key is not known or means several chunks."""
    client = BusClient(settings.cache.resolved_run_dir(os.environ), "cache tool")
    try:
        if options.action == "stat":
            return _stat(client, options)
        if options.action == "ls":
            return _list(client, options)
        if options.action == "clear":
            return _clear(client, settings, options)
        there = every_chunk(client).chunks
        keys = [_meant(text, there) for text in options.keys]
        pinned = options.action == "pin"
        return _count(ask(client, Pin(keys, pinned), Count), "pinned" if pinned else "unpinned", options)
    finally:
        client.close()


def _clear(client: BusClient, settings: Settings, options: argparse.Namespace) -> int:
    if options.tenant is None:
        if not options.tiers:
            raise SettingsError("headstart cache clear: name the tiers, or --tenant")
        return _count(ask(client, Clear(options.tiers), Count), "dropped", options)
    digest_key = client.connect(ANSWER_MS_MAX).digest_key
    file = settings.security.tenants_file
    tenants = Tenants(read_tenants(Path(file)) if file else {}, digest_key)
    owner = tenants.owner(options.tenant)
    if options.tenant not in tenants.named:
        print(f"headstart: {options.tenant} is in no tenants' file (any more): what it had outside a group goes", file=sys.stderr)
    for other in owner.others:
        print(f"headstart: {other} shares this cache", file=sys.stderr)
    return _count(ask(client, Clear(options.tiers or ["dram", "nvme", "redis"], owner.tenant), Count), "dropped", options)


def _stat(client: BusClient, options: argparse.Namespace) -> int:
    values = ask(client, Stat(), StatReply).values
    if options.json:
        print(json.dumps(values))
        return 0
    print(f"{'tier':6} {'state':12} {'used GB':>10} {'room GB':>10} {'chunks':>9} {'stored':>9} {'hits':>9} {'evicted':>9} {'bad':>5}")
    for tier in _TIERS:
        prefix = "" if tier == "dram" else f"{tier}_"
        hits = values.get("granted_total" if tier == "dram" else f"{tier}_promoted_total", 0)
        used, room = values.get(f"{tier}_bytes"), values.get(f"{tier}_capacity_bytes")
        state = "answers" if tier == "dram" or values.get(f"{tier}_usable") else "not in use"
        numbers = [values.get(f"{prefix}{name}", 0) for name in ("chunks", "stored_total")]
        rest = [hits, values.get(f"{prefix}evicted_total", 0)]
        sizes = " ".join(f"{size / 1e9:10.3f}" if size is not None else f"{'-':>10}" for size in (used, room))
        counts = " ".join(f"{number:9.0f}" for number in [*numbers, *rest])
        print(f"{tier:6} {state:12} {sizes} {counts} {values.get(f'{prefix}integrity_failures_total', 0):5.0f}")
    print(f"\nwaiting to be written: {values['write_behind_bytes'] / 1e9:.3f} GB; on the way up: {values['promoting']:.0f} chunks")
    return 0


def _list(client: BusClient, options: argparse.Namespace) -> int:
    found = sorted(every_chunk(client).chunks, key=lambda chunk: -chunk.used_at)
    shown = found[: options.limit] if options.limit else found
    if options.json:
        rows = [{"key": c.key.hex(), "tiers": c.tiers, "bytes": c.length, "pinned": c.pinned, "used_at": c.used_at} for c in shown]
        print(json.dumps({"chunks": rows, "total": len(found)}))
        return 0
    print(f"{'key':{_KEY_LETTERS}} {'tiers':16} {'MB':>8} {'used':>12} notes")
    for chunk in shown:
        notes = ", ".join(text for text, holds in (("pinned", chunk.pinned), (f"{chunk.readers} readers", chunk.readers)) if holds)
        used = f"{max(0, time.time() - chunk.used_at):.0f} s ago" if chunk.used_at else "-"
        size = f"{chunk.length / 1e6:8.3f}" if chunk.length else f"{'-':>8}"
        print(f"{chunk.key.hex()[:_KEY_LETTERS]} {','.join(chunk.tiers):16} {size} {used:>12} {notes}".rstrip())
    print(f"{len(shown)} of {len(found)} chunks" + ("; --limit 0 shows all" if len(shown) < len(found) else ""))
    return 0


def _count(reply: Count, done: str, options: argparse.Namespace) -> int:
    print(json.dumps({done: reply.count}) if options.json else f"{done} {reply.count} chunks")
    return 0


def _meant(text: str, chunks: list[ChunkInfo]) -> bytes:
    found = [chunk.key for chunk in chunks if chunk.key.hex().startswith(text.lower())]
    if len(found) != 1:
        raise BusError(f"{text!r} is the beginning of {len(found)} chunks' keys; `headstart cache ls --limit 0` shows them all")
    return found[0]
