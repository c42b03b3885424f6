"""Who takes part: engines and the workers that serve them. A plain state machine, like ``cachebus.directory``.

An engine registers what its KV means (namespace) and how the bytes lie (layout). Living engines of one model must agree
on both: a difference is refused by name, on the side that came second, before it has served anything. A worker is an
engine whose HTTP server answers; only then do routers hear of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cachebus.effects import Answer, Effect, Publish
from cachebus.errors import BusError
from cachebus.hbm import HbmAccounts
from cachebus.messages import Denied, Done, Drain, Leave, RegisterEngine, RegisterWorker, Reply, Worker, WorkerDown, WorkerUp
from cachebus.messages_hbm import HbmOpened, OpenHbm, ReportHbm


@dataclass
class Members:
    """Engines and workers by the worker's name."""

    engines: dict[str, RegisterEngine] = field(default_factory=dict)
    hbm: HbmAccounts = field(default_factory=HbmAccounts)
    _workers: dict[str, RegisterWorker] = field(default_factory=dict)
    _draining: set[str] = field(default_factory=set)

    def register_engine(self, client: bytes, ticket: int, request: RegisterEngine) -> list[Effect]:
        """Admits an engine, or says how it differs from a living one of the same model."""
        for other in self.engines.values():
            if other.model == request.model and other.worker != request.worker:
                differences = _differences(request, other)
                if differences:
                    reason = f"{request.worker} and {other.worker} serve {request.model!r} but disagree: {'; '.join(differences)}"
                    return [Answer(client, ticket, Denied(reason))]
        self.engines[request.worker] = request
        return [Answer(client, ticket, Done()), *self._announce(request.worker)]

    def register_worker(self, client: bytes, ticket: int, request: RegisterWorker) -> list[Effect]:
        """Admits a worker whose engine is registered; the reply says so or why not."""
        known = self._workers.get(request.worker)
        if known is not None and known.holder != request.holder:
            return [Answer(client, ticket, Denied(f"a living worker is already called {request.worker}: give each its own --name"))]
        reply: Reply = Done()
        if request.worker not in self.engines:
            reply = Denied(f"the engine of {request.worker} has not registered with this bus")
            return [Answer(client, ticket, reply)]
        if confusion := self._confusion(request):
            return [Answer(client, ticket, Denied(confusion))]
        self._workers[request.worker] = request
        return [Answer(client, ticket, reply), *self._announce(request.worker)]

    def drain(self, client: bytes, ticket: int, request: Drain) -> list[Effect]:
        """Tells routers to send the worker nothing new."""
        self._draining.add(request.worker)
        return [Answer(client, ticket, Done()), *self._announce(request.worker)]

    def leave(self, client: bytes, ticket: int, request: Leave) -> list[Effect]:
        """Forgets a worker that ends."""
        return [Answer(client, ticket, Done()), *self._forget(request.worker)]

    def open_hbm(self, client: bytes, ticket: int, request: OpenHbm, now_ms: float) -> list[Effect]:
        """Lets a worker's supervisor say what is in its engine's HBM. Raises BusError where it is not that worker's."""
        self._check_speaks_for(request.worker, request.holder)
        engine = self.engines[request.worker]
        opened = HbmOpened(engine.namespace, engine.block_size, engine.chunk_size)
        return [*self.hbm.open(request.worker, now_ms), Answer(client, ticket, opened)]

    def report_hbm(self, client: bytes, ticket: int, request: ReportHbm, now_ms: float) -> list[Effect]:
        """Takes in what a supervisor says. Raises BusError where it is not that worker's, or has not begun."""
        self._check_speaks_for(request.worker, request.holder)
        return [*self.hbm.report(request, now_ms), Answer(client, ticket, Done())]

    def holder_died(self, holder: str) -> list[Effect]:
        """Forgets the workers and engines of a dead process."""
        names = [name for name, worker in self._workers.items() if worker.holder == holder]
        names += [name for name, engine in self.engines.items() if engine.holder == holder]
        return [effect for name in dict.fromkeys(names) for effect in self._forget(name)]

    def workers(self) -> list[Worker]:
        """Every worker that routers may know."""
        return [self._view(name) for name in self._workers if name in self.engines]

    def _announce(self, name: str) -> list[Effect]:
        if name in self._workers and name in self.engines:
            return [Publish(WorkerUp(self._view(name)))]
        return []

    def _forget(self, name: str) -> list[Effect]:
        self.engines.pop(name, None)
        self._draining.discard(name)
        known = self._workers.pop(name, None)
        return [*self.hbm.end(name), *([Publish(WorkerDown(name))] if known else [])]

    def _check_speaks_for(self, name: str, holder: str) -> None:
        worker = self._workers.get(name)
        if worker is None or name not in self.engines:
            raise BusError(f"no worker is called {name}")
        if worker.holder != holder:
            raise BusError(f"only the supervisor of {name} may say what is in its HBM")

    def _confusion(self, request: RegisterWorker) -> str:
        """Which name would mean something else at this worker than at a living one; "" where none would."""
        mine = _meanings(request)
        for other in self._workers.values():
            theirs = _meanings(other)
            for name in mine.keys() & theirs.keys():
                if other.worker != request.worker and mine[name] != theirs[name]:
                    return f"{name} is {mine[name]} at {request.worker} and {theirs[name]} at {other.worker}: give one of them another name"
        return ""

    def _view(self, name: str) -> Worker:
        worker, engine = self._workers[name], self.engines[name]
        return Worker(
            worker=name,
            role=worker.role,
            url=worker.url,
            model=worker.model,
            namespace=engine.namespace,
            block_size=engine.block_size,
            chunk_size=engine.chunk_size,
            max_model_len=worker.max_model_len,
            takes_prompt_token_ids=worker.takes_prompt_token_ids,
            draining=name in self._draining,
            chunk_bytes=engine.chunk_bytes,
            parts=engine.namespace_parts | engine.layout_parts,
            adapters=worker.adapters,
        )


def _meanings(worker: RegisterWorker) -> dict[str, str]:
    """What each name stands for that clients may ask a worker for."""
    return {worker.model: "a model", **{name: f"adapter {digest[:12]} of {worker.model}" for name, digest in worker.adapters.items()}}


def _differences(one: RegisterEngine, other: RegisterEngine) -> list[str]:
    found = []
    for mine, theirs in ((one.namespace_parts, other.namespace_parts), (one.layout_parts, other.layout_parts)):
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                found.append(f"{name} is {mine.get(name, 'absent')} here and {theirs.get(name, 'absent')} there")
    return found
