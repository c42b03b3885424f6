"""A streaming engine without a server, in a process of its own: many requests at a time, with the time of every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cachebus.errors import HeadstartError
from deploy.bench.load import Command, Emptied, Empty, Load, Ran, Ready, Request, Served
from deploy.bench.offline import STILL_HELD, EngineProcess

_Answer = TypeVar("_Answer")


class StreamingEngine(EngineProcess):
    """One ``vllm.v1.engine.async_llm.AsyncLLM``; it serves once ``await_ready`` has returned."""

    def __init__(self, options: Mapping[str, Any], log: Path, environment: Mapping[str, str | None] | None = None) -> None:
        super().__init__("deploy.bench.streaming_process", options, log, environment)

    def await_ready(self) -> None:
        """Waits for the engine; from then on ``capacity`` says how much KV it holds."""
        self.capacity = msgspec.json.decode(self.receive(), type=Ready)

    def run(self, load: Load) -> list[Served]:
        """What became of each request that was sent. Raises HeadstartError where clients ran out of requests."""
        ran = self._call(load, Ran)
        if ran.exhausted:
            raise HeadstartError(f"{len(load.requests)} requests did not last {load.seconds:g} s")
        return ran.served

    def answers(self, requests: Sequence[Request], seconds_max: float, clients: int = 0) -> list[Served]:
        """Every request's answer, in the order of ``requests``. Raises HeadstartError where one is not whole after ``seconds_max``."""
        served = self._call(Load(list(requests), seconds_max, clients, detail=True), Ran).served
        if len(served) < len(requests) or not all(one.finished for one in served):
            raise HeadstartError(f"{len(requests)} requests were not answered within {seconds_max:g} s")
        return sorted(served, key=lambda one: one.number)

    def empty_hbm(self) -> None:
        """Empties vLLM's own prefix cache; a hit that follows comes from elsewhere."""
        if not self._call(Empty(), Emptied).empty:
            raise HeadstartError(STILL_HELD)

    def _call(self, command: Command, answer: type[_Answer]) -> _Answer:
        return msgspec.json.decode(self.send(msgspec.json.encode(command)), type=answer)
