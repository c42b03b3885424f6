"""What other nodes may read of the region, and until when.

A worker's lease ends with the worker, never by time, since its copy may still land after a stall. Another node's ends by time: this daemon itself
sends the bytes, and whoever receives them checks their digest, so a chunk that is overwritten while it is sent is a miss over there.
"""

from __future__ import annotations

import bisect
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cachebus.messages_peers import Lent, LentChunk

LOAN_MS = 5000
TOKEN_BYTES = 16


@dataclass(frozen=True)
class _Loan:
    token: bytes
    offsets: list[int]
    ends: list[int]
    deadline_ms: float


class Lending:
    """The loans of one daemon. Its thread lends and ends; any thread may ask what may be read."""

    def __init__(self) -> None:
        self._loans: dict[int, _Loan] = {}

    def __len__(self) -> int:
        return len(self._loans)

    def lend(self, lease: int, chunks: Sequence[LentChunk], now_ms: float) -> Lent:
        """Makes a loan of a lease that was granted (0: of nothing)."""
        if not lease:
            return Lent(0, b"", [])
        token = secrets.token_bytes(TOKEN_BYTES)
        places = sorted((chunk.offset, chunk.offset + chunk.length) for chunk in chunks)
        self._loans[lease] = _Loan(token, [start for start, _ in places], [end for _, end in places], now_ms + LOAN_MS)
        return Lent(lease, token, list(chunks))

    def ended(self, now_ms: float) -> list[int]:
        """The leases whose time is up; they are loans no more."""
        over = [lease for lease, loan in self._loans.items() if loan.deadline_ms <= now_ms]
        for lease in over:
            del self._loans[lease]
        return over

    def may_read(self, lease: int, token: bytes, offset: int, length: int) -> bool:
        """Whether the token opens these bytes: they lie within one chunk of the loan."""
        loan = self._loans.get(lease)
        if loan is None or not hmac.compare_digest(loan.token, token):
            return False
        number = bisect.bisect_right(loan.offsets, offset) - 1
        return number >= 0 and length > 0 and offset + length <= loan.ends[number]
