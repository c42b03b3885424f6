"""Plain vLLM with the same model and flags: what Headstart's answers and times are compared with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cachebus.engine import process_tree
from cachebus.engine.command import engine_environment, plain_command
from cachebus.errors import HeadstartError
from cachebus.ports import free_port
from cachebus.settings import ModelSettings, WorkerSettings
from deploy.launcher import answers

_POLL_SECONDS = 0.2
_TAIL_LINES = 12


@dataclass(frozen=True)
class Variant:
    """What differs from plain vLLM: more arguments, more environment, another interpreter."""

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


class PlainEngine:
    """One vLLM API server; its output goes to ``log``."""

    def __init__(self, model: ModelSettings, pool: WorkerSettings, log: Path, variant: Variant | None = None) -> None:
        variant = variant or Variant()
        self.url = f"http://{pool.host}:{free_port(pool.host)}"
        port = int(self.url.rpartition(":")[2])
        self._command = [*plain_command(model, pool, port, variant.python), *variant.arguments]
        self._environment = {**engine_environment(pool, os.environ), **variant.environment}
        self._log = log
        self._seconds_max = pool.start_seconds_max

    def start(self, progress: Callable[[str], None]) -> None:
        """Returns when it serves. Raises HeadstartError where it does not."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as out:
            self._process = process_tree.start(self._command, self._environment, stdout=out, stderr=subprocess.STDOUT)
        started = told = time.monotonic()
        while not answers(f"{self.url}/health"):
            now = time.monotonic()
            if self._process.poll() is not None or now - started > self._seconds_max:
                self.stop()
                lines = self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
                raise HeadstartError("plain vLLM did not start:\n  " + "\n  ".join(lines))
            if now - told > 1:
                told = now
                progress(f"starting plain vLLM, {now - started:.0f} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Ends it with all its processes."""
        process_tree.kill_tree(self._process)
