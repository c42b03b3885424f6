"""The simulated model's tokens: text to ids and back, and a chat's template. Pure.

Three letters of base64 and a space are one token, so what is generated is tokenised again to the same ids; any other byte is a token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_WORD_LETTERS = 3
_VALUES = np.zeros(256, np.int64)
_VALUES[list(_LETTERS)] = range(len(_LETTERS))
_PLACES = len(_LETTERS) ** np.arange(_WORD_LETTERS - 1, -1, -1)
_RUN = re.compile(rb"(?:[A-Za-z0-9+/]{3} )+|.", re.DOTALL)
"""Words without anything between them, or one other byte."""

FIRST_WORD = 256
"""Ids below are bytes."""
WORDS: int = len(_LETTERS) ** _WORD_LETTERS
"""How many ids are words; only they are generated."""
_MESSAGE_BEGINS, _MESSAGE_ENDS = FIRST_WORD + WORDS, FIRST_WORD + WORDS + 1
VOCABULARY = FIRST_WORD + WORDS + 2
"""Number of ids."""


def tokenised(text: str) -> list[int]:
    """The ids of a text."""
    ids: list[int] = []
    for run in _RUN.findall(text.encode()):
        ids += run if len(run) == 1 else _ids(run)
    return ids


def text_of(token_ids: Iterable[int]) -> str:
    """The text of ids; a chat's marks have none."""
    return b"".join(map(_piece, token_ids)).decode(errors="replace")


def text_of_words(token_ids: Sequence[int]) -> str:
    """The same for words alone, a hundred times as fast."""
    values = np.asarray(token_ids, np.int64)[:, None] - FIRST_WORD
    letters = np.frombuffer(_LETTERS, np.uint8)[values // _PLACES % len(_LETTERS)]
    return np.pad(letters, ((0, 0), (0, 1)), constant_values=ord(" ")).tobytes().decode()


def chat_prompt(messages: Sequence[Any]) -> list[int]:
    """The ids of a chat's prompt, up to where the assistant speaks. Raises ValueError where a message is none of text."""
    ids: list[int] = []
    for message in messages:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str):
            raise ValueError("a message needs a role and content")
        ids += [_MESSAGE_BEGINS, *tokenised(role + "\n"), *tokenised(_text_of_content(content)), _MESSAGE_ENDS]
    return [*ids, _MESSAGE_BEGINS, *tokenised("assistant\n")]


def _text_of_content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not isinstance(content, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a simulated engine takes text alone")
    return "".join(str(part) for part in parts)


def _ids(words: bytes) -> list[int]:
    values = _VALUES[np.frombuffer(words, np.uint8).reshape(-1, _WORD_LETTERS + 1)[:, :_WORD_LETTERS]]
    ids: list[int] = (FIRST_WORD + values @ _PLACES).tolist()
    return ids


def _piece(token: int) -> bytes:
    if token < FIRST_WORD:
        return bytes([token])
    value, letters = token - FIRST_WORD, []
    if value >= WORDS:
        return b""
    for _ in range(_WORD_LETTERS):
        value, letter = divmod(value, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return bytes(reversed(letters)) + b" "
