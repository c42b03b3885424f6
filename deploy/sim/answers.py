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
    stop_reason: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _text: str = ""
    _said: int = 0

    @property
    def ended(self) -> bool:
        """Whether the last token has come."""
        return self.stop_reason is not None or len(self.token_ids) == self.asked.max_tokens

    @property
    def text(self) -> str:
        """All of it by now."""
        return self._text

    def take(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """The next tokens come: those of them that belong to the answer, and the text that can be said by now.

        As in vLLM, text that a stop string may begin with is held back, and so are as many characters whatever they are.
        """
        taken = []
        for token in tokens:
            if self.ended:
                break
            taken.append(token)
            self.token_ids.append(token)
            before = len(self._text)
            self._text += text_of([token])
            found = [(place, stop) for stop in self.asked.stop if (place := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0]
            if found:
                place, self.stop_reason = min(found)
                self._text = self._text[:place]
        kept = 0 if self.ended else max((len(stop) - 1 for stop in self.asked.stop), default=0)
        said, self._said = self._said, max(self._said, len(self._text) - kept)
        return taken, self._text[said : self._said]

    def first_event(self) -> bytes:
        """What a stream begins with; b"" where it begins with a token."""
        if not self.asked.chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._event([choice], {"prompt_token_ids": self.asked.prompt} if self.asked.return_token_ids else {})

    def event(self, tokens: Sequence[int]) -> bytes:
        """A stream's next tokens."""
        first = not self.token_ids
        taken, text = self.take(tokens)
        choice: dict[str, Any] = {"index": 0} | self._finish()
        choice |= {"delta": {"content": text}} if self.asked.chat else {"text": text}
        if self.asked.return_token_ids:
            choice["token_ids"] = taken
            if not self.asked.chat:
                choice["prompt_token_ids"] = self.asked.prompt if first else None
        return self._event([choice])

    def last_events(self) -> bytes:
        """What a stream ends with."""
        return (self._event([], {"usage": self._usage()}) if self.asked.include_usage else b"") + DONE

    def _finish(self) -> dict[str, Any]:
        reason = None if not self.ended else "length" if self.stop_reason is None else "stop"
        return {"finish_reason": reason, "stop_reason": self.stop_reason}

    def whole(self) -> bytes:
        """The answer that is no stream."""
        choice: dict[str, Any] = {"index": 0} | self._finish()
        choice |= {"message": {"role": "assistant", "content": self._text}} if self.asked.chat else {"text": self._text}
        if self.asked.return_token_ids:
            choice |= {"token_ids": self.token_ids}
        name = "chat.completion" if self.asked.chat else "text_completion"
        return msgspec.json.encode(self._frame(name, [choice]) | {"usage": self._usage()})

    def _event(self, choices: Sequence[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        body = self._frame("chat.completion.chunk" if self.asked.chat else "text_completion", choices) | (more or {})
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
