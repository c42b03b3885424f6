"""Secrets that others can read or replace, and nodes that can't check each other's chunks."""

from __future__ import annotations

from collections.abc import Sequence

from cachebus.security import DIGEST_KEY_BYTES
from deploy.doctor.facts import KeyFacts
from deploy.doctor.finding import Finding, skipped

DIGEST_KEY, KEYS_FOLDER = "digest key", "keys folder"


def digest_key(facts: KeyFacts, *, given: bool, shares: bool) -> Finding:
    """``given``: by digest_key_file or keys_dir, else this node makes its own. ``shares``: it exchanges chunks with other nodes."""
    if facts.error or (facts.mode is None and given):
        return Finding(DIGEST_KEY, "bad", f"{facts.path}: {facts.error or 'is not there'}", "correct security.digest_key_file or keys_dir")
    wrong = _open_to_others(facts)
    if wrong:
        return Finding(DIGEST_KEY, "bad", wrong, f"whoever has it can forge chunks: {_tightened(facts)}")
    if facts.mode is not None and facts.size != DIGEST_KEY_BYTES:
        return Finding(DIGEST_KEY, "bad", f"{facts.path}: {facts.size} bytes", f"it must hold {DIGEST_KEY_BYTES} random bytes")
    if shares and not given:
        advice = "nodes with different keys share nothing: give all one security.digest_key_file, or keys made by `headstart keys`"
        return Finding(DIGEST_KEY, "warn", "this node's own", advice)
    return Finding(DIGEST_KEY, "ok", f"{facts.path}: mode {facts.mode:04o}" if facts.mode is not None else "the cachebus will make one")


def keys_folder(facts: Sequence[KeyFacts]) -> Finding:
    """The member's folder, its files and folders."""
    if not facts:
        return skipped(KEYS_FOLDER, "security.keys_dir is not set")
    for one in facts:
        if one.error or one.mode is None:
            return Finding(KEYS_FOLDER, "bad", f"{one.path}: {one.error or 'is not there'}", "`headstart keys add` makes such folders")
        wrong = _open_to_others(one)
        if wrong:
            return Finding(KEYS_FOLDER, "bad", wrong, f"others could join the cluster with it: {_tightened(one)}")
    return Finding(KEYS_FOLDER, "ok", f"{facts[0].path}: mode {facts[0].mode:04o}, secrets for its owner alone")


def _open_to_others(facts: KeyFacts) -> str:
    if facts.mode is None or not facts.mode & facts.forbidden:
        return ""
    return f"{facts.path}: mode {facts.mode:04o}, others can {'read' if facts.mode & facts.forbidden & 0o044 else 'change'} it"


def _tightened(facts: KeyFacts) -> str:
    return f"chmod {(facts.mode or 0) & ~facts.forbidden & 0o777:o} {facts.path}"
