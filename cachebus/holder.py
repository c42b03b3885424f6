"""The life of a client, made visible: a shared lock on a file, which the kernel drops when the last process that took it ends.

ZeroMQ does not show a peer's death and process ids do not cross container namespaces; a lock does both. The processes of one engine lock
one file, so their leases last until the last of them is dead.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path

from cachebus.errors import BusError

HOLDER_NAME_LENGTH = 32
_FOLDER = "holders"
_NAME = re.compile(rf"[0-9a-z]{{1,{HOLDER_NAME_LENGTH}}}")


class Holder:
    """Takes the lock of holder ``name`` (a new one where it is "") until ``close`` or the end of the process."""

    def __init__(self, run_dir: Path, name: str = "") -> None:
        self.id = name or secrets.token_hex(16)
        path = _path(run_dir, self.id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Lets go of the lock."""
        os.close(self._descriptor)


def is_alive(run_dir: Path, name: str) -> bool:
    """Whether any process still holds the lock; the file of a dead holder is removed."""
    path = _path(run_dir, name)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    path.unlink(missing_ok=True)
    return False


def living(run_dir: Path) -> set[str]:
    """Every holder whose lock is held."""
    folder = run_dir / _FOLDER
    names = [path.stem for path in folder.glob("*.lock")] if folder.is_dir() else []
    return {name for name in names if is_alive(run_dir, name)}


def _path(run_dir: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise BusError(f"{name!r} can't name a holder: 1 to 32 digits and small letters")
    return run_dir / _FOLDER / f"{name}.lock"
