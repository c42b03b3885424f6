"""A collector of traces for tests: an HTTP server that decodes what an exporter sends, by OpenTelemetry's own protocol definition."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from tests_shared import wait_for


class OtlpCollector:
    """Keeps every span; ``answer`` is the status that it answers with, ``hold`` keeps it from answering at all."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.calls = 0
        self.answer = 200
        self.hold = threading.Event()
        self.hold.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                collector._take(self.path, gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw)
                collector.hold.wait()
                body = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.answer)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, path: str, raw: bytes) -> None:
        assert path == "/v1/traces"
        self.calls += 1
        for part in ExportTraceServiceRequest.FromString(raw).resource_spans:
            self.resources.append(attributes(part.resource))
            self.spans += [span for scope in part.scope_spans for span in scope.spans]

    def of(self, trace_id: str, count: int) -> dict[str, Any]:
        """The ``count`` spans of a trace by name, once they are there."""
        wait_for(lambda: len([span for span in self.spans if span.trace_id.hex() == trace_id]) >= count)
        found = [span for span in self.spans if span.trace_id.hex() == trace_id]
        assert len(found) == count, [span.name for span in found]
        return {span.name: span for span in found}


def attributes(told: Any) -> dict[str, Any]:
    """A span's or resource's attributes as plain values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in told.attributes}
