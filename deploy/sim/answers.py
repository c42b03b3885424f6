"""A simulated engine's answers, as vLLM writes them: whole, or as a stream's events. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deploy.sim.fields import Asked
from deploy.sim.vocabulary import text_of

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One answer under way. ``cached_tokens`` of the prompt were not computed by the engine."""

    request_id: str
    model: str
    asked: Asked
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    def first_event(self) -> bytes:
        """What a stream begins with; b"" where it begins with a token."""
        if not self.asked.chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._event([choice])

    def event(self, tokens: Sequence[int]) -> bytes:
        """A stream's next tokens."""
        self.token_ids += tokens
        last = len(self.token_ids) == self.asked.max_tokens
        text = text_of(tokens)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
        choice |= {"delta": {"content": text}} if self.asked.chat else {"text": text}
        if self.asked.return_token_ids:
            choice["token_ids"] = tokens
        return self._event([choice])

    def last_events(self) -> bytes:
        """What a stream ends with."""
        return (self._event([], self._usage()) if self.asked.include_usage else b"") + DONE

    def whole(self) -> bytes:
        """The answer that is no stream."""
        text = text_of(self.token_ids)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
        if self.asked.return_token_ids:
            choice |= {"token_ids": self.token_ids}
        name = "chat.completion" if self.asked.chat else "text_completion"
        return msgspec.json.encode(self._frame(name, [choice]) | {"usage": self._usage()})

    def _event(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = self._frame("chat.completion.chunk" if self.asked.chat else "text_completion", choices)
        if usage is not None:
            body["usage"] = usage
        return b"data: " + msgspec.json.encode(body) + b"\n\n"

    def _frame(self, name: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.request_id, "object": name, "created": self.created, "model": self.model, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = len(self.asked.prompt), len(self.token_ids)
        details = {"cached_tokens": self.cached_tokens}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": details,
        }
