"""Why a request went the way it went, for the client who asked with ``x-headstart-explain: 1``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from router.costs import Way

EXPLAIN = b"x-headstart-explain"
_WAYS_MAX = 5
_DIGITS = 6


def explanation(ways: Sequence[Way]) -> str:
    """The ways that there were as JSON, the one taken first, at most five; seconds of each, and how many tokens it computes.

    A policy that goes by rule knows no seconds; no ways: the prompt was not looked up.
    """
    return msgspec.json.encode(told(ways)).decode()


def told(ways: Sequence[Way]) -> list[dict[str, object]]:
    """The same before it is JSON."""
    return [_told(way) for way in ways[:_WAYS_MAX]]


def _told(way: Way) -> dict[str, object]:
    seconds = {"queue": way.queue, "pull": way.pull, "compute": way.compute, "others": way.others, "total": way.total}
    return {"prefill": way.prefill, "decode": way.decode, "tokens": way.tokens} | {name: round(value, _DIGITS) for name, value in seconds.items()}
