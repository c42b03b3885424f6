"""What running engines have registered: do they share what they compute, and do chunks fit."""

from __future__ import annotations

from collections.abc import Mapping

from cachebus.messages import Worker
from deploy.doctor.finding import Finding, gigabytes, skipped

AGREE, FIT, CHUNK_SIZE = "workers agree", "chunks fit tiers", "chunk size"
LONG_CONTEXT, LONG_CHUNK = 131_072, 512
_SHOWN = ("KV dtype", "block size", "chunk size")
_TIERS = {"dram": "cache.max_local_cpu_size", "nvme": "cache.max_local_disk_size", "redis": "the server's maxmemory"}


def agree(workers: Mapping[str, Worker]) -> Finding:
    """Workers of one model must have the same KV dtype, block size, chunk size and whatever else a chunk depends on; of all nodes, by name."""
    if not workers:
        return skipped(AGREE, "no worker is registered")
    models: dict[str, dict[str, Worker]] = {}
    for name, worker in workers.items():
        models.setdefault(worker.model, {})[name] = worker
    differences = [text for group in models.values() for text in _differences(group)]
    if differences:
        advice = "they share no chunk: start all with one headstart.yaml and one version"
        return Finding(AGREE, "bad", "; ".join(differences), advice)
    shown = (f"{len(group)} of {model}: {_described(next(iter(group.values())))}" for model, group in models.items())
    return Finding(AGREE, "ok", "; ".join(shown))


def fit(workers: Mapping[str, Worker], capacities: Mapping[str, float]) -> Finding:
    """Whether each tier holds a chunk, and DRAM a prompt of the longest length."""
    largest = max(workers.values(), key=lambda worker: worker.chunk_bytes, default=None)
    if largest is None or not largest.chunk_bytes:
        return skipped(FIT, "no worker tells how large a chunk is")
    size = largest.chunk_bytes
    values = {"chunk_bytes": float(size), **capacities}
    measured = f"a chunk takes {gigabytes(size)}; " + ", ".join(f"{tier} {gigabytes(room)}" for tier, room in capacities.items())
    small = [tier for tier, room in capacities.items() if room < size]
    if small:
        advice = f"it never goes there: raise {', '.join(_TIERS[tier] for tier in small)}, or lower cache.chunk_size"
        return Finding(FIT, "bad", measured, advice, values)
    longest = max(worker.chunk_bytes * worker.max_model_len / worker.chunk_size for worker in workers.values())
    if longest > capacities.get("dram", longest):
        advice = "it pushes its own beginning out: raise cache.max_local_cpu_size, or lower model.max_model_len"
        return Finding(FIT, "warn", f"{measured}; the longest prompt takes {gigabytes(longest)}", advice, values)
    return Finding(FIT, "ok", measured, "", values)


def chunk_size(configured: int, configured_length: int, workers: Mapping[str, Worker]) -> Finding:
    """Contexts over 128K tokens want larger chunks: half as many keys to look up and digests to check."""
    pairs = [(worker.chunk_size, worker.max_model_len) for worker in workers.values()]
    if configured_length or not pairs:
        pairs.append((configured, configured_length))
    size, length = max(pairs, key=lambda pair: (pair[1] > LONG_CONTEXT and pair[0] < LONG_CHUNK, pair[1]))
    if not length:
        return skipped(CHUNK_SIZE, f"{size} tokens; no worker is registered and model.max_model_len is not set")
    measured = f"{size} tokens, contexts of up to {length}"
    if length > LONG_CONTEXT and size < LONG_CHUNK:
        return Finding(CHUNK_SIZE, "warn", measured, f"set cache.chunk_size to {LONG_CHUNK} for contexts over 128K", {"chunk_size": size})
    return Finding(CHUNK_SIZE, "ok", measured, "", {"chunk_size": size})


def _all_parts(worker: Worker) -> dict[str, str]:
    return {**worker.parts, "block size": str(worker.block_size), "chunk size": str(worker.chunk_size)}


def _described(worker: Worker) -> str:
    parts = _all_parts(worker)
    return ", ".join(f"{name} {parts[name]}" for name in _SHOWN if name in parts)


def _differences(group: Mapping[str, Worker]) -> list[str]:
    """Each part that is not the same in all, with who has what. What a worker does not tell is not compared."""
    by_part: dict[str, dict[str, list[str]]] = {}
    for name, worker in group.items():
        for part, value in _all_parts(worker).items():
            by_part.setdefault(part, {}).setdefault(value, []).append(name)
    return [
        f"{part} is " + " but ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
        for part, values in sorted(by_part.items(), key=lambda item: item[0] not in _SHOWN)
        if len(values) > 1
    ]
