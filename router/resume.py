"""Which streams another worker may go on with when theirs dies, and what it is asked. Pure.

Only greedy ones: there the tokens follow from the prompt. What is known to depend on the last tokens alone is continued behind the tokens sent,
whose KV is in the store. Anything else (stop words of several tokens, penalties, guided decoding, parsers of tools and of reasoning) has state that
an engine can't be given: it computes the answer again from the prompt, and the client gets what it does not have yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.apis import CHAT, COMPLETIONS, MESSAGES
from router.fields import DecodeRequest, is_splittable
from router.message_transcript import MessageTranscript
from router.transcript import Transcript

_COMPLETION_TOKENS_MAX = 16
"""What vLLM generates for a completion that names no max_tokens."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_STATELESS = {
    *("model", "prompt", "messages", "user", "metadata", "store", "service_tier", "session_id", "request_id", "stream", "stream_options"),
    *("temperature", "top_p", "top_k", "min_p", "seed", "n", "logit_bias", "allowed_token_ids", "repetition_penalty", "return_token_ids"),
    *("max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "stream_interval"),
    *("add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "documents"),
    *("truncate_prompt_tokens", "truncation_side", "skip_special_tokens", "spaces_between_special_tokens", "parallel_tool_calls", "tool_choice"),
}
"""Fields that say nothing of the tokens generated so far, or whose part in it moves into the prompt with them (repetition_penalty)."""
_STATELESS_IN_CHAT = {"logprobs", "top_logprobs", "return_tokens_as_token_ids", "reasoning_effort", "include_reasoning"}
"""A completion's logprobs count characters from its beginning."""


def transcript_for(path: str, body: dict[str, Any]) -> Transcript | MessageTranscript | None:
    """Where to write down the answer to ``body``; None where nobody could go on with it."""
    temperature, stop = body.get("temperature"), body.get("stop") or []
    greedy = type(temperature) in (int, float) and temperature == 0
    alone = body.get("n") in (None, 1) and not body.get("best_of") and body.get("include_reasoning") is not False
    if path == MESSAGES:
        return MessageTranscript() if body.get("stream") is True and greedy else None
    if path not in (CHAT, COMPLETIONS) or not (body.get("stream") is True and greedy and alone and is_splittable(path, body)):
        return None
    stops = [stop] if isinstance(stop, str) else [text for text in stop if isinstance(text, str)] if isinstance(stop, list) else []
    return Transcript(ids_wanted=body.get("return_token_ids") is True, stop=stops, in_output=body.get("include_stop_str_in_output") is True)


def with_ids(path: str, asked: DecodeRequest) -> DecodeRequest:
    """The request that also asks for the ids of what is generated, where the API has them."""
    return asked if path == MESSAGES else asked._replace(added={**asked.added, "return_token_ids": True})


def next_leg(path: str, asked: DecodeRequest, transcript: Transcript | MessageTranscript, *, from_prompt: bool, takes_ids: bool) -> DecodeRequest:
    """The request for an engine that goes on where the one before it died, which ``transcript`` is told.

    ``from_prompt``: it computes all again. ``takes_ids``: its chat endpoint takes a prompt's ids.
    """
    if isinstance(transcript, MessageTranscript):
        transcript.begin_again()
        return asked
    tokens = 0
    if not from_prompt and transcript.prompt_ids and transcript.plain and may_continue(path, asked.body, takes_ids=takes_ids):
        tokens = transcript.place()
    transcript.begin_again(tokens)
    return continued(path, asked, transcript.prompt_ids, transcript.ids[:tokens]) if tokens else asked


def may_continue(path: str, body: dict[str, Any], *, takes_ids: bool) -> bool:
    """Whether an engine may go on in the middle of the answer to ``body``. ``takes_ids``: its chat endpoint takes a prompt's ids."""
    known = _STATELESS if path == COMPLETIONS else _STATELESS | _STATELESS_IN_CHAT
    stateful = [name for name, value in body.items() if value and name not in known]
    if stateful or body.get("skip_special_tokens") is False:
        return False
    # What a chat generates where nothing is said is the engine's to know.
    return path == COMPLETIONS or (takes_ids and any(body.get(name) for name in _LIMITS) and _is_text(body.get("messages")))


def continued(path: str, asked: DecodeRequest, prompt: Sequence[int], sent: Sequence[int]) -> DecodeRequest:
    """The request for what follows the ids ``sent``. Only where ``may_continue``."""
    request = {name: value for name, value in asked.body.items() if name not in ("truncate_prompt_tokens", "truncation_side")}
    if path == COMPLETIONS and request.get("max_tokens") is None:
        request["max_tokens"] = _COMPLETION_TOKENS_MAX
    for name in _LIMITS:
        if type(request.get(name)) is int:
            request[name] -= len(sent)
    if type(request.get("min_tokens")) is int:
        request["min_tokens"] = max(0, request["min_tokens"] - len(sent))
    return DecodeRequest(request, [*prompt, *sent], added=asked.added)


def _is_text(messages: Any) -> bool:
    """Whether a chat's messages are text alone; with anything else the engine renders them, whatever ids it is given."""
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
