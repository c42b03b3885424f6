"""How a file of settings is read: YAML of sections, refused as a whole with every problem named, or taken.

Each section is a frozen msgspec struct; a key's help is the string below it. ``HEADSTART_SECTION_KEY`` in the environment overrides a key of the
file, ``section.key=value`` overrides both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import msgspec
import yaml

from cachebus.errors import SettingsError

ENVIRONMENT_PREFIX = "HEADSTART_"

Problem = tuple[str, str]
"""A key, and what is wrong with its value and what would be right."""

_File = TypeVar("_File", bound=msgspec.Struct)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every section. ``problems`` names values that no cluster could run with."""

    def problems(self) -> list[Problem]:
        """Impossible values and relations, by key."""
        return []


_Section = TypeVar("_Section", bound=Section)


class _Given(NamedTuple):
    """A value somebody gave. ``key`` is empty where a file only names the section."""

    section: str
    key: str
    value: Any
    place: str
    as_text: str | None = None
    """What was written, where that is a bare text: a key that takes text takes it as it stands"""


def load_settings(cls: type[_File], text: str | None, source: str, environ: Mapping[str, str], overrides: Sequence[str] = ()) -> _File:
    """Reads a file of sections. ``text`` is its YAML, None where there is none; ``source`` names it in messages.

    ``overrides`` are texts ``section.key=value``. Raises SettingsError with every problem, one a line:
    ``FILE:LINE: section.key: what is wrong; what would be right``.
    """
    problems: list[str] = []
    sections = get_type_hints(cls)
    given = [*_from_yaml(text, source, problems), *_from_environment(sections, environ), *_from_overrides(overrides)]
    values: dict[str, dict[str, _Given]] = {name: {} for name in sections}
    for item in given:
        if item.section not in sections:
            # A file's unknown section is named once, at its own line, not again for each of its keys.
            if not item.key or item.as_text is not None:
                problems.append(f"{item.place}: {item.section}: no such section{_meant(item.section, sections)}")
        elif item.key and item.key not in sections[item.section].__struct_fields__:
            known = sections[item.section].__struct_fields__
            problems.append(f"{item.place}: {item.section}.{item.key}: no such key{_meant(item.key, known)}")
        elif item.key:
            values[item.section][item.key] = item
    built = {name: _build(name, section_class, values[name], source, problems) for name, section_class in sections.items()}
    if problems:
        raise SettingsError("\n".join(problems))
    return cls(**built)


def load_named(cls: type[_Section], text: str, source: str) -> dict[str, _Section]:
    """Reads a file whose sections all are of one kind and have names of their own. Raises SettingsError as ``load_settings`` does."""
    problems: list[str] = []
    values: dict[str, dict[str, _Given]] = {}
    for item in _from_yaml(text, source, problems):
        section = values.setdefault(item.section, {})
        if item.key and item.key not in cls.__struct_fields__:
            problems.append(f"{item.place}: {item.section}.{item.key}: no such key{_meant(item.key, cls.__struct_fields__)}")
        elif item.key:
            section[item.key] = item
    built = {name: _build(name, cls, given, source, problems) for name, given in values.items()}
    if problems:
        raise SettingsError("\n".join(problems))
    return built


def _build(name: str, section_class: type[_Section], values: Mapping[str, _Given], source: str, problems: list[str]) -> _Section:
    fields = get_type_hints(section_class)
    good = {}
    for key, item in values.items():
        value = item.as_text if fields[key] is str and item.as_text is not None else item.value
        try:
            good[key] = msgspec.convert(value, fields[key])
        except msgspec.ValidationError as error:
            advice = "; put it in quotes" if fields[key] is str else ""
            problems.append(f"{item.place}: {name}.{key}: {str(error).lower()}{advice}")
    section = section_class(**good)
    for key, message in section.problems():
        problems.append(f"{values[key].place if key in values else source}: {name}.{key}: {message}")
    return section


def _from_yaml(text: str | None, source: str, problems: list[str]) -> list[_Given]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}:{_line(error)}: not YAML: {_reason(error)}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{source}:1: the file must hold sections, such as `cache:`")
    found = []
    for section_node, body in _once(root, source, "", problems):
        section = str(section_node.value)
        place = f"{source}:{section_node.start_mark.line + 1}"
        found.append(_Given(section, "", None, place))
        if isinstance(body, yaml.MappingNode):
            for key_node, value_node in _once(body, source, f"{section}.", problems):
                key, place = str(key_node.value), f"{source}:{key_node.start_mark.line + 1}"
                try:
                    value = yaml.SafeLoader("").construct_object(value_node, deep=True)
                except (yaml.YAMLError, ValueError) as error:
                    # A tag that is not YAML's own, or a date that no calendar has.
                    problems.append(f"{place}: {section}.{key}: no plain value: {_reason(error)}; give a number, a text, true, false or a list")
                else:
                    found.append(_Given(section, key, value, place))
        elif body.value not in ("", "~", "null"):
            problems.append(f"{place}: {section}: a section holds keys, such as `chunk_size: 256`")
    return found


def _once(mapping: yaml.MappingNode, source: str, prefix: str, problems: list[str]) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The mapping's pairs; a name that comes again is a problem, where YAML would silently take the last."""
    lines: dict[str, int] = {}
    for key_node, value_node in mapping.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in lines:
            problems.append(f"{source}:{line}: {prefix}{name}: given in line {lines[name]} already; keep one of them")
            continue
        lines[name] = line
        yield key_node, value_node


def _from_environment(sections: Mapping[str, Any], environ: Mapping[str, str]) -> list[_Given]:
    found = []
    for variable, value in sorted(environ.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        section, _, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("_")
        # Another program's HEADSTART_HOME is none of ours; a slip in a section's name is.
        if section in sections or difflib.get_close_matches(section, sections, n=1):
            found.append(_Given(section, key, _plain(value), variable, value))
    return found


def _from_overrides(overrides: Sequence[str]) -> list[_Given]:
    found = []
    for text in overrides:
        name, equals, value = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise SettingsError(f"--set {text}: write section.key=value, such as cache.chunk_size=512")
        found.append(_Given(section, key, _plain(value), f"--set {name}", value))
    return found


def _plain(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return value


def _line(error: yaml.YAMLError) -> int:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return mark.line + 1 if mark else 1


def _reason(error: Exception) -> str:
    reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return reason or str(error).splitlines()[0]


def _meant(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names)}"


def negative(section: Section, *keys: str) -> list[Problem]:
    """The problems of those keys whose values are below 0."""
    return [(key, f"{getattr(section, key)} is negative; give 0 or more") for key in keys if getattr(section, key) < 0]


def ports(section: Section, *keys: str) -> list[Problem]:
    """The problems of those keys whose values are no ports."""
    return [(key, f"{getattr(section, key)} is no port; give 0 to 65535") for key in keys if not 0 <= getattr(section, key) <= 65535]
