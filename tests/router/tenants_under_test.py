"""Tenants for a router under test."""

from __future__ import annotations

from pathlib import Path

from cachebus.tenants import add_key


class TenantsUnderTest:
    """A file of tenants, and the keys to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: dict[str, str] = {}

    def add(self, name: str, *settings: str) -> None:
        """A tenant; ``settings`` are lines of its section."""
        key = self.keys[name] = add_key(self.path, name)
        text = self.path.read_text()
        self.path.write_text(text + "".join(f"  {line}\n" for line in settings))
        assert key not in text

    def bearer(self, name: str) -> dict[str, str]:
        """The header that a request of the tenant carries."""
        return {"authorization": f"Bearer {self.keys[name]}"}
