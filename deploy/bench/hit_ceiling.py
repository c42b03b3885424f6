"""The most that a cache could hit of a sequence of prompts: without a limit, and with room for a number of blocks. Pure.

A prompt is its blocks' ids in order; an id names everything before the block, too, so a prompt's hits are those blocks at its beginning that are in
the cache. They are looked up when the request arrives, and all its blocks are there as soon as it has. Of a prompt that must make room the end goes
first: it is of no use alone.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence

Prompt = Sequence[int]


def hits_unlimited(prompts: Iterable[Prompt]) -> list[int]:
    """How many blocks of each prompt a cache without limit has."""
    seen: set[int] = set()
    found = []
    for prompt in prompts:
        found.append(_leading(prompt, seen))
        seen.update(prompt)
    return found


def hits_lru(prompts: Iterable[Prompt], capacity: int) -> list[int]:
    """How many blocks of each prompt a cache of ``capacity`` blocks has that evicts what was used longest ago."""
    kept: OrderedDict[int, None] = OrderedDict()
    found = []
    for prompt in prompts:
        found.append(_leading(prompt, kept))
        # The end first, so that a prompt's beginning is the last to go.
        for block in reversed(prompt):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > capacity:
            kept.popitem(last=False)
    return found


def hits_optimal(prompts: Sequence[Prompt], capacity: int) -> list[int]:
    """How many blocks of each prompt the best possible cache of ``capacity`` blocks has, which knows all prompts to come.

    Belady's MIN (IBM Systems Journal 5(2), 1966), with the liberty not to keep a block at all: what is needed again the latest is not kept. No block
    is needed later than those behind it, so ends go before beginnings, and what is kept can always be used.
    """
    uses: dict[int, deque[int]] = defaultdict(deque)
    for number, prompt in enumerate(prompts):
        for block in prompt:
            uses[block].append(number)
    kept: dict[int, float] = {}
    latest: list[tuple[float, int, int]] = []
    found = []
    for prompt in prompts:
        found.append(_leading(prompt, kept))
        for depth, block in enumerate(prompt):
            uses[block].popleft()
            following = uses[block][0] if uses[block] else math.inf
            kept[block] = following
            heapq.heappush(latest, (-following, -depth, block))
        while len(kept) > capacity:
            due, _, block = heapq.heappop(latest)
            # An entry that a later use of the block has replaced is passed over.
            if kept.get(block) == -due:
                del kept[block]
    return found


def _leading(prompt: Prompt, kept: Iterable[int] | set[int] | OrderedDict[int, None] | dict[int, float]) -> int:
    return next((place for place, block in enumerate(prompt) if block not in kept), len(prompt))
