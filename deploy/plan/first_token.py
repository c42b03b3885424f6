"""Time to first token over all kinds of requests, waiting included. Pure; times are seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deploy.plan.figures import Floats
from deploy.plan.queueing import Queue, quantile

Queues = tuple[tuple[Queue, Floats], ...]
"""Where requests wait, each with 1 for the kinds that wait there and else 0; no kind waits in two."""


@dataclass(frozen=True)
class FirstToken:
    """Mean and 99th percentile of the requests named; of none of them both are nan."""

    mean: float
    p99: float


def first_token(share: Floats, alone: Floats, queues: Queues) -> FirstToken:
    """``share`` of the kinds, not all of them if wished; ``alone``: their seconds without waiting."""
    whole = float(share.sum())
    if whole <= 0:
        return FirstToken(math.nan, math.nan)
    weights = share / whole
    # Kinds that don't come may have an endless queue before them.
    waits = sum((np.where((there > 0) & (weights > 0), queue.mean_wait, 0.0) for queue, there in queues), np.zeros_like(alone))
    mean = float(np.dot(weights, alone + waits))
    if not math.isfinite(mean):
        return FirstToken(math.inf, math.inf)

    def exceeds(seconds: float) -> float:
        slack = seconds - alone
        longer = np.where(slack < 0, 1.0, 0.0)
        for queue, there in queues:
            longer = np.where(there > 0, queue.waits_longer(slack), longer)
        return float(np.dot(weights, longer))

    return FirstToken(mean, quantile(exceeds, 0.99))
