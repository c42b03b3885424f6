"""Which chunks lie in which worker's HBM, as the supervisors say. A plain state machine, part of ``cachebus.members``.

What is not known for sure is not known at all: an account ends when its worker leaves, says nothing for a while, or starts over, and
routers are told at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cachebus.effects import Effect, Publish
from cachebus.errors import BusError
from cachebus.keys import KEY_BYTES
from cachebus.messages_hbm import HBM_KEYS_MAX, HbmChanged, ReportHbm

SILENCE_MS_MAX = 5000
CHUNKS_MAX = 1 << 18
"""Chunks that one worker may name: 67 million tokens at 256 a chunk, and 8 MiB of keys."""


@dataclass
class _Account:
    heard_ms: float
    keys: set[bytes] = field(default_factory=set)


@dataclass
class HbmAccounts:
    """Accounts by the worker's name. Who may speak for a worker is checked before."""

    gaps: int = 0
    """How often events of an engine were lost for good, all workers together."""
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def open(self, worker: str, now_ms: float) -> list[Effect]:
        """Begins an account, or begins it anew."""
        effects = self.end(worker)
        self._accounts[worker] = _Account(now_ms)
        return effects

    def report(self, request: ReportHbm, now_ms: float) -> list[Effect]:
        """Takes a report in. Raises BusError where no account is open or the report can't be one."""
        account = self._accounts.get(request.worker)
        if account is None:
            raise BusError(f"{request.worker} has no open account of its HBM")
        keys = request.stored + request.removed
        if len(keys) > 2 * HBM_KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
            raise BusError(f"a report on HBM holds at most {HBM_KEYS_MAX} keys of {KEY_BYTES} bytes each way")
        account.heard_ms = now_ms
        self.gaps += max(0, request.gaps)
        stored = [key for key in dict.fromkeys(request.stored) if key not in account.keys]
        removed = [key for key in dict.fromkeys(request.removed) if key in account.keys]
        if len(account.keys) - len(removed) + len(stored) > CHUNKS_MAX:
            raise BusError(f"{request.worker} names more than {CHUNKS_MAX} chunks in its HBM")
        account.keys.difference_update(removed)
        account.keys.update(stored)
        return [Publish(HbmChanged(request.worker, stored, removed))] if stored or removed else []

    def end(self, worker: str) -> list[Effect]:
        """Nothing is known of the worker's HBM any more."""
        account = self._accounts.pop(worker, None)
        return [Publish(HbmChanged(worker, [], [], whole=True))] if account is not None and account.keys else []

    def end_silent(self, now_ms: float) -> list[Effect]:
        """Ends the accounts of supervisors that say nothing."""
        silent = [worker for worker, account in self._accounts.items() if now_ms - account.heard_ms > SILENCE_MS_MAX]
        return [effect for worker in silent for effect in self.end(worker)]

    def keys(self) -> dict[str, list[bytes]]:
        """The chunks in each worker's HBM."""
        return {worker: list(account.keys) for worker, account in self._accounts.items()}

    def counts(self) -> dict[str, int]:
        """How many they are, for workers with an account."""
        return {worker: len(account.keys) for worker, account in self._accounts.items()}
