"""``headstart status``: what a node's cachebus says of itself."""

from __future__ import annotations

import json
import os

from cachebus.client import BusClient
from cachebus.messages import Snapshot, SnapshotReply, Stat, StatReply
from deploy.settings import Settings

_ANSWER_MS_MAX = 3000


def run(settings: Settings, *, json_output: bool) -> int:
    """Prints workers, tier and counters. Raises BusUnavailable where no cachebus answers."""
    client = BusClient(settings.cache.resolved_run_dir(os.environ), "status")
    try:
        snapshot, stat = client.call(Snapshot(), _ANSWER_MS_MAX), client.call(Stat(), _ANSWER_MS_MAX)
    finally:
        client.close()
    assert isinstance(snapshot, SnapshotReply)
    assert isinstance(stat, StatReply)
    values = stat.values
    workers = [
        {
            "worker": w.worker,
            "role": w.role,
            "state": "draining" if w.draining else "ready",
            "model": w.model,
            "url": w.url,
            "hbm_chunks": len(snapshot.hbm[w.worker]) if w.worker in snapshot.hbm else None,
        }
        for w in sorted(snapshot.workers, key=lambda w: (w.role, w.worker))
    ]
    if json_output:
        print(json.dumps({"epoch": stat.epoch, "workers": workers, "values": values}))
        return 0
    print(f"{'worker':24} {'role':8} {'state':9} {'model':24} {'in HBM':>13} address")
    for w in workers:
        in_hbm = "not known" if w["hbm_chunks"] is None else f"{w['hbm_chunks']} chunks"
        print(f"{w['worker']:24} {w['role']:8} {w['state']:9} {w['model']:24} {in_hbm:>13} {w['url']}")
    if not workers:
        print("(no worker is registered)")
    used, capacity = values["dram_bytes"], values["dram_capacity_bytes"]
    share = f"{used / 1e9:.3f} of {capacity / 1e9:.3f} GB ({used / capacity:.0%})"
    print(f"\ndram: {share}, {values['chunks']:.0f} chunks, {values['tail_blocks']:.0f} tail blocks")
    if values.get("nvme_capacity_bytes"):
        used, capacity = values["nvme_bytes"], values["nvme_capacity_bytes"]
        print(f"nvme: {used / 1e9:.3f} of {capacity / 1e9:.3f} GB ({used / capacity:.0%}), {values['nvme_chunks']:.0f} chunks")
    if settings.cache.remote_url:
        print(f"redis: {'answers' if values.get('redis_usable') else 'does not answer'}, {values['redis_chunks']:.0f} chunks")
    if settings.cache.peers:
        print(f"peers: {values['peers']:.0f} of {len(settings.cache.peers)} answer, {values['peer_chunks']:.0f} chunks")
    names = {"leases": "leases", "writing": "being written", "waiters": "waiting lookups", "holders": "holders"}
    print(", ".join(f"{text} {values[name]:.0f}" for name, text in names.items()) + "\n")
    for name, value in sorted(values.items()):
        if name.endswith("_total"):
            print(f"{name.removesuffix('_total'):32} {value:12.0f}")
    return 0
