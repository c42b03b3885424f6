"""The prefill role: which engine a prefill worker starts, and what it does with the cache."""

from __future__ import annotations

import os

from cachebus.engine.command import WorkerSpec
from cachebus.engine.worker_process import WorkerProcess
from cachebus.settings import CacheSettings, ModelSettings, SecuritySettings
from prefill.settings import PrefillSettings


def run(model: ModelSettings, prefill: PrefillSettings, cache: CacheSettings, security: SecuritySettings, worker: str) -> int:
    """Runs a prefill worker until it is told to end. It pulls the known part of a prompt, computes and publishes the rest.

    Returns the exit code; raises HeadstartError where the worker can't begin.
    """
    spec = WorkerSpec(worker, "prefill", model, prefill, cache, security, cache.resolved_run_dir(os.environ))
    return WorkerProcess(spec).run()
