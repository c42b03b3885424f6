"""The prompts of ``headstart cache warm``: a file's lines as request bodies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebus.errors import HeadstartError

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_WHAT_THEY_ASK_FOR = ("max_completion_tokens", "min_tokens", "stream", "stream_options", "n", "best_of")
"""Fields of a body that say what to generate. Those that shape the prompt (tools, say) stay."""


@dataclass(frozen=True)
class Prompt:
    """A line of the file and what to send for it; ``problem`` says why nothing can be sent."""

    line: int
    path: str = ""
    body: dict[str, Any] | None = None
    problem: str = ""


def read_prompts(file: Path, model: str | None, *, system: bool) -> list[Prompt]:
    """Every prompt of the file; ``system``: a text goes as a chat's system message. Raises HeadstartError where it can't be read or holds none."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadstartError(f"can't read {file}: {error}") from error
    if file.suffix.lower() not in (".jsonl", ".json"):
        found = [_prompt(1, {"messages": [{"role": "system", "content": text}]} if system else {"prompt": text}, model)] if text else []
    elif (whole := _whole(text)) is not None:
        found = [_prompt(1, whole, model)]
    else:
        # Not splitlines: JSON may hold the other separators that it knows.
        found = [_parsed(number, line, model) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise HeadstartError(f"{file} holds no prompt")
    return found


def _whole(text: str) -> dict[str, Any] | None:
    """The one object that the file is, over however many lines."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _parsed(number: int, line: str, model: str | None) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        return Prompt(number, problem=f"not JSON: {error}")
    return _prompt(number, {"prompt": found} if isinstance(found, list) else found, model)


def _prompt(number: int, body: Any, model: str | None) -> Prompt:
    if not isinstance(body, dict) or ("messages" in body) == ("prompt" in body):
        return Prompt(number, problem='give an object with either "messages" or "prompt", or a list of token ids')
    kept = {key: value for key, value in body.items() if key not in _WHAT_THEY_ASK_FOR}
    named = {"model": model, **kept} if model else kept
    return Prompt(number, _CHAT if "messages" in body else _COMPLETIONS, {**named, "max_tokens": 1})
