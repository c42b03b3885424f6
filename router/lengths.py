"""How many tokens a request can have at most, guessed from its bytes: a short one need not be rendered to be routed.

A short prompt goes to decode whatever is cached, and rendering it costs a round trip to a worker, a twentieth of a prefill of
512 tokens. The guess is the fewest bytes a token took in the requests of that model that were rendered; before any
was, one byte. A wrong guess costs a prefill on a decode worker and changes no token.
"""

from __future__ import annotations

_MARGIN = 1.25
"""A request may be denser than those that were rendered lately."""

_FORGET = 1.001
"""Growth of the fewest bytes with every request rendered, so that one odd request is forgotten after some hundreds."""


class Lengths:
    """Bytes for each token, by model."""

    def __init__(self) -> None:
        self._bytes_min: dict[str, float] = {}

    def tokens_max(self, model: str, body_bytes: int) -> float:
        """The most tokens that a request with a body of that size is thought to have."""
        densest = self._bytes_min.get(model)
        return body_bytes if densest is None else _MARGIN * body_bytes / densest

    def learn(self, model: str, body_bytes: int, tokens: int) -> None:
        """A request was rendered."""
        if tokens:
            found = body_bytes / tokens
            self._bytes_min[model] = min(found, self._bytes_min.get(model, found) * _FORGET)
