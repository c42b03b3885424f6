"""The whole configuration: every section of headstart.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import yaml

from cachebus.errors import SettingsError
from cachebus.settings import ENVIRONMENT_PREFIX, CacheSettings, ModelSettings, SecuritySettings, load_settings
from decode.settings import DecodeSettings
from prefill.settings import PrefillSettings
from router.settings import RouterSettings

DEFAULT_FILE = Path("headstart.yaml")


class Settings(msgspec.Struct, frozen=True):
    """One field a section."""

    model: ModelSettings
    prefill: PrefillSettings
    decode: DecodeSettings
    cache: CacheSettings
    router: RouterSettings
    security: SecuritySettings


def read_settings(path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Reads ``path`` (None: ./headstart.yaml where there is one) under the environment and ``section.key=value`` overrides.

    Raises SettingsError.
    """
    file = path or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    text = None
    if file is not None:
        try:
            text = file.read_text()
        except OSError as error:
            raise SettingsError(f"{file}: can't be read: {error.strerror}") from error
    return load_settings(Settings, text, str(file or "defaults"), {**environ, **dict(map(_override, overrides))})


def as_yaml(settings: Settings) -> str:
    """The settings as a file that gives them again."""
    return yaml.safe_dump(msgspec.to_builtins(settings), sort_keys=False)


def _override(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot):
        raise SettingsError(f"--set {text}: write section.key=value, such as cache.chunk_size=512")
    return f"{ENVIRONMENT_PREFIX}{section.upper()}_{key.upper()}", value
