"""The settings by which the pools' wanted sizes are decided."""

from __future__ import annotations

import math

from cachebus.settings_file import Problem, Section, negative

_ABOVE_ZERO = ("prefill_busy", "backlog_seconds", "kv_blocks_used", "inter_token_seconds", "prefill_per_decode_max")


class ScalingSettings(Section, frozen=True):
    """How many workers each pool should have, as the router answers at /scaling; whoever scales asks there"""

    prefill_min: int = 1
    """Fewest prefill workers; 0: none while the cache serves everything"""
    prefill_max: int = 4
    """Most prefill workers"""
    decode_min: int = 1
    """Fewest decode workers"""
    decode_max: int = 8
    """Most decode workers"""
    prefill_busy: float = 0.7
    """Share of their time that prefill workers may compute"""
    backlog_seconds: float = 2.0
    """Seconds of prefill that may wait for each prefill worker"""
    kv_blocks_used: float = 0.8
    """Share of the decode workers' KV blocks that may be in use"""
    inter_token_seconds: float = 0.05
    """Mean seconds between two tokens of a stream"""
    prefill_per_decode_min: float = 0.1
    """Guard: fewest prefill workers for each decode worker, rounded down; none at all is another matter"""
    prefill_per_decode_max: float = 4.0
    """Guard: most prefill workers for each decode worker, rounded up"""
    shrink_seconds: int = 300
    """A pool gets smaller only where it was larger than needed for so long"""
    zero_seconds: int = 600
    """The prefill pool goes to 0 only where nobody lacked router.prefill_tokens_min tokens for so long"""
    reading_seconds: int = 5
    """How often workers' metrics are read and sizes decided; 0: never, and /scaling does not answer"""

    def problems(self) -> list[Problem]:
        found = negative(self, "prefill_min", "prefill_per_decode_min", "shrink_seconds", "zero_seconds", "reading_seconds")
        found += [(key, f"{getattr(self, key)} is too small; give more than 0") for key in _ABOVE_ZERO if not getattr(self, key) > 0]
        found += [(key, f"{getattr(self, key)} is more than 1") for key in ("prefill_busy", "kv_blocks_used") if getattr(self, key) > 1]
        if self.decode_min < 1:
            found.append(("decode_min", f"{self.decode_min}: somebody has to answer; give at least 1"))
        for pool in ("prefill", "decode"):
            least, most = getattr(self, f"{pool}_min"), getattr(self, f"{pool}_max")
            if most < max(1, least):
                found.append((f"{pool}_max", f"{most} is less than {pool}_min ({least}), or than 1"))
        if found:
            return found
        least, most = self.prefill_per_decode_min, self.prefill_per_decode_max
        if most < least:
            found.append(("prefill_per_decode_max", f"{most} is less than prefill_per_decode_min ({least})"))
        elif self.prefill_min > math.ceil(most * self.decode_max):
            found.append(("prefill_per_decode_max", f"{most} of {self.decode_max} decode workers are fewer than prefill_min ({self.prefill_min})"))
        elif self.prefill_max < math.floor(least * self.decode_min):
            found.append(("prefill_per_decode_min", f"{least} of {self.decode_min} decode workers are more than prefill_max ({self.prefill_max})"))
        return found
