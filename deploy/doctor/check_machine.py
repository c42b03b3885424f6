"""Shared memory and limits of processes."""

from __future__ import annotations

from deploy.doctor.facts import LimitFacts, SharedMemoryFacts
from deploy.doctor.finding import Finding, gigabytes, skipped

SHARED_MEMORY, FILES, LOCKED = "shared memory", "open files", "locked memory"
_DOCKER_BYTES = 64 << 20
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")
_FILES_MIN, _FILES_ENOUGH = 1024, 8192


def shared_memory(facts: SharedMemoryFacts, wanted: int) -> Finding:
    """Whether a region of ``wanted`` bytes has room."""
    room = facts.free + facts.own
    values = {"size": float(facts.size), "room": float(room), "wanted": float(wanted)}
    measured = f"{facts.folder}: {gigabytes(facts.size)}, {gigabytes(room)} of it for the region, which wants {gigabytes(wanted)}"
    if facts.size == _DOCKER_BYTES and wanted > room:
        advice = "64 MB is Docker's default: start the container with --shm-size or --ipc=host; in Kubernetes mount an emptyDir with medium Memory"
        return Finding(SHARED_MEMORY, "bad", measured, advice, values)
    if wanted > room:
        return Finding(SHARED_MEMORY, "bad", measured, "lower cache.max_local_cpu_size, or give the file system more: mount -o remount,size=", values)
    if facts.kind not in _IN_MEMORY:
        return Finding(SHARED_MEMORY, "warn", f"{measured}; it is {facts.kind}", "the kernel writes it to disk: correct cache.region_path", values)
    return Finding(SHARED_MEMORY, "ok", measured, "", values)


def open_files(facts: LimitFacts) -> Finding:
    """Whether the router may hold the sockets of many requests, two for each."""
    if facts.files is None:
        return Finding(FILES, "ok", "unlimited")
    most = "unlimited" if facts.files_max is None else str(facts.files_max)
    measured, values = f"{facts.files}, at most {most}", {"limit": float(facts.files)}
    if facts.files >= _FILES_ENOUGH:
        return Finding(FILES, "ok", measured, "", values)
    advice = "a router holds two sockets a request: ulimit -n 65536 before it starts, LimitNOFILE= in systemd, --ulimit nofile= in Docker"
    return Finding(FILES, "bad" if facts.files < _FILES_MIN else "warn", measured, advice, values)


def locked_memory(facts: LimitFacts, wanted: int) -> Finding:
    """Whether a region of ``wanted`` bytes may be pinned for a GPU."""
    if not facts.has_gpu:
        return skipped(LOCKED, "no GPU: nothing is pinned")
    if facts.locked_bytes is None:
        return Finding(LOCKED, "ok", "unlimited")
    measured, values = f"{gigabytes(facts.locked_bytes)}; the region wants {gigabytes(wanted)}", {"limit": float(facts.locked_bytes)}
    if facts.locked_bytes >= wanted:
        return Finding(LOCKED, "ok", measured, "", values)
    advice = "where the region can't be pinned copies to the GPU are slow: ulimit -l unlimited, LimitMEMLOCK=infinity, --ulimit memlock=-1"
    return Finding(LOCKED, "warn", measured, advice, values)
