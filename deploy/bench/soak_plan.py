"""What a soak asks and when it breaks what: all of it follows from a seed. Pure.

Requests are made one after the other in the order of their numbers, so that what a number asks does not depend on how fast answers come.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from deploy.sim.expected import Reading
from deploy.sim.profile import Profile
from deploy.sim.vocabulary import FIRST_WORD, WORDS, chat_prompt, text_of_words

PROFILE = Profile(
    model="headstart-soak",
    block_size=32,
    blocks=500,
    max_model_len=2048,
    max_num_batched_tokens=1024,
    max_num_seqs=64,
    prefill_tokens_per_second=((1, 12_000.0),),
    decode_ms=((1, 60.0), (64, 64.0)),
    pull_ms=1.0,
    publish_gb_per_second=10,
)
"""Little HBM, and slow enough that a second worker pays."""
CHUNK_TOKENS = 128
PREFILL_TOKENS_MIN = 256
"""A prompt that lacks fewer goes straight to decode."""

COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
_APIS = {COMPLETIONS: 0.75, CHAT: 0.13, MESSAGES: 0.07, RESPONSES: 0.05}
_DOCUMENTS, _DOCUMENT_TOKENS, _MARK_TOKENS = 900, (32, 288), 16
_NEW_DOCUMENT_SHARE, _SHARED, _LONG = 0.004, 0.95, 0.004
_OWN_TOKENS, _OWN_TOKENS_ALONE, _OWN_TOKENS_LONG = (1, 40), (8, 240), (300, 1200)
_ANSWER_TOKENS = (1, 4)
_STREAMED, _GREEDY, _AS_TEXT, _WITH_IDS = 0.25, 0.75, 0.15, 0.5
_LEAVES, _LEAVES_BEFORE, _LEAVES_WITHIN_SECONDS = 0.04, 0.4, 0.15

Kind = Literal["kill", "drain", "stop", "join", "stop bus", "stop router", "kill bus", "kill router"]
_FAULTS: dict[Kind, float] = {"kill": 30, "drain": 20, "stop": 16, "join": 10, "stop bus": 6, "stop router": 4, "kill bus": 12, "kill router": 12}
KILLS_OF_ONE_UNTIL = 0.25
"""Share of the requests after which bus and router live on, so that what they leak can be seen."""
_STOP_SECONDS = {"stop": (0.5, 5.0), "stop bus": (0.2, 2.0), "stop router": (0.2, 2.0)}
_AWAY_SECONDS = (0.0, 3.0)


@dataclass(frozen=True)
class Asked:
    """A request: where it goes, its body, and the ids that must come.

    ``leaves_in``: seconds after which the client goes away, whatever came. ``leaves_after``: events of the stream after which it does.
    """

    number: int
    path: str
    body: bytes
    stream: bool
    greedy: bool
    answer: list[int]
    prompt_tokens: int
    leaves_in: float | None = None
    leaves_after: int | None = None


@dataclass(frozen=True)
class Fault:
    """Something goes wrong once ``after`` requests were begun. ``which`` (0 to 1) chooses the victim among those of ``role``.

    ``seconds``: how long it is stopped, or until another takes a killed one's place.
    """

    after: int
    kind: Kind
    role: Literal["prefill", "decode"]
    which: float
    seconds: float


class _Document:
    """Words that many prompts begin with, and the oracle's readings of them every so many tokens, for each reading that they may follow."""

    def __init__(self, words: list[int]) -> None:
        self.words = words
        self._readings: dict[int, list[Reading]] = {}

    def reading(self, begin: Reading, tokens: int) -> Reading:
        """A reading of ``begin``, one of a few that live as long, and the first ``tokens`` words."""
        marks = self._readings.setdefault(id(begin), [begin])
        while len(marks) <= tokens // _MARK_TOKENS:
            following = marks[-1].copy()
            following.read(self.words[(len(marks) - 1) * _MARK_TOKENS : len(marks) * _MARK_TOKENS])
            marks.append(following)
        nearest = tokens // _MARK_TOKENS
        found = marks[nearest].copy()
        found.read(self.words[nearest * _MARK_TOKENS : tokens])
        return found


