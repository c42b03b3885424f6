"""ZeroMQ between an engine and its supervisor: the engine publishes its KV cache events, and repeats those of its last steps when asked.

The engine side is vLLM's. It never waits for a subscriber: what one does not take in time is dropped, and the next number shows the gap.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import zmq

from cachebus.zeromq import MESSAGE_BYTES_MAX, QUEUE_MAX

STEPS_KEPT = 2000
"""Engine steps that can be repeated; each keeps its token ids in the engine's memory, 10 KB for one of 2,048 tokens."""

_NAME_LETTERS = 7
_NUMBER_BYTES = 8


@dataclass(frozen=True)
class EngineEndpoints:
    """The two sockets of one engine, in the run directory. Their names are as long as the bus's own, so they fit where those do."""

    events: Path
    replay: Path

    @classmethod
    def make(cls, run_dir: Path) -> EngineEndpoints:
        """Names that no other engine has: one whose supervisor has not heard of its end yet may still hold its own."""
        name = secrets.token_urlsafe(_NAME_LETTERS)[:_NAME_LETTERS]
        return cls(run_dir / f"kv{name}.e", run_dir / f"kv{name}.r")

    def remove(self) -> None:
        """Removes what a killed engine leaves of them."""
        for path in (self.events, self.replay):
            path.unlink(missing_ok=True)


class EngineEvents:
    """The supervisor's two sockets. For one thread. They have no heartbeats: whose engine dies sees it in other ways."""

    def __init__(self, endpoints: EngineEndpoints) -> None:
        self._context = zmq.Context(io_threads=1)
        self._subscriber = self._context.socket(zmq.SUB)
        self._replay = self._context.socket(zmq.DEALER)
        for socket, path in ((self._subscriber, endpoints.events), (self._replay, endpoints.replay)):
            socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
            socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
            socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 20)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
            if socket is self._subscriber:
                socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(f"ipc://{path}")

    def receive(self, wait_ms: int) -> tuple[int, bytes] | None:
        """Number and payload of the next batch; None where none comes in time."""
        return _numbered(self._subscriber.recv_multipart()) if self._subscriber.poll(wait_ms) else None

    def replayed(self, first: int, wait_ms: int) -> list[tuple[int, bytes]]:
        """The batches from ``first`` on that the engine still has, as far as they come in time."""
        while self._replay.poll(0):
            # What an earlier question was too impatient for.
            self._replay.recv_multipart()
        try:
            self._replay.send_multipart([b"", first.to_bytes(_NUMBER_BYTES, "big")], zmq.NOBLOCK)
        except zmq.Again:
            return []
        found: list[tuple[int, bytes]] = []
        deadline = time.monotonic() + wait_ms / 1000
        while self._replay.poll(max(0, round((deadline - time.monotonic()) * 1000))):
            batch = _numbered(self._replay.recv_multipart())
            if batch is None:
                # The mark of the end is numbered -1.
                return found
            found.append(batch)
        return found

    def close(self) -> None:
        """Closes both sockets."""
        self._context.destroy(linger=0)


def _numbered(frames: list[bytes]) -> tuple[int, bytes] | None:
    """vLLM puts its topic and a delimiter before the number in one version, and leaves the topic out of repeated batches in another."""
    if len(frames) < 2 or len(frames[-2]) != _NUMBER_BYTES:
        return None
    number = int.from_bytes(frames[-2], "big", signed=True)
    return (number, frames[-1]) if number >= 0 else None
