"""What a router is told of workers on other nodes. A plain state machine of a daemon that has ``cache.peer_workers``.

Routers know one bus. Where they run apart from the workers, their bus follows the workers' buses as it follows peers, and says on what those say of
their own workers: who is there, what is in whose HBM, what became of a request, whose cache was cleared.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

import msgspec

from cachebus.effects import Effect, Publish
from cachebus.messages import Event, Report, Worker, WorkerDown, WorkerUp
from cachebus.messages_hbm import HbmChanged
from cachebus.messages_tools import Cleared

log = logging.getLogger("headstart.cachebus")


class Elsewhere:
    """Workers of other nodes by name; ``Worker.node`` says whose each is."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._hbm: dict[str, set[bytes]] = {}

    def learn(self, node: str, event: Event, own: Collection[str]) -> list[Effect]:
        """Takes in what a node says; ``own``: names of workers of this bus. A name that somebody else has already is not taken in."""
        if isinstance(event, WorkerUp):
            name = event.worker.worker
            known = self._workers.get(name)
            if name in own or (known is not None and known.node != node):
                log.error("a worker of %s is called %s as another one is: give each its own --name; it is passed over", node, name)
                return []
            self._workers[name] = msgspec.structs.replace(event.worker, node=node)
            return [Publish(WorkerUp(self._workers[name]))]
        if isinstance(event, Cleared):
            return [Publish(msgspec.structs.replace(event, node=node))]
        if not isinstance(event, WorkerDown | HbmChanged | Report):
            return []
        known = self._workers.get(event.worker)
        if known is None or known.node != node:
            return []
        if isinstance(event, WorkerDown):
            del self._workers[event.worker]
            self._hbm.pop(event.worker, None)
        elif isinstance(event, HbmChanged):
            event.change(self._hbm.setdefault(event.worker, set()))
        return [Publish(event)]

    def workers(self) -> list[Worker]:
        """Every one of them."""
        return list(self._workers.values())

    def hbm(self) -> dict[str, list[bytes]]:
        """The chunks in each worker's HBM, as far as that is told."""
        return {worker: list(keys) for worker, keys in self._hbm.items()}
