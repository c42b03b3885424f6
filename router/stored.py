"""Responses are not stored: what would need a stored one is refused by name.

vLLM keeps them, where it is told to, in the memory of the API server that made them and never drops one. A cluster whose workers come and go can't
promise to find one again, so nothing is stored, and a conversation goes on by sending its items again; their KV is what is kept.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.apis import RESPONSES
from router.errors import ApiError

UNSTORED: dict[str, Any] = {"store": False}
"""What every response is asked with."""


def check_stored(body: dict[str, Any]) -> None:
    """Raises ApiError (400) where a response is to be stored for later, or to go on from one that was."""
    for name, instead in (("background", "wait for the answer, or stream it"), ("previous_response_id", "send the conversation's items again")):
        if body.get(name):
            raise ApiError(400, f"{name} needs a stored response, and responses are not stored here: {instead}", code="not_stored", param=name)


def routes() -> list[Route]:
    """Asking for stored responses: there are none."""

    async def none(request: Request) -> Response:
        text = f"no response {request.path_params['response_id']} is stored: responses are not stored here"
        return ApiError(404, text, code="not_stored", param="response_id").response({}, request.url.path)

    one = f"{RESPONSES}/{{response_id}}"
    return [Route(one, none, methods=["GET", "DELETE"]), Route(f"{one}/cancel", none, methods=["POST"]), Route(f"{one}/input_items", none)]
