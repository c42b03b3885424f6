"""What becomes of each kind of request: pulled or computed, on which pool, and how long that takes without waiting. Pure; times are seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.plan.figures import Floats
from deploy.plan.rates import Rates
from deploy.plan.traffic import Requests

ROUTER_SECONDS = 0.003
"""What the router and its second HTTP leg add to a request (benchmarks/epyc-2-cores/router.json: 2 to 5 ms)."""


@dataclass(frozen=True)
class Service:
    """One figure for each kind of request. ``by_prefill``: a prefill worker computes it.

    ``compute``: seconds for which it has its worker to itself; ``pull``: those before that, in which others go on. ``taken``: tokens from each tier.
    """

    by_prefill: NDArray[np.bool_]
    compute: Floats
    pull: Floats
    taken: Mapping[str, Floats]

    @property
    def own(self) -> Floats:
        """A worker's seconds up to the first token, without hand-over and waiting."""
        return self.compute + self.pull


def service(requests: Requests, rates: Rates, bandwidths: Mapping[str, float], prefill_tokens_min: int) -> Service:
    """``bandwidths``: bytes a second of the tiers below DRAM. What is sooner computed is not pulled, as workers have it."""
    found = requests.all_cached
    rest = np.maximum(requests.prompt - found, 0.0)
    pull = rates.hit(found)
    for name, bandwidth in bandwidths.items():
        tokens = requests.cached.get(name)
        if tokens is not None:
            # The tiers are read side by side, while what came is copied on.
            pull = np.maximum(pull, rates.hit(np.zeros_like(tokens)) + tokens * rates.kv_bytes_per_token / bandwidth)
    with_hit, cold = pull + rates.compute(found, rest), rates.cold(requests.prompt)
    pays = (found > 0) & (with_hit < cold)
    missing = np.where(pays, rest, requests.prompt)
    return Service(
        by_prefill=missing >= prefill_tokens_min,
        compute=np.where(pays, with_hit - pull, cold),
        pull=np.where(pays, pull, 0.0),
        taken={name: np.where(pays, tokens, 0.0) for name, tokens in requests.cached.items()},
    )
