"""The process of a streaming engine: it runs a whole load and tells what became of each request. See ``deploy.bench.streaming``."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from cachebus.engine.transfer import PARAMS_KEY
from deploy.bench.load import Command, Emptied, Empty, Load, Ran, Ready, Request, Served, token_ids
from deploy.bench.offline import ANSWER

_RESET_TRIES, _RESET_SECONDS = 50, 0.2
_FP8 = "fp8"


class _Runner:
    """One load on its way through the engine."""

    def __init__(self, engine: AsyncLLM, load: Load, ids: Iterator[int]) -> None:
        self._engine, self._load, self._ids = engine, load, ids
        self._served: list[Served] = []
        self._left = iter(enumerate(load.requests))
        self._started = time.perf_counter()
        self._exhausted = False

    async def run(self) -> Ran:
        """Sends everything, waits for ``load.seconds`` at most, and aborts what still runs then."""
        requests = self._load.requests
        if self._load.clients:
            needed = [asyncio.create_task(self._client()) for _ in range(self._load.clients)]
            aside = []
        else:
            needed = [asyncio.create_task(self._at(number, one)) for number, one in enumerate(requests) if not one.background]
            aside = [asyncio.create_task(self._at(number, one)) for number, one in enumerate(requests) if one.background]
        # An error of a request ends the process, and with it the measurement.
        ending: asyncio.Future[Any] = asyncio.gather(*needed)
        done, _ = await asyncio.wait([ending], timeout=self._load.seconds)
        for task in (*needed, *aside):
            task.cancel()
        if done:
            await ending
        for error in await asyncio.gather(*needed, *aside, return_exceptions=True):
            if isinstance(error, Exception):
                raise error
        return Ran(sorted(self._served, key=lambda one: one.submitted), self._exhausted)

    async def _client(self) -> None:
        for number, request in self._left:
            await self._ask(number, request)
        self._exhausted = True

    async def _at(self, number: int, request: Request) -> None:
        await asyncio.sleep(request.at - (time.perf_counter() - self._started))
        await self._ask(number, request)

    async def _ask(self, number: int, request: Request) -> None:
        ids = token_ids(request.pieces)
        name = f"bench-{next(self._ids)}"
        sampling = SamplingParams(
            max_tokens=request.answer,
            temperature=0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
            extra_args=_following(name, request.follow_ms) if request.follow_ms else None,
        )
        times: list[float] = []
        generated: list[int] = []
        cached, finished = 0, False
        submitted = time.perf_counter() - self._started
        try:
            async for out in self._engine.generate(tokens_input(ids), sampling, name):
                new = out.outputs[0].token_ids
                # Tokens of one step that were read together came together.
                times += [time.perf_counter() - self._started] * len(new)
                generated += new
                cached, finished = out.num_cached_tokens or 0, out.finished
        finally:
            first, last = (times[0], times[-1]) if times else (None, None)
            detail = (times, generated) if self._load.detail else ([], [])
            self._served.append(Served(number, submitted, len(ids), cached, len(generated), first, last, finished, *detail))


def _following(name: str, follow_ms: int) -> dict[str, Any]:
    """What the router would say of a request whose prompt another engine is computing."""
    return {"kv_transfer_params": {PARAMS_KEY: {"transfer_id": name, "leg": "decode", "follow_ms": follow_ms}}}


async def _empty_hbm(engine: AsyncLLM) -> bool:
    """Whether vLLM's own prefix cache is empty now; what still runs may hold blocks for a while."""
    for _ in range(_RESET_TRIES):
        if await engine.reset_prefix_cache():
            return True
        await asyncio.sleep(_RESET_SECONDS)
    return False


def _ready(engine: AsyncLLM) -> Ready:
    config = engine.vllm_config
    model, cache = config.model_config, config.cache_config
    heads = model.get_num_kv_heads(config.parallel_config) * model.get_head_size()
    width = 1 if cache.cache_dtype.startswith(_FP8) else model.dtype.itemsize
    token_bytes = 2 * model.get_num_layers(config.parallel_config) * heads * width
    return Ready(cache.num_gpu_blocks * cache.block_size, token_bytes)


async def _main() -> None:
    options = json.loads(sys.stdin.readline())
    if transfer := options.pop("kv_transfer_config", None):
        options["kv_transfer_config"] = KVTransferConfig(**transfer)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    # As vLLM's own server does: what the start left is not looked through again, in the middle of an answer.
    gc.collect()
    gc.freeze()
    _say(_ready(engine))
    ids = itertools.count()
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = msgspec.json.decode(line, type=Command)
        if isinstance(command, Empty):
            _say(Emptied(await _empty_hbm(engine)))
        else:
            _say(await _Runner(engine, command, ids).run())


def _say(answer: msgspec.Struct) -> None:
    print(f"\n{ANSWER}{msgspec.json.encode(answer).decode()}", flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
