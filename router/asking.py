"""Endpoints that an engine answers without KV: a request goes to any worker of its model as it came."""

from __future__ import annotations

from router.caps import check_body
from router.decoding import Call
from router.endpoint import Endpoint
from router.fields import parse_body


class AskingEndpoint(Endpoint):
    """One of ``router.apis.ASKING``. It does not queue: what comes of it takes no place in an engine's batch."""

    async def _work(self, call: Call, raw: bytes) -> None:
        body = parse_body(raw)
        check_body(self._gateway.settings, raw, body)
        worker = self._gateway.any_decode_worker(body.get("model") or None)
        _, (kind, answer) = await self._anywhere(worker, lambda asked: self._gateway.legs.ask(asked, self._path, raw, call.request_id))
        await call.begin(call.headers | {"content-type": kind, "content-length": str(len(answer))})
        await call.pass_on(answer, more=False)
