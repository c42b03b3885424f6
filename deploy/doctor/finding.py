"""What a check says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warn", "bad", "skipped"]
MADE_EACH_SECOND = 0.7e9
"""Bytes of KV that a 70B model with fp8 KV makes each second of a prefill of 32K tokens on one H200. A tier that is slower costs time."""


@dataclass(frozen=True)
class Finding:
    """``measured`` says what was found, ``advice`` what to change; ``values`` are the numbers behind it, in bytes and seconds."""

    check: str
    verdict: Verdict
    measured: str
    advice: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


def skipped(check: str, why: str) -> Finding:
    """A check that could not be made."""
    return Finding(check, "skipped", why)


def gigabytes(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
