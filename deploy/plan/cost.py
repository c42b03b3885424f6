"""Money. Pure."""

from __future__ import annotations

from decimal import ROUND_DOWN, Decimal

HOUR = 3600.0
REQUESTS = 1000


def of_gpu_time(requests: float, seconds: float, price_per_hour: float) -> float:
    """Dollars for ``seconds`` of a worker's GPUs each, at what they cost an hour together."""
    return requests * seconds / HOUR * price_per_hour


def per_million_tokens(dollars_per_hour: float, tokens_per_second: float) -> float:
    """Dollars for a million tokens, prompts and answers alike."""
    return dollars_per_hour / (tokens_per_second * HOUR) * 1e6


def shown(dollars: float, places: int = 2) -> str:
    """An amount for people, cut after ``places`` and not rounded: 17.4778 is $17.47."""
    # 28 times 3.80 is 106.39999999999999 to a float.
    exact = Decimal(repr(round(dollars, places + 6)))
    return f"${exact.quantize(Decimal(1).scaleb(-places), ROUND_DOWN):,}"
