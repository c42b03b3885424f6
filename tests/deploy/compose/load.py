"""Clients of a cluster, each with prompts that begin alike, whose every answer is known beforehand."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FAMILIES, SHARED_TOKENS, OWN_TOKENS, ANSWER_TOKENS = 6, 3000, 300, 12
LONG_EVERY, LONG_TOKENS = 10, 10_000
"""How many of a prompt's own every tenth has, so that some go through prefill."""
_FIRST_ID, _LAST_ID = 5, 4000
_SECONDS_MAX = 60
_CONNECT_SECONDS_MAX = 3
"""What is sent to a container's address as it goes is lost without a word."""


def prompt_of(number: int) -> list[int]:
    """The ids of a prompt: a beginning that it shares with every sixth one, and an end of its own."""
    beginning, end = random.Random(number % FAMILIES), random.Random(1000 + number)
    ids = range(_FIRST_ID, _LAST_ID)
    return beginning.choices(ids, k=SHARED_TOKENS) + end.choices(ids, k=OWN_TOKENS if number % LONG_EVERY else LONG_TOKENS)


@dataclass
class Counted:
    """What came of the requests. ``failed``: why; a client tries a failed one again until it is answered."""

    right: int = 0
    cached: int = 0
    wrong: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Load:
    """``with Load(...)``: clients from its beginning to its end. ``known`` gives the answer to a prompt as the client is sent it."""

    def __init__(self, port: int, clients: int, prompts: int, known: Callable[[int], str], first: int = 0) -> None:
        self.counted = Counted()
        self._port, self._known, self._prompts = port, known, prompts
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._first = first
        self._next = 0
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, answers: int, seconds_max: float = _SECONDS_MAX) -> None:
        """Until so many more were right. Raises AssertionError where they don't come."""
        wanted, deadline = self.counted.right + answers, time.monotonic() + seconds_max
        while self.counted.right < wanted:
            assert time.monotonic() < deadline, self.counted
            time.sleep(0.05)

    def _client(self) -> None:
        while not self._ending.is_set():
            with self._lock:
                number = self._first + self._next % self._prompts
                self._next += 1
            while not self._ending.is_set():
                try:
                    text, cached = ask(self._port, number)
                    break
                except (OSError, http.client.HTTPException, ValueError) as error:
                    with self._lock:
                        self.counted.failed.append(f"{type(error).__name__}: {error}")
                    time.sleep(0.2)
            else:
                return
            with self._lock:
                if text == self._known(number):
                    self.counted.right += 1
                    self.counted.cached += cached
                else:
                    self.counted.wrong.append(number)


def ask(port: int, number: int) -> tuple[str, int]:
    """The answer to a prompt and how many of its tokens were cached. Raises OSError, HTTPException or ValueError where it is not answered whole."""
    body = {"model": "headstart-demo", "prompt": prompt_of(number), "max_tokens": ANSWER_TOKENS, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_CONNECT_SECONDS_MAX)
    try:
        connection.connect()
        connection.sock.settimeout(_SECONDS_MAX)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"{response.status} {answer[:300]!r}")
    choice = json.loads(answer)["choices"][0]
    if choice["finish_reason"] != "length":
        raise ValueError(f"ended by {choice['finish_reason']}")
    return choice["text"], int(response.headers["x-headstart-cached-tokens"])
