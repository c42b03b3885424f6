"""What a simulated engine reads of a request. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cachebus.engine.transfer import TransferParams, transfer_params
from deploy.sim.profile import Profile
from deploy.sim.vocabulary import VOCABULARY, chat_prompt, tokenised

_MAX_TOKENS = 16
_NOT_SIMULATED = ("echo", "logprobs", "prompt_logprobs", "suffix", "use_beam_search", "prompt_embeds", "response_format", "tools")


class Refused(Exception):
    """A request that can't be served as it is; the text is for its sender."""


@dataclass(frozen=True)
class Asked:
    """A request as it is understood."""

    chat: bool
    prompt: list[int]
    max_tokens: int
    stream: bool
    include_usage: bool
    return_token_ids: bool
    stop: list[str]
    salt: str
    transfer: TransferParams | None


def prompt_of(body: dict[str, Any], *, chat: bool) -> list[int]:
    """The prompt's ids. Raises Refused."""
    try:
        if chat:
            found = chat_prompt(body["messages"])
        else:
            prompt = body["prompt"]
            if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
                prompt = prompt[0]
            found = tokenised(prompt) if isinstance(prompt, str) else _checked(prompt)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"no prompt can be made of this request: {error}") from error
    if not found:
        raise Refused("the prompt is empty")
    return found


def asked(body: Any, profile: Profile, *, chat: bool) -> Asked:
    """Reads a request. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    for name in ("kv_transfer_params", "stream_options"):
        if not isinstance(body.get(name), dict | None):
            raise Refused(f"{name} must be an object")
    if body.get("model") not in (None, profile.model):
        raise Refused(f"the model {body['model']!r} does not exist here")
    for name in _NOT_SIMULATED:
        if body.get(name):
            raise Refused(f"{name} is not simulated")
    if body.get("n") not in (None, 1):
        raise Refused("n > 1 is not simulated")
    parameters = body.get("kv_transfer_params") or {}
    given = parameters.get("prompt_token_ids") if chat else None
    prompt = prompt_of({"prompt": given}, chat=False) if given else prompt_of(body, chat=chat)
    room = profile.max_model_len - len(prompt)
    wanted = body.get("max_completion_tokens") or body.get("max_tokens") or (room if chat else min(_MAX_TOKENS, room))
    if type(wanted) is not int or wanted < 1 or wanted > room:
        raise Refused(f"max_tokens is {wanted}: of {profile.max_model_len} tokens the prompt leaves {room}")
    return Asked(
        chat=chat,
        prompt=prompt,
        max_tokens=wanted,
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        return_token_ids=bool(body.get("return_token_ids")),
        stop=_stop_strings(body.get("stop")),
        salt=body.get("cache_salt") or "",
        transfer=transfer_params(parameters),
    )


def _stop_strings(given: Any) -> list[str]:
    found = [given] if isinstance(given, str) else given or []
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise Refused("stop is a text or a list of texts, none of them empty")
    return found


def _checked(prompt: Any) -> list[int]:
    if not isinstance(prompt, list) or set(map(type, prompt)) - {int} or any((min(prompt) < 0, max(prompt) >= VOCABULARY) if prompt else ()):
        raise ValueError(f"it is a text or a list of ids below {VOCABULARY}")
    return prompt
