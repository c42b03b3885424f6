"""Prompts that were computed for another engine: their blocks are kept until it has them. A plain state machine.

The daemon says when nobody follows a prompt any more (``cachebus.offers``). A hold is bounded all the same, in time also where the daemon is silent,
and in blocks. Nothing is wrong with a block that goes too early: who reads it sees by its digest, and has it from the region.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cachebus.engine.views import Bus, Policy
from cachebus.keys import rank_key
from cachebus.messages_handover import Hold


@dataclass
class _Held:
    request_id: str
    blocks: int
    deadline_ms: float = 0.0
    over: bool = False


class Holds:
    """Of one engine; with ``policy.hold_ms`` 0 nothing is held."""

    def __init__(self, policy: Policy, bus: Bus) -> None:
        self._policy, self._bus = policy, bus
        self._held: dict[int, _Held] = {}

    def begin(self, request_id: str, keys: Iterable[bytes], blocks: int) -> bool:
        """A request has ended that computed these keys; whether its ``blocks`` are kept, and named by ``over`` later, once."""
        policy = self._policy
        if not policy.hold_ms or self.blocks + blocks > policy.hold_blocks_max:
            return False
        parts = [rank_key(key, rank) for key in keys for rank in range(len(policy.holders))]
        ticket = self._bus.submit(Hold(policy.holders[0], parts, policy.hold_ms))
        self._held[ticket] = _Held(request_id, blocks)
        return True

    def answered(self, ticket: int) -> bool:
        """The daemon answered a ticket; whether it was a hold's."""
        held = self._held.get(ticket)
        if held is not None:
            held.over = True
        return held is not None

    def over(self, now_ms: float) -> list[str]:
        """The requests whose blocks need not be kept any more, each once."""
        for held in self._held.values():
            held.deadline_ms = held.deadline_ms or now_ms + self._policy.hold_ms
            held.over = held.over or now_ms >= held.deadline_ms
        ended = {ticket: held.request_id for ticket, held in self._held.items() if held.over}
        for ticket in ended:
            del self._held[ticket]
        return list(ended.values())

    @property
    def blocks(self) -> int:
        """How many are kept."""
        return sum(held.blocks for held in self._held.values())
