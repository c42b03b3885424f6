"""The shared tier: does it answer, how far away and how fast it is, what it does when it is full."""

from __future__ import annotations

from deploy.doctor.facts import RedisFacts
from deploy.doctor.finding import MADE_EACH_SECOND, Finding, gigabytes, skipped

REDIS, ROUND_TRIP, SPEED, MEMORY = "redis", "redis round trip", "redis speed", "redis memory"
WANTED = 2e9
"""Below it an 8B model on an H200 computes 128K tokens faster than they are read."""

_ROUND_TRIP_NEAR = 0.005
_GIGABIT = (0.09e9, 0.125e9)
"""1 GbE carries 0.117 GB/s of payload."""

_EVICTING = ("allkeys-lru", "volatile-lru", "allkeys-lfu", "volatile-lfu", "volatile-ttl")


def redis(facts: RedisFacts, timeout_ms: int, ttl_seconds: int) -> list[Finding]:
    """All about a server that is configured."""
    if facts.error:
        return [Finding(REDIS, "bad", facts.error, "start the server, or correct cache.remote_url and what lies between; requests go on without it")]
    return [_round_trip(facts, timeout_ms), _speed(facts), _memory(facts, ttl_seconds)]


def _round_trip(facts: RedisFacts, timeout_ms: int) -> Finding:
    seconds = facts.round_trip
    measured, values = f"{1000 * seconds:.2f} ms; remote_timeout_ms is {timeout_ms}", {"seconds": seconds}
    if 1000 * seconds >= timeout_ms:
        return Finding(ROUND_TRIP, "bad", measured, "every read is given up: raise cache.remote_timeout_ms, or use a nearer server", values)
    if seconds > _ROUND_TRIP_NEAR or 4000 * seconds > timeout_ms:
        return Finding(ROUND_TRIP, "warn", measured, "every lookup waits for it: use a server in the same rack or zone", values)
    return Finding(ROUND_TRIP, "ok", measured, "", values)


def _speed(facts: RedisFacts) -> Finding:
    if facts.lost:
        return Finding(SPEED, "bad", "it did not keep what was just written", "it is full or read-only: give it memory, an eviction policy, a master")
    measured = f"reads {facts.read / 1e9:.3f} GB/s, writes {facts.written / 1e9:.3f} GB/s ({facts.streams} connections)"
    values = {"read": facts.read, "written": facts.written}
    if any(_GIGABIT[0] <= speed <= _GIGABIT[1] for speed in (facts.read, facts.written)):
        return Finding(SPEED, "bad", f"{measured}: that is a 1 GbE link", "computing is faster: put the server on a link of 25 GbE or more", values)
    if facts.read < MADE_EACH_SECOND:
        return Finding(SPEED, "bad", measured, "computing is faster, even with a 70B model: look at the link, and at the server's io-threads", values)
    if facts.read < WANTED:
        return Finding(SPEED, "warn", measured, "good for a 70B model, slow for an 8B: 25 GbE or more, Redis 8 or Valkey with io-threads 4", values)
    return Finding(SPEED, "ok", measured, "", values)


def _memory(facts: RedisFacts, ttl_seconds: int) -> Finding:
    if facts.maxmemory is None:
        return skipped(MEMORY, "the server does not tell its maxmemory")
    if facts.maxmemory and not facts.policy:
        return skipped(MEMORY, "the server does not tell its maxmemory-policy")
    values = {"maxmemory": float(facts.maxmemory)}
    if not facts.maxmemory:
        advice = "it grows until the kernel kills it, and tenants' shares have nothing to be of: set maxmemory, and maxmemory-policy allkeys-lru"
        return Finding(MEMORY, "warn", "no maxmemory", advice, values)
    measured = f"maxmemory {gigabytes(facts.maxmemory)}, {facts.policy}"
    if facts.policy == "noeviction":
        advice = "when it is full nothing new is stored: set maxmemory-policy allkeys-lru, or volatile-lru where others share the server"
        return Finding(MEMORY, "bad", measured, advice, values)
    if facts.policy.startswith("volatile-") and not ttl_seconds:
        advice = "chunks have no TTL, so this policy evicts none of them: set cache.remote_ttl_seconds, or allkeys-lru"
        return Finding(MEMORY, "bad", measured, advice, values)
    if facts.policy not in _EVICTING:
        return Finding(MEMORY, "warn", measured, "it evicts what is in use as readily as what is not: set maxmemory-policy allkeys-lru", values)
    return Finding(MEMORY, "ok", measured, "", values)
