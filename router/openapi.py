"""The router's description of its routes, OpenAPI 3.1: what it takes and answers itself. What is inside a request is the engine's to check,
so bodies are described by what they must have; everything else passes."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from router.apis import ASKING, CHAT, COMPLETIONS, EMBEDDINGS, GENERATING, MESSAGES, RESPONSES, is_anthropic

Schema = dict[str, Any]
_JSON, _EVENTS = "application/json", "text/event-stream"
_TEXT: Schema = {"type": "string"}
_MANY: Schema = {"type": "integer", "minimum": 1}
_NUMBER: Schema = {"type": "number"}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"event": _TEXT, "data": _TEXT}}
"""One event of a stream."""
_SEVERAL: Schema = {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1}
_SAMPLING: Schema = {"temperature": {"type": "number", "minimum": 0, "maximum": 2}, "top_p": _NUMBER, "stream": {"type": "boolean"}}
_BODIES: dict[str, tuple[list[str], Schema]] = {
    CHAT: (["messages"], _SAMPLING | {"max_tokens": _MANY, "messages": {"$ref": "#/components/schemas/messages"}}),
    COMPLETIONS: (
        ["prompt"],
        _SAMPLING | {"max_tokens": _MANY, "prompt": {"anyOf": [_TEXT, _IDS, {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}}]}},
    ),
    MESSAGES: (
        ["model", "max_tokens", "messages"],
        _SAMPLING | {"max_tokens": _MANY, "messages": {"$ref": "#/components/schemas/messages"}, "system": _TEXT},
    ),
    RESPONSES: (["input"], _SAMPLING | {"max_output_tokens": _MANY, "instructions": _TEXT, "input": {"anyOf": [_TEXT, {"type": "array"}]}}),
    EMBEDDINGS: (["input"], {"input": {"anyOf": [_TEXT, _IDS, {"type": "array"}]}}),
    "/v1/messages/count_tokens": (["model", "messages"], {"messages": {"$ref": "#/components/schemas/messages"}, "system": _TEXT}),
    "/tokenize": ([], {"prompt": _TEXT, "messages": {"$ref": "#/components/schemas/messages"}}),
    "/detokenize": (["tokens"], {"tokens": _IDS}),
}
_REFUSALS = {
    400: "the request is malformed, over a cap, or refused by the engine",
    401: "no key, or one that nobody has",
    403: "a priority above the tenant's",
    404: "nobody serves the model, or the model does not serve this route",
    408: "the body did not come in time",
    413: "the body is too large",
    422: "the engine can't take the request",
    429: "over the tenant's limits; with retry-after",
    500: "the router failed",
    501: "the engine can't do what is asked",
    502: "the workers tried failed; with retry-after",
    503: "full, or no worker; with retry-after",
    504: "not ready by the deadline",
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]}},
}


def description() -> Schema:
    """The whole document."""
    paths: Schema = {path: {"post": _operation(path, generates=path in GENERATING)} for path in (*GENERATING, *ASKING)}
    one: Schema = {"name": "response_id", "in": "path", "required": True, "schema": _TEXT}
    stored = {"summary": "There are no stored responses", "parameters": [one], "responses": _refused(f"{RESPONSES}/", 401, 404)}
    paths[f"{RESPONSES}/{{response_id}}"] = {"get": stored}
    paths["/v1/models"] = {
        "get": {"summary": "The models and adapters served", "responses": {"200": _answer({"type": "object"}), **_refused("", 401)}}
    }
    for path, text in (("/health", "The router runs"), ("/ready", "A request could be answered")):
        plain = {"description": text, "content": {"text/plain": {"schema": _TEXT}}}
        paths[path] = {"get": {"summary": text, "security": [], "responses": {"200": plain, **({"503": plain} if path == "/ready" else {})}}}
    keys = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headstart", "version": "1", "description": "Where no tenants are set no key is needed."},
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": keys},
    }


def routes() -> list[Route]:
    """``GET /openapi.json``."""
    raw = msgspec.json.encode(description())

    async def described(_request: Request) -> Response:
        return Response(raw, media_type=_JSON)

    return [Route("/openapi.json", described)]


def _operation(path: str, *, generates: bool) -> Schema:
    required, properties = _BODIES[path]
    body = {"type": "object", "required": required, "properties": {"model": _TEXT} | properties}
    answer = _answer({"type": "object"})
    if generates:
        answer["content"][_EVENTS] = {"schema": _EVENT}
        answer["headers"] = {f"x-headstart-{name}": {"schema": _TEXT} for name in ("route", "worker", "cached-tokens", "cache-source")}
    return {
        "summary": "Routed by what is cached" if generates else "Answered by any decode worker",
        "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
        "responses": {"200": answer, **_refused(path, *_REFUSALS)},
    }


def _answer(schema: Schema) -> Schema:
    return {"description": "the answer", "content": {_JSON: {"schema": schema}}}


def _refused(path: str, *statuses: int) -> Schema:
    form = {"$ref": f"#/components/schemas/{'anthropic' if is_anthropic(path) else 'openai'}_error"}
    return {str(status): {"description": _REFUSALS[status], "content": {_JSON: {"schema": form}}} for status in statuses}


def _schemas() -> Schema:
    said = {"type": "object", "required": ["message", "type"], "properties": {"message": _TEXT, "type": _TEXT}}
    return {
        "messages": {"type": "array", "items": _MESSAGE},
        "openai_error": {"type": "object", "required": ["error"], "properties": {"error": said}},
        "anthropic_error": {"type": "object", "required": ["type", "error"], "properties": {"type": {"const": "error"}, "error": said}},
    }
