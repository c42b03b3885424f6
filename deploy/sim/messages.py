"""Anthropic's messages at a simulated engine, as vLLM has them: a chat by another name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deploy.sim.answers import Answer
from deploy.sim.fields import Refused

_SAME = ("model", "max_tokens", "stream", "temperature", "tools", "kv_transfer_params", "cache_salt")


def as_chat(body: Any, *, counting: bool = False) -> dict[str, Any]:
    """The chat that a request stands for. Raises Refused."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not isinstance(body.get("messages"), list):
        raise Refused("a message needs a model and messages")
    if not counting and type(body.get("max_tokens")) is not int:
        raise Refused("a message needs max_tokens, a number")
    system = body.get("system")
    told = [{"role": "system", "content": system}] if system else []
    return {name: body[name] for name in _SAME if name in body} | {"messages": told + body["messages"], "stop": body.get("stop_sequences")}


@dataclass
class MessageAnswer(Answer):
    """An answer in Anthropic's form: one block of text."""

    _started: bool = field(default=False)

    def first_event(self) -> bytes:
        """Nothing: a stream begins with its first token."""
        return b""

    def event(self, tokens: Sequence[int]) -> bytes:
        """A stream's next tokens, at first behind what it begins with."""
        begin = b""
        if not self._started:
            self._started = True
            message = self._message([], None) | {"usage": self._used(0)}
            begin = _event("message_start", message=message) + _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        _, text = self.take(tokens)
        return begin + (_event("content_block_delta", index=0, delta={"type": "text_delta", "text": text}) if text else b"")

    def last_events(self) -> bytes:
        """What a stream ends with."""
        reason = {"stop_reason": self._reason, "stop_sequence": self.stop_reason}
        end = _event("message_delta", delta=reason, usage=self._used(len(self.token_ids)))
        return _event("content_block_stop", index=0) + end + _event("message_stop")

    def whole(self) -> bytes:
        """The answer that is no stream."""
        return msgspec.json.encode(self._message([{"type": "text", "text": self.text}], self._reason) | {"usage": self._used(len(self.token_ids))})

    @property
    def _reason(self) -> str:
        return "max_tokens" if self.stop_reason is None else "stop_sequence"

    def _message(self, content: list[dict[str, str]], reason: str | None) -> dict[str, Any]:
        found = {"id": self.request_id, "type": "message", "role": "assistant", "content": content, "model": self.model}
        return found | {"stop_reason": reason, "stop_sequence": self.stop_reason if reason else None}

    def _used(self, completion: int) -> dict[str, int]:
        told = {"input_tokens": len(self.asked.prompt) - self.cached_tokens, "output_tokens": completion}
        return told | {"cache_read_input_tokens": self.cached_tokens}


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode({"type": kind} | fields))
