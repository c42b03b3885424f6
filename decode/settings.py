"""The decode pool's section of the settings."""

from __future__ import annotations

from cachebus.settings import WorkerSettings
from cachebus.settings_file import Problem


class DecodeSettings(WorkerSettings, frozen=True):
    """Workers that generate."""

    count: int = 2
    """How many of them `headstart up` starts"""

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.count == 0:
            found.append(("count", "0 workers answer nobody; give at least 1"))
        return found
