"""How far long work is, on stderr: one line that is written over on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0


class Progress:
    """``show`` prints what ``text`` gives, not more often than is of use; ``clear`` makes way for other output."""

    def __init__(self, text: Callable[[float], str], stream: TextIO | None = None) -> None:
        self._text = text
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = time.monotonic()
        self._next = self._started + TERMINAL_SECONDS
        self._shown = False

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._started

    def show(self, *, last: bool = False) -> None:
        """Prints where the work is, if it is time to or this is the ``last`` time. ``text`` is given the seconds since the beginning."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        text = self._text(self.seconds)
        if self._terminal:
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)
        self._shown = not last

    def clear(self) -> None:
        """Takes the line away."""
        if self._terminal and self._shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._shown = False


def eta(seconds: float, done: float, total: float) -> str:
    """How long what is left of ``total`` takes at the pace of what is ``done``; "" where nobody can say."""
    if not 0 < done < total:
        return ""
    left = int(seconds * (total - done) / done)
    return f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left" if left >= 3600 else f", {left // 60}:{left % 60:02d} left"


def bytes_text(seconds: float, done: float, total: float) -> str:
    """GB done, GB in all (0: not known), pace and the time left."""
    of = f" of {total / 1e9:.2f}" if total else ""
    return f"{done / 1e9:.2f}{of} GB, {done / 1e9 / max(seconds, 1e-9):.2f} GB/s{eta(seconds, done, total)}"
