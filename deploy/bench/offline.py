"""An engine without a server, in a process of its own: what a transfer costs, without HTTP, text and routing around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cachebus.engine import process_tree
from cachebus.errors import HeadstartError

ANSWER = "headstart-answer "
"""What an answer of the process begins with: vLLM writes to the same pipe."""

STILL_HELD = "vLLM did not empty its prefix cache: something still holds blocks"

_TAIL_LINES = 12


@dataclass(frozen=True)
class Asked:
    """An answer: seconds until it was whole, its tokens, and how many of the prompt's nobody computed."""

    seconds: float
    token_ids: list[int]
    cached: int


class EngineProcess:
    """A process that holds one vLLM engine: a JSON command a line in, an answer a line out; its other output goes to ``log``.

    ``options`` are the engine's; ``environment`` is over this process's own, None takes a name out of it. Raises HeadstartError where it ends.
    """

    def __init__(self, module: str, options: Mapping[str, Any], log: Path, environment: Mapping[str, str | None] | None = None) -> None:
        self._log = log.open("ab")
        merged = {**os.environ, **(environment or {})}
        kept = {name: value for name, value in merged.items() if value is not None}
        self._process = process_tree.start([sys.executable, "-m", module], kept, subprocess.PIPE, self._log, subprocess.PIPE)
        self._write(json.dumps(options).encode())

    def send(self, command: bytes) -> bytes:
        """The answer to one command."""
        self._write(command)
        return self.receive()

    def receive(self) -> bytes:
        """The next answer; the first one says that the engine serves."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER.encode()):
                return line.removeprefix(ANSWER.encode())
            self._log.write(line)
        raise self._failure()

    def stop(self) -> None:
        """Ends it with all its processes."""
        process_tree.kill_tree(self._process)
        self._log.close()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error

    def _failure(self) -> HeadstartError:
        self._log.flush()
        lines = Path(self._log.name).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return HeadstartError("the engine ended:\n  " + "\n  ".join(lines))


class OfflineEngine(EngineProcess):
    """One ``vllm.LLM``, which answers one prompt at a time."""

    def __init__(self, options: Mapping[str, Any], log: Path, environment: Mapping[str, str | None] | None = None) -> None:
        super().__init__("deploy.bench.offline_process", options, log, environment)
        self.receive()

    def ask(self, seed: int, tokens: int, answer: int = 1) -> Asked:
        """The answer to the prompt of that seed and length."""
        found = json.loads(self.send(json.dumps({"seed": seed, "tokens": tokens, "answer": answer}).encode()))
        return Asked(found["seconds"], found["token_ids"], found["cached"] or 0)

    def empty_hbm(self) -> None:
        """Empties vLLM's own prefix cache; a hit that follows comes from elsewhere."""
        if not json.loads(self.send(b'"empty"'))["empty"]:
            raise HeadstartError(STILL_HELD)