class Requests:
    """The requests of a seed. ``oracle``: the model whose answers are expected; any but the workers' own makes all of them wrong."""

    def __init__(self, seed: int, oracle: str = PROFILE.model) -> None:
        self._chance = random.Random(f"requests {seed}")
        self._documents = [_Document(self._words(*_DOCUMENT_TOKENS)) for _ in range(_DOCUMENTS)]
        whole = chat_prompt([{"role": "user", "content": ""}])
        # What comes before and after a chat's words: a mark, the role and a line's end; the message's end and the assistant's beginning.
        place = len("user\n") + 1
        empty, chat = Reading(oracle, PROFILE.layers), Reading(oracle, PROFILE.layers)
        chat.read(whole[:place])
        self._begins = {path: empty if path == COMPLETIONS else chat for path in _APIS}
        self._head, self._tail = place, whole[place:]

    def take(self, count: int) -> Iterator[Asked]:
        """The next ``count`` requests."""
        for number in range(count):
            yield self._next(number)

    def _next(self, number: int) -> Asked:
        chance = self._chance
        if chance.random() < _NEW_DOCUMENT_SHARE:
            self._documents[chance.randrange(_DOCUMENTS)] = _Document(self._words(*_DOCUMENT_TOKENS))
        path = chance.choices(list(_APIS), list(_APIS.values()))[0]
        begin, words, own = self._begins[path], [], self._own()
        if own is None:
            # Some documents are asked for much more often than others.
            document = self._documents[int(_DOCUMENTS * chance.random() ** 2)]
            count = len(document.words) if chance.random() < 0.6 else chance.randint(1, len(document.words))
            reading, words, own = document.reading(begin, count), document.words[:count], self._words(*_OWN_TOKENS)
        else:
            reading = begin.copy()
        reading.read(own if path == COMPLETIONS else [*own, *self._tail])
        answer = reading.answer(chance.randint(*_ANSWER_TOKENS))
        stream, greedy = chance.random() < _STREAMED, chance.random() < _GREEDY
        body = self._body(path, [*words, *own], len(answer), stream=stream, greedy=greedy)
        prompt_tokens = len(words) + len(own) + (0 if path == COMPLETIONS else self._head + len(self._tail))
        leaves_in, leaves_after = self._leaves(stream=stream, tokens=len(answer))
        return Asked(number, path, msgspec.json.encode(body), stream, greedy, answer, prompt_tokens, leaves_in, leaves_after)

    def _own(self) -> list[int] | None:
        """The words of a prompt that shares none; None where it is to share some."""
        drawn = self._chance.random()
        if drawn < _SHARED:
            return None
        return self._words(*(_OWN_TOKENS_LONG if drawn > 1 - _LONG else _OWN_TOKENS_ALONE))

    def _words(self, least: int, most: int) -> list[int]:
        count = self._chance.randint(least, most)
        drawn = self._chance.getrandbits(18 * count)
        return [FIRST_WORD + (drawn >> 18 * place) % WORDS for place in range(count)]

    def _body(self, path: str, words: list[int], tokens: int, *, stream: bool, greedy: bool) -> dict[str, Any]:
        chance = self._chance
        body: dict[str, Any] = {"model": PROFILE.model, "stream": stream, "temperature": 0 if greedy else 1}
        body["max_output_tokens" if path == RESPONSES else "max_tokens"] = tokens
        if path == COMPLETIONS:
            body["prompt"] = text_of_words(words) if chance.random() < _AS_TEXT else words
        elif path == RESPONSES:
            body["input"] = text_of_words(words)
        else:
            body["messages"] = [{"role": "user", "content": text_of_words(words)}]
        if path in (COMPLETIONS, CHAT) and chance.random() < _WITH_IDS:
            body["return_token_ids"] = True
        return body

    def _leaves(self, *, stream: bool, tokens: int) -> tuple[float | None, int | None]:
        chance = self._chance
        if chance.random() >= _LEAVES:
            return None, None
        if not stream or chance.random() < _LEAVES_BEFORE:
            return chance.random() * _LEAVES_WITHIN_SECONDS, None
        return None, chance.randint(1, tokens)


def faults(seed: int, requests: int, every: int) -> list[Fault]:
    """The faults of a seed among so many requests, ``every`` requests one in the mean."""
    chance, found, at = random.Random(f"faults {seed}"), [], 0.0
    while (at := at + chance.expovariate(1 / every)) < requests:
        kind = chance.choices(list(_FAULTS), list(_FAULTS.values()))[0]
        if kind in ("kill bus", "kill router") and at > KILLS_OF_ONE_UNTIL * requests:
            kind = "kill"
        role: Literal["prefill", "decode"] = "prefill" if chance.random() < 0.4 else "decode"
        found.append(Fault(int(at), kind, role, chance.random(), chance.uniform(*_STOP_SECONDS.get(kind, _AWAY_SECONDS))))
    return found
