"""Who waits for a key that is being written, computed or looked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from cachebus.messages import Acquire


@dataclass
class Waiter:
    """An acquire of a client, under its ticket, that is answered at ``deadline_ms`` at the latest."""

    client: bytes
    ticket: int
    request: Acquire
    deadline_ms: float
    probe: int = 0
    """The probe whose answer it waits for; 0: none."""
    probed_to: dict[str, int] = field(default_factory=dict)
    """How many of its keys, from the first on, others were asked for or need not be, by who was asked."""
