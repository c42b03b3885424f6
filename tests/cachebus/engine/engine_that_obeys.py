"""Stands for vLLM's API server where its supervisor sees it: a port, three pages, a child process. ``python engine_that_obeys.py PORT HOW``.

HOW: ``serve``; ``fail`` ends with an error at once; ``load`` never gets healthy. It is busy while the file PORT.busy exists in its folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        busy = float(Path(f"{sys.argv[1]}.busy").exists())
        pages = {
            "/health": "",
            "/v1/models": json.dumps({"data": [{"id": "m", "max_model_len": 4096}]}),
            "/metrics": f'vllm:num_requests_running{{engine="0"}} {busy}\n',
        }
        healthy = sys.argv[2] == "serve" and self.path in pages
        self.send_response(200 if healthy else 503)
        self.end_headers()
        self.wfile.write(pages.get(self.path, "").encode())

    def log_message(self, *_arguments: object) -> None:
        pass


if __name__ == "__main__":
    if sys.argv[2] == "fail":
        print("loading\nValueError: no room for the KV cache\nbye", flush=True)
        sys.exit(1)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Pages).serve_forever()
