"""The whole configuration: every section of headstart.yaml."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import yaml

from cachebus.errors import SettingsError
from cachebus.settings import CacheSettings, ModelSettings, SecuritySettings
from cachebus.settings_file import Section, load_settings
from decode.settings import DecodeSettings
from prefill.settings import PrefillSettings
from router.scaling_settings import ScalingSettings
from router.settings import RouterSettings

DEFAULT_FILE = Path("headstart.yaml")
_UNFOLDED = 1 << 20


class Settings(msgspec.Struct, frozen=True):
    """One field a section."""

    model: ModelSettings
    prefill: PrefillSettings
    decode: DecodeSettings
    cache: CacheSettings
    router: RouterSettings
    scaling: ScalingSettings
    security: SecuritySettings


def read_settings(path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Reads ``path`` (None: ./headstart.yaml where there is one) under the environment and ``section.key=value`` overrides.

    Raises SettingsError.
    """
    file = path or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    text = None
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except OSError as error:
            raise SettingsError(f"{file}: can't be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise SettingsError(f"{file}: not UTF-8 text at byte {error.start}") from error
    return load_settings(Settings, text, str(file or "defaults"), environ, overrides)


def as_yaml(settings: Settings) -> str:
    """The settings as a file that gives them again."""
    return yaml.safe_dump(msgspec.to_builtins(settings), sort_keys=False)


def as_help(settings: Settings) -> str:
    """The same file with every section's and key's meaning in a comment before it."""
    lines: list[str] = []
    for section in settings.__struct_fields__:
        values = getattr(settings, section)
        meanings = _meanings(type(values))
        lines += [f"# {inspect.cleandoc(type(values).__doc__ or '')}", f"{section}:"]
        for key in values.__struct_fields__:
            value = yaml.safe_dump({key: getattr(values, key)}, width=_UNFOLDED)
            lines += [f"  # {meanings[key]}", *(f"  {line}" for line in value.splitlines())]
        lines.append("")
    return "\n".join(lines)


def _meanings(section_class: type[Section]) -> dict[str, str]:
    """Each key's meaning: the string below it in the source, a subclass's before its base's."""
    found: dict[str, str] = {}
    for cls in reversed(section_class.__mro__[: section_class.__mro__.index(Section)]):
        (definition,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[key] = text
    return found
