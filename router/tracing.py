"""OpenTelemetry spans of the requests, made of their timelines after they are over, and sent to a collector by a thread of its own.

Names and attributes are those of the semantic conventions for generative AI; what they do not have begins with ``headstart.``. Imported only where
``router.otlp_endpoint`` is set.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Mapping
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from router.apis import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from router.timeline import Phase, Timeline, Trace

EXPORT_SECONDS_MAX = 2.0
CLOSE_SECONDS_MAX = 3.0
SPANS_WAITING_MAX = 8192
"""Spans not sent yet; more are dropped, since no request waits for a collector."""
_OPERATIONS = {CHAT: "chat", MESSAGES: "chat", RESPONSES: "chat", COMPLETIONS: "text_completion", EMBEDDINGS: "embeddings"}
_SERVER_ERRORS_FROM = 500


class _Given(IdGenerator):
    """Ids chosen before: a request's spans are named to workers while it runs, and made when it is over."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class OtlpTracing:
    """Spans for the collector at ``endpoint``: OTLP over HTTP, protobuf, to its ``/v1/traces``."""

    def __init__(self, endpoint: str) -> None:
        self._ids, self._random = _Given(), RandomIdGenerator()
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create(
            {
                "service.name": "headstart-router",
                "service.version": version("headstart"),
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
            }
        )
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces", timeout=EXPORT_SECONDS_MAX)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=SPANS_WAITING_MAX, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("headstart.router", version("headstart"))

    def trace(self, headers: Mapping[bytes, bytes]) -> Trace:
        """The client's trace, where it sent a valid ``traceparent``; else a new one."""
        names = ("traceparent", "tracestate")
        carrier = {name: headers[name.encode()].decode("latin-1") for name in names if name.encode() in headers}
        client = get_current_span(self._propagator.extract(carrier, Context())).get_span_context()
        if not client.is_valid:
            return Trace(f"{self._random.generate_trace_id():032x}")
        return Trace(f"{client.trace_id:032x}", f"{client.span_id:016x}", client.trace_flags.sampled, client.trace_state.to_header())

    def export(self, timeline: Timeline) -> None:
        """Makes the spans of a request that is over, and leaves them to the sending thread."""
        trace = timeline.trace
        if trace is None or not trace.sampled or timeline.ended is None:
            return
        request = self._span(timeline, trace, timeline.span_id, _name(timeline), trace.parent, SpanKind.SERVER, timeline.begun, _of_request(timeline))
        if timeline.status >= _SERVER_ERRORS_FROM:
            request.set_attribute("error.type", str(timeline.status))
            request.set_status(Status(StatusCode.ERROR))
        for phase in timeline.phases:
            kind = SpanKind.CLIENT if phase.name in ("render", "prefill", "decode") else SpanKind.INTERNAL
            span = self._span(timeline, trace, phase.span_id, phase.name, timeline.span_id, kind, phase.begun, _of_phase(timeline, phase))
            if phase.first_token is not None:
                span.add_event("first token", timestamp=_at(timeline, phase.first_token))
            if phase.failed:
                span.set_attribute("error.type", phase.failed)
                span.set_status(Status(StatusCode.ERROR))
            span.end(_at(timeline, timeline.ended if phase.ended is None else phase.ended))
        request.end(_at(timeline, timeline.ended))

    async def close(self) -> None:
        """Sends what is left; gives up after some seconds, and the thread ends with the process."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        try:
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                while thread.is_alive():  # noqa: ASYNC110 - a thread sets no asyncio event
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pass

    def _span(
        self,
        timeline: Timeline,
        trace: Trace,
        span_id: str,
        name: str,
        parent: str,
        kind: SpanKind,
        begun: float,
        attributes: dict[str, AttributeValue],
    ) -> Span:
        self._ids.trace_id, self._ids.span_id = int(trace.trace_id, 16), int(span_id, 16)
        context = Context()
        if parent:
            remote = SpanContext(self._ids.trace_id, int(parent, 16), is_remote=parent == trace.parent, trace_flags=TraceFlags(TraceFlags.SAMPLED))
            context = set_span_in_context(NonRecordingSpan(remote), context)
        return self._tracer.start_span(name, context, kind, attributes, start_time=_at(timeline, begun))


def _name(timeline: Timeline) -> str:
    operation = _OPERATIONS.get(timeline.path, timeline.path)
    return f"{operation} {timeline.model}" if timeline.model else operation


def _of_request(timeline: Timeline) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {
        "gen_ai.operation.name": _OPERATIONS.get(timeline.path, timeline.path),
        "gen_ai.provider.name": "vllm",
        "http.request.method": "POST",
        "http.response.status_code": timeline.status,
        "url.path": timeline.path,
        "headstart.request_id": timeline.request_id,
        "headstart.route": timeline.route,
    }
    if timeline.model:
        found["gen_ai.request.model"] = timeline.model
    if timeline.tenant:
        found["headstart.tenant"] = timeline.tenant
    if timeline.prompt_tokens:
        found["gen_ai.usage.input_tokens"] = timeline.prompt_tokens
    if timeline.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = timeline.first_token - timeline.begun
        found["gen_ai.usage.cache_read.input_tokens"] = sum(timeline.cached.values())
    return found | _of_sources(timeline.cached)


def _of_phase(timeline: Timeline, phase: Phase) -> dict[str, AttributeValue]:
    found: dict[str, AttributeValue] = {}
    if phase.worker:
        found["headstart.worker"] = phase.worker
    if phase.name in ("prefill", "decode"):
        found |= {"gen_ai.operation.name": _OPERATIONS.get(timeline.path, timeline.path), "gen_ai.provider.name": "vllm"}
        found |= {"gen_ai.request.model": timeline.model} if timeline.model else {}
    if phase.first_token is not None:
        found["gen_ai.response.time_to_first_chunk"] = phase.first_token - phase.begun
    return found | _of_sources(phase.cached)


def _of_sources(cached: Mapping[str, int]) -> dict[str, AttributeValue]:
    return {f"headstart.cached_tokens.{source}": tokens for source, tokens in cached.items()}


def _at(timeline: Timeline, moment: float) -> int:
    """Nanoseconds since 1970 of a moment of the monotonic clock."""
    return int((timeline.wall + moment - timeline.begun) * 1e9)
