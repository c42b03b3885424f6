"""Other nodes: can they be reached, and can their chunks be checked here."""

from __future__ import annotations

from deploy.doctor.facts import PeerFacts
from deploy.doctor.finding import Finding

_ROUND_TRIP_NEAR = 0.005


def peer(facts: PeerFacts, own_key_id: bytes, timeout_ms: int) -> Finding:
    """``own_key_id`` names this node's digest key; b"" where it is not known."""
    check = f"peer {facts.name}"
    if facts.error:
        return Finding(check, "bad", facts.error, "start its cachebus, open its node_port and the two after it; with keys both must allow each other")
    measured, values = f"{1000 * facts.round_trip:.2f} ms away", {"seconds": facts.round_trip}
    if own_key_id and facts.key_id != own_key_id:
        advice = "nothing of it can be checked: give both one security.digest_key_file, or keys of one cluster"
        return Finding(check, "bad", f"{measured}, another digest key", advice, values)
    if 1000 * facts.round_trip >= timeout_ms:
        return Finding(check, "bad", measured, f"every read is given up: raise cache.peer_timeout_ms ({timeout_ms})", values)
    measured += ", the same digest key" if own_key_id else "; its digest key was not compared, this node has none yet"
    if facts.round_trip > _ROUND_TRIP_NEAR:
        return Finding(check, "warn", measured, "far for a cache: pull from nodes of the same rack or zone", values)
    return Finding(check, "ok", measured, "", values)
