"""The decode role: which engine a decode worker starts, and what it does with the cache."""

from __future__ import annotations

import os

from cachebus.engine.command import WorkerSpec
from cachebus.engine.worker_process import WorkerProcess
from cachebus.settings import CacheSettings, ModelSettings, SecuritySettings
from decode.settings import DecodeSettings


def run(model: ModelSettings, decode: DecodeSettings, cache: CacheSettings, security: SecuritySettings, worker: str) -> int:
    """Runs a decode worker until it is told to end. It pulls prompts, computes what is missing, generates, and publishes what it computed.

    Returns the exit code; raises HeadstartError where the worker can't begin.
    """
    spec = WorkerSpec(worker, "decode", model, decode, cache, security, cache.resolved_run_dir(os.environ))
    return WorkerProcess(spec).run()
