"""A process and all it started: an engine is an API server, an engine core and its workers, and none may outlive the others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_MULTIPROCESSING = ("/dev/shm/psm_", "/dev/shm/sem.mp-")


def die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    stdout: IO[bytes] | int | None,
    stderr: IO[bytes] | int | None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own that ends with this process. Call it from the main thread."""
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock is touched
    )


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, nearest first."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop(0)}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = [int(child) for child in task.read_text().split()]
                found += children
                waiting += children
    return found


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return fields.rpartition(")")[2].split()[0] not in "ZX"


def shared_memory(pids: Iterable[int]) -> set[Path]:
    """The shared memory of Python's multiprocessing that the processes have mapped."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            mapped = (line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
            found.update(Path(path) for path in mapped if path.startswith(_MULTIPROCESSING))
    return found


def kill_tree(process: subprocess.Popen[bytes], known: Sequence[int] = (), shared: Iterable[Path] = ()) -> None:
    """Kills a process with all below it and waits for it; what shared memory a killed process can't remove itself is removed.

    ``known`` and ``shared``: processes and their shared memory that were seen before some of them died.
    """
    everybody = {*descendants(process.pid), *known}
    left = {*shared, *shared_memory([process.pid, *everybody])}
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in everybody:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    for path in left:
        path.unlink(missing_ok=True)
