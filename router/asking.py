"""Endpoints that an engine answers without KV: a request goes to any worker of its model as it came."""

from __future__ import annotations

from contextlib import AsyncExitStack

from router.apis import EMBEDDINGS
from router.caps import check_body
from router.decoding import Call
from router.endpoint import Endpoint
from router.errors import ApiError, said
from router.fields import parse_body
from router.legs import EngineAnswer


class AskingEndpoint(Endpoint):
    """One of ``router.apis.ASKING``. What takes no place in an engine's batch does not queue for one."""

    async def _work(self, call: Call, raw: bytes) -> None:
        async with AsyncExitStack() as places:
            if self._path == EMBEDDINGS:
                await places.enter_async_context(self._gateway.door.inside(call.urgency))
            kind, answer = await self._asked(call, raw)
        await call.begin(call.headers | {"content-type": kind, "content-length": str(len(answer))})
        await call.pass_on(answer, more=False)

    async def _asked(self, call: Call, raw: bytes) -> tuple[str, bytes]:
        body = parse_body(raw)
        check_body(self._gateway.settings, raw, body)
        worker = self._gateway.any_decode_worker(body.get("model") or None)
        model = body.get("model") or worker.model
        try:
            _, found = await self._anywhere(worker, model, lambda asked: self._gateway.legs.ask(asked, self._path, raw, call.request_id))
        except EngineAnswer as answer:
            if answer.status == 404 and said(answer.body) is None:
                # Of a path that vLLM does not know at all it says so in no API's form.
                raise ApiError(404, f"The model `{model}` does not serve {self._path}.", code="unsupported_by_model") from answer
            raise
        return found
