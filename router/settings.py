"""The router's section of the settings."""

from __future__ import annotations

from typing import Literal

from cachebus.settings_file import Problem, Section, negative, ports

_AT_LEAST_ONE = (
    *("prefill_tokens_min", "requests_max", "connect_seconds_max", "body_bytes_max", "body_seconds_max"),
    "processes",
    *("header_bytes_max", "header_seconds_max", "json_depth_max", "n_max", "worker_requests_max", "request_seconds_max"),
)
_PORT_MAX = 65535


class RouterSettings(Section, frozen=True):
    """The router."""

    host: str = "127.0.0.1"
    """Address that the OpenAI endpoint binds"""
    port: int = 8000
    """Its port; 0: a free one"""
    processes: int = 1
    """Processes that share the port, each a router of its own, with its metrics at a port of its own: admin_port, admin_port + 1 and so on"""
    prefill_tokens_min: int = 1024
    """A prompt that lacks at least this many tokens goes through prefill where the policy goes by rule; one that has fewer is not even looked up"""
    policy: Literal["cost", "prefix_affinity", "least_loaded", "round_robin"] = "cost"
    """What costs least in seconds; or by rule: whose HBM has most of the prompt, of those not much busier; the least busy one; each in turn"""
    admin_host: str = "127.0.0.1"
    """Address of the admin routes; one that is not loopback needs security.tenants_file, and a key of a tenant with `admin: true`"""
    admin_port: int = 0
    """Port of the admin routes (metrics, tenants, deleting a tenant's cache); 0: none"""
    body_bytes_max: int = 16 << 20
    """Largest request body; more is refused with 413"""
    body_seconds_max: int = 60
    """Longest that a request's body may take to come; then 408, and the connection is closed"""
    header_bytes_max: int = 32 << 10
    """Largest head of a request, all headers together; more is refused with 431"""
    header_seconds_max: int = 10
    """Longest that a request's headers may take to come; then 408, and the connection is closed"""
    json_depth_max: int = 64
    """Levels that a request's JSON may be nested; more is refused with 400"""
    n_max: int = 128
    """Answers that one request may ask for: n, or best_of, for each of its prompts; more is refused with 400"""
    prompt_tokens_max: int = 0
    """Tokens that a prompt may have; more is refused with 400; 0: what the model takes"""
    requests_max: int = 1024
    """Requests under way at once; others wait"""
    worker_requests_max: int = 256
    """And for each decode worker: what its engine runs at once"""
    queue_max: int = 256
    """Requests that wait, those of higher x-headstart-priority before others; more are refused with 503"""
    queue_seconds_max: int = 30
    """Longest wait; who would wait longer, or past its deadline, is refused at once"""
    request_seconds_max: int = 3600
    """Longest answer; a request may name a shorter time, x-headstart-deadline-ms"""
    decode_tokens_max: int = 32768
    """Where all prefill workers are gone, decode workers compute prompts that lack up to so many tokens; longer ones are refused with 503"""
    report_ms_max: int = 100
    """Longest that a response's headers wait, after the first token, for the report of where its prompt came from"""
    single_flight_seconds_max: int = 600
    """Longest wait for a prefix that another request is having computed"""
    health_ms: int = 1000
    """How often each worker's /health is called; one that fails three times and sends nothing gets nothing until it answers. 0: never"""
    connect_seconds_max: int = 5
    """Longest wait for a worker to accept a connection"""
    otlp_endpoint: str = ""
    """Base URL of an OpenTelemetry collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; empty: no traces. Needs the extra `otel`"""
    drain_seconds_max: int = 30
    """Longest wait for running answers when the router is asked to end"""

    def problems(self) -> list[Problem]:
        found = negative(self, "report_ms_max", "health_ms", "single_flight_seconds_max", "drain_seconds_max", "prompt_tokens_max")
        found += negative(self, "queue_max", "queue_seconds_max", "decode_tokens_max")
        found += ports(self, "port", "admin_port")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            found.append(("otlp_endpoint", f"{self.otlp_endpoint!r} is no address; give http://HOST:PORT or https://HOST:PORT"))
        admin_ports = range(self.admin_port, self.admin_port + self.processes)
        if self.admin_port and self.port in admin_ports:
            found.append(("admin_port", f"{self.port} is router.port, too: give another"))
        if self.processes > 1 and not self.admin_port:
            found.append(("processes", f"{self.processes} processes have metrics of their own each: give admin_port, the first of as many ports"))
        if self.admin_port <= _PORT_MAX < self.admin_port + self.processes - 1:
            found.append(("admin_port", f"{self.admin_port} leaves no ports for {self.processes} processes: give a smaller one"))
        for key in _AT_LEAST_ONE:
            if getattr(self, key) < 1:
                found.append((key, f"{getattr(self, key)} is too small; give at least 1"))
        return found
