"""The HTTP port of a process without one of its own: metrics for Prometheus, and whether it lives and is ready for whoever starts and ends it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import MetricsHandler

from cachebus.errors import HeadstartError

Check = Callable[[], str]
""" "" where all is well, else what is not."""


def expose(setting: str, place: tuple[str, int], registry: CollectorRegistry, alive: Check, ready: Check) -> int:
    """Answers ``/health`` and ``/ready`` (200 or 503) and ``/metrics`` from threads of its own; returns the port (it matters where 0 was asked for).

    Raises HeadstartError, naming the setting to change, where the port is taken.
    """
    checks = {"/health": alive, "/ready": ready}

    class Handler(MetricsHandler):
        """One request."""

        def do_GET(self) -> None:
            check = checks.get(self.path.partition("?")[0])
            if check is None:
                super().do_GET()
                return
            problem = check()
            body = f"{problem or 'ok'}\n".encode()
            self.send_response(503 if problem else 200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    Handler.registry = registry
    host, port = place

    class Server(ThreadingHTTPServer):
        """For either family of addresses."""

        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        daemon_threads = True

    try:
        server = Server(place, Handler)
    except OSError as error:
        raise HeadstartError(f"{setting}: can't listen on {host}:{port}: {error.strerror}; choose another port") from error
    threading.Thread(target=server.serve_forever, name="headstart-exposition", daemon=True).start()
    return int(server.server_address[1])
