"""Keeps an idle engine on CPU from taking a core from the engine that computes.

vLLM's processes read each other's messages from shared memory: a reader spins for a second after the last message before it sleeps.
On a machine of its own that costs nothing. Where a prefill and a decode worker share cores, the prefill worker spins just
while the decode worker starts, pinned to the same core: measured on two cores, a prompt of 2,048 tokens took 1.2 s instead of
0.5 s when another engine had just ended a request. vLLM has no setting for it.
"""

from __future__ import annotations

from vllm.distributed.device_communicators import shm_broadcast

# Not much shorter: ZeroMQ drops a wake-up that follows another within about a millisecond, and the reader that misses it sleeps 5 s.
SPIN_SECONDS = 0.02


def limit_idle_spin() -> None:
    """Lets every reader of this process spin ``SPIN_SECONDS`` at most. A vLLM without such readers is left as it is."""
    condition = getattr(shm_broadcast, "SpinCondition", None)
    if condition is None or getattr(condition.wait, "limits", False):
        return
    wait = condition.wait

    def limited(self: object, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = SPIN_SECONDS  # type: ignore[attr-defined]
        wait(self, timeout_ms)

    limited.limits = True  # type: ignore[attr-defined]
    condition.wait = limited
