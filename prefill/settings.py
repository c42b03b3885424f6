"""The prefill pool's section of the settings."""

from __future__ import annotations

from cachebus.settings import WorkerSettings


class PrefillSettings(WorkerSettings, frozen=True):
    """Workers that compute prompts."""
