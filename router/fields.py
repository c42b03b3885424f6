"""What a client may send, and the bodies that the two legs get instead of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from router.apis import COMPLETIONS
from router.callers import Terms
from router.errors import ApiError

_ROUTERS_OWN = ("kv_transfer_params", "ec_transfer_params", "cache_salt")
_ROUTERS_OWN_XARGS = (*_ROUTERS_OWN, "kv_cache_report_mode")
_TRANSFER = "headstart"


class DecodeRequest(NamedTuple):
    """What a decode worker is asked: the client's body, and the prompt's ids that go with it where there are any.

    ``raw``: the body as the client sent it, b"" where it is another by now; ``added``: what the router itself asks for.
    """

    body: dict[str, Any]
    token_ids: Sequence[int] | None
    raw: bytes = b""
    added: dict[str, Any] = {}  # noqa: RUF012 - never written to


def parse_body(raw: bytes) -> dict[str, Any]:
    """A client's request. Raises ApiError (400) where it is no JSON object or steers the transfer of KV."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the request's body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the request's body must be a JSON object", code="invalid_json")
    # vLLM copies vllm_xargs into the place where it keeps its own transfer parameters.
    xargs = body.get("vllm_xargs")
    for name in _ROUTERS_OWN:
        if body.get(name) is not None:
            raise _refusal(name)
    for name in _ROUTERS_OWN_XARGS:
        if isinstance(xargs, dict) and name in xargs:
            raise _refusal(f"vllm_xargs.{name}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, "model must be a string", code="invalid_type", param="model")
    return body


def plain_prompt(path: str, body: dict[str, Any]) -> list[int] | None:
    """The token ids of a completion whose one prompt is given as ids and used as it is.

    A chat's prompt is made of its messages: a field named ``prompt`` in it means nothing to the engine, so nothing here.
    """
    if path != COMPLETIONS or body.get("truncate_prompt_tokens") is not None:
        return None
    return _one_list_of_ids(body)


def is_splittable(path: str, body: dict[str, Any]) -> bool:
    """Whether the request is one prompt of text whose KV another worker may compute.

    Echoed prompts and prompt logprobs need the prompt's own forward pass, so no cached KV can serve them. The engine renders no
    prompts for beam search, which it would answer all the same.
    """
    prompt = body.get("prompt") if path == COMPLETIONS else None
    several = isinstance(prompt, list) and _one_list_of_ids(body) is None and len(prompt) != 1
    alone = (body.get(name) for name in ("echo", "prompt_embeds", "use_beam_search"))
    return not (several or any(alone) or body.get("prompt_logprobs") is not None)


def prefill_body(model: str, token_ids: Sequence[int], transfer_id: str, terms: Terms) -> bytes:
    """The prefill leg: the prompt's ids for one token, so none of the client's fields can leak into it or out of it."""
    request: dict[str, Any] = {
        "model": model,
        "prompt": token_ids,
        "max_tokens": 1,
        "temperature": 0,
        "kv_transfer_params": {_TRANSFER: _transfer(transfer_id, "prefill", terms)},
        **_salted(terms),
    }
    return msgspec.json.encode(request)


def render_body(body: dict[str, Any], terms: Terms) -> bytes:
    """What an engine is asked to render: the salt is there since an engine keeps what it tokenised for each salt apart."""
    return msgspec.json.encode({**body, "stream": False, "stream_options": None, **_salted(terms)})


def decode_body(path: str, asked: DecodeRequest, transfer_id: str, token_ids: Sequence[int] | None, terms: Terms, follow_ms: int = 0) -> bytes:
    """The decode leg: everything the client sent and the router's transfer parameters.

    ``token_ids``, where given, spare the engine another tokenisation: they come from its own renderer. A completion's take its
    prompt's place; a chat's go beside its messages, for engines that look there. ``follow_ms``: how long the engine waits for each part of a
    prompt that is still being computed.
    """
    parameters: dict[str, Any] = {_TRANSFER: {**_transfer(transfer_id, "decode", terms), **({"follow_ms": follow_ms} if follow_ms else {})}}
    added = {**asked.added, "kv_transfer_params": parameters, **_salted(terms)}
    if token_ids is None and asked.raw.endswith(b"}") and asked.body:
        # Of a name that comes twice the later one counts. A long prompt is not encoded again for some fields more.
        return asked.raw[:-1] + b"," + msgspec.json.encode(added)[1:]
    request = {**asked.body, **added}
    if token_ids is not None and path == COMPLETIONS:
        request["prompt"] = token_ids
    elif token_ids is not None:
        parameters["prompt_token_ids"] = token_ids
    return msgspec.json.encode(request)


def _transfer(transfer_id: str, leg: str, terms: Terms) -> dict[str, Any]:
    """The connector's part (``cachebus.engine.transfer``), without what is as usual."""
    unusual = {**({} if terms.store else {"store": False}), **({"ttl_seconds": terms.ttl_seconds} if terms.ttl_seconds else {})}
    return {"transfer_id": transfer_id, "leg": leg, **unusual}


def _salted(terms: Terms) -> dict[str, str]:
    return {"cache_salt": terms.salt} if terms.salt else {}


def _one_list_of_ids(body: dict[str, Any]) -> list[int] | None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return prompt
    return None


def _refusal(name: str) -> ApiError:
    return ApiError(400, f"{name} is set by the router and can't be sent by a client: remove it", code="field_not_allowed", param=name)
