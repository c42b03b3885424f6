"""The decode pool's section of the settings."""

from __future__ import annotations

from cachebus.settings import WorkerSettings


class DecodeSettings(WorkerSettings, frozen=True):
    """Workers that generate."""

    count: int = 2
    """How many of them `headstart up` starts"""
