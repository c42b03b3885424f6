"""The router's section of the settings."""

from __future__ import annotations

from typing import Literal

from cachebus.settings_file import Problem, Section, negative, ports


class RouterSettings(Section, frozen=True):
    """The router."""

    host: str = "127.0.0.1"
    """Address that the OpenAI endpoint binds"""
    port: int = 8000
    """Its port; 0: a free one"""
    prefill_tokens_min: int = 1024
    """A prompt that lacks at least this many tokens goes through prefill where the policy goes by rule; one that has fewer is not even looked up"""
    policy: Literal["cost", "prefix_affinity", "least_loaded", "round_robin"] = "cost"
    """What costs least in seconds; or by rule: whose HBM has most of the prompt, of those not much busier; the least busy one; each in turn"""
    body_bytes_max: int = 16 << 20
    """Largest request body; more is refused with 413"""
    requests_max: int = 1024
    """Requests under way at once; more are refused with 503"""
    report_ms_max: int = 100
    """Longest that a response's headers wait, after the first token, for the report of where its prompt came from"""
    single_flight_seconds_max: int = 600
    """Longest wait for a prefix that another request is having computed"""
    health_ms: int = 1000
    """How often each worker's /health is called; one that fails three times and sends nothing gets nothing until it answers. 0: never"""
    connect_seconds_max: int = 5
    """Longest wait for a worker to accept a connection"""
    drain_seconds_max: int = 30
    """Longest wait for running answers when the router is asked to end"""

    def problems(self) -> list[Problem]:
        found = negative(self, "report_ms_max", "health_ms", "single_flight_seconds_max", "drain_seconds_max") + ports(self, "port")
        for key in ("prefill_tokens_min", "body_bytes_max", "requests_max", "connect_seconds_max"):
            if getattr(self, key) < 1:
                found.append((key, f"{getattr(self, key)} is too small; give at least 1"))
        return found
