"""Settings: one YAML file of sections, refused as a whole with every problem named, or taken.

Each section is a frozen msgspec struct; a key's help is the string below it. This file holds the strict loader and the sections that every
role shares. ``HEADSTART_SECTION_KEY`` in the environment overrides a key of the file.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
import yaml

from cachebus.errors import SettingsError

ENVIRONMENT_PREFIX = "HEADSTART_"
_IPC_PATH_BYTES_MAX = 107
_LONGEST_SOCKET = "/events.sock"

Problem = tuple[str, str]
"""A key, and what is wrong with its value and what would be right."""

_File = TypeVar("_File", bound=msgspec.Struct)


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every section. ``problems`` names values that no cluster could run with."""

    def problems(self) -> list[Problem]:
        """Impossible values and relations, by key."""
        return []


class ModelSettings(Section, frozen=True):
    """The model that every worker serves."""

    name: str = ""
    """Folder or hub name; empty: a small random model made on the spot"""
    served_name: str = ""
    """The name clients use; empty: the model's name"""
    revision: str = ""
    """Hub revision; empty: the default one"""
    dtype: str = "auto"
    """Type of weights and activations: auto, bfloat16, float16 or float32"""
    kv_cache_dtype: str = "auto"
    """Type of KV: auto (the model's), fp8, ..."""
    max_model_len: int = 0
    """Longest prompt and answer in tokens; 0: what the model allows"""
    block_size: int = 0
    """Tokens in a KV block; 0: the engine's default"""
    enforce_eager: bool = False
    """Run without compiled graphs: a faster start, a slower engine on GPUs"""
    seed: int = 0
    """Seed of the engine"""

    def problems(self) -> list[Problem]:
        return negative(self, "max_model_len", "block_size", "seed")


class CacheSettings(Section, frozen=True):
    """The cache of a node."""

    chunk_size: int = 256
    """Tokens in a chunk, the unit that is stored; a multiple of the block size"""
    local_cpu: bool = True
    """Keep chunks in DRAM; the region is also the way between workers, so it can't be false"""
    max_local_cpu_size: float = 5.0
    """Gigabytes (1e9 bytes) of DRAM for the whole node (LMCache's key of this name counts for one worker)"""
    save_decode_cache: bool = True
    """Publish what decode workers generate, so that a chat's next turn is a hit"""
    run_dir: str = ""
    """Folder of the bus's sockets and locks; empty: $XDG_RUNTIME_DIR/headstart, or /tmp/headstart-UID"""
    region_path: str = ""
    """The shared memory file; empty: in /dev/shm, named after run_dir"""
    lookup_ms_max: int = 200
    """Longest wait for a chunk that another worker is just writing"""
    pull_tokens_min: int = 64
    """A prefix that saves fewer tokens than this is computed, not pulled"""
    metrics_port: int = 0
    """Port of the cachebus's own /metrics; 0: none"""

    def problems(self) -> list[Problem]:
        found = negative(self, "lookup_ms_max", "pull_tokens_min") + ports(self, "metrics_port")
        if self.chunk_size < 16 or self.chunk_size % 16:
            found.append(("chunk_size", f"{self.chunk_size} is no multiple of 16; 256 suits most models, 512 contexts over 128K"))
        if not self.local_cpu:
            found.append(("local_cpu", "the shared region is how workers exchange KV: leave it true and lower max_local_cpu_size"))
        if self.max_local_cpu_size <= 0:
            found.append(("max_local_cpu_size", f"{self.max_local_cpu_size} gives no room; it is in gigabytes, for the whole node"))
        if self.run_dir and len(os.fsencode(self.run_dir + _LONGEST_SOCKET)) > _IPC_PATH_BYTES_MAX:
            found.append(("run_dir", f"too long for a socket's path ({_IPC_PATH_BYTES_MAX} bytes with the socket's name): choose a shorter one"))
        return found

    def resolved_run_dir(self, environ: Mapping[str, str]) -> Path:
        """The run directory."""
        if self.run_dir:
            return Path(self.run_dir).absolute()
        runtime = environ.get("XDG_RUNTIME_DIR")
        return Path(runtime, "headstart") if runtime else Path(f"/tmp/headstart-{os.getuid()}")

    def resolved_region_path(self, environ: Mapping[str, str]) -> Path:
        """The region's file."""
        if self.region_path:
            return Path(self.region_path).absolute()
        name = hashlib.sha256(os.fsencode(self.resolved_run_dir(environ))).hexdigest()[:8]
        return Path(f"/dev/shm/headstart-{os.getuid()}-{name}")


class SecuritySettings(Section, frozen=True):
    """What guards the cache."""

    verify_digests: bool = True
    """Check every chunk against its digest where it arrived; turn it off only to show what it is for"""
    digest_key_file: str = ""
    """File of 32 bytes that key the digests; empty: made by the cachebus in run_dir"""


class WorkerSettings(Section, frozen=True):
    """A pool of workers, prefill or decode."""

    count: int = 1
    """How many of them `headstart up` starts"""
    host: str = "127.0.0.1"
    """Address that a worker's HTTP server binds"""
    port: int = 0
    """Its port; 0: a free one"""
    metrics_port: int = 0
    """Port of the worker process's own /metrics (the engine's are on its HTTP port); 0: none"""
    max_num_batched_tokens: int = 0
    """Tokens in one engine step; 0: the engine's default"""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that the engine takes"""
    kv_cache_gb: int = 1
    """GiB of KV cache of an engine on CPU"""
    engine_args: list[str] = []
    """More flags for vLLM's API server, as they would stand on its command line"""
    start_seconds_max: int = 600
    """Longest start; a worker that takes longer ends"""
    drain_seconds_max: int = 30
    """Longest wait for running requests when a worker is asked to end"""

    def problems(self) -> list[Problem]:
        found = negative(self, "count", "max_num_batched_tokens", "drain_seconds_max") + ports(self, "port", "metrics_port")
        if not 0 < self.gpu_memory_utilization <= 1:
            found.append(("gpu_memory_utilization", f"{self.gpu_memory_utilization} is no share; give more than 0 and at most 1"))
        for key in ("kv_cache_gb", "start_seconds_max"):
            if getattr(self, key) < 1:
                found.append((key, f"{getattr(self, key)} is too small; give at least 1"))
        if self.port and self.count > 1:
            found.append(("port", f"{self.count} workers can't share port {self.port}: leave it 0, or start each by itself with its own port"))
        return found


def load_settings(cls: type[_File], text: str | None, source: str, environ: Mapping[str, str]) -> _File:
    """Reads a file of sections. ``text`` is its YAML, None where there is none; ``source`` names it in messages.

    Raises SettingsError with every problem, one a line: ``FILE:LINE: section.key: what is wrong; what would be right``.
    """
    problems: list[str] = []
    sections = get_type_hints(cls)
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    places: dict[tuple[str, str], str] = {}
    for section, key, value, place in [*_from_yaml(text, source, problems), *_from_environment(sections, environ)]:
        if section not in sections:
            if not key:
                problems.append(f"{place}: {section}: no such section{_meant(section, list(sections))}")
        elif not key:
            continue
        elif key not in sections[section].__struct_fields__:
            problems.append(f"{place}: {section}.{key}: no such key{_meant(key, sections[section].__struct_fields__)}")
        else:
            values[section][key] = value
            places[section, key] = place
    built: dict[str, Section] = {}
    for name, section_class in sections.items():
        fields = get_type_hints(section_class)
        good = {}
        for key, value in values[name].items():
            try:
                good[key] = msgspec.convert(value, fields[key], strict=not isinstance(value, str) or fields[key] is str)
            except msgspec.ValidationError as error:
                problems.append(f"{places[name, key]}: {name}.{key}: {str(error).lower()}")
        section_values = section_class(**good)
        for key, message in section_values.problems():
            problems.append(f"{places.get((name, key), source)}: {name}.{key}: {message}")
        built[name] = section_values
    if problems:
        raise SettingsError("\n".join(problems))
    return cls(**built)


def _from_yaml(text: str | None, source: str, problems: list[str]) -> list[tuple[str, str, Any, str]]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader) if text else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(f"{source}:{line}: not YAML: {error.problem}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{source}:1: the file must hold sections, such as `cache:`")
    found = []
    loader = yaml.SafeLoader("")
    for section_node, body in root.value:
        place = f"{source}:{section_node.start_mark.line + 1}"
        found.append((str(section_node.value), "", None, place))
        if isinstance(body, yaml.MappingNode):
            for key_node, value_node in body.value:
                place = f"{source}:{key_node.start_mark.line + 1}"
                found.append((str(section_node.value), str(key_node.value), loader.construct_object(value_node, deep=True), place))
        elif body.value not in ("", None):
            problems.append(f"{place}: {section_node.value}: a section holds keys, such as `chunk_size: 256`")
    return found


def _from_environment(sections: Mapping[str, Any], environ: Mapping[str, str]) -> list[tuple[str, str, Any, str]]:
    found = []
    for variable, value in sorted(environ.items()):
        for section in sections:
            prefix = f"{ENVIRONMENT_PREFIX}{section.upper()}_"
            if variable.startswith(prefix):
                found.append((section, variable.removeprefix(prefix).lower(), _plain(value), variable))
    return found


def _plain(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def negative(section: Section, *keys: str) -> list[Problem]:
    """The problems of those keys whose values are below 0."""
    return [(key, f"{getattr(section, key)} is negative; give 0 or more") for key in keys if getattr(section, key) < 0]


def ports(section: Section, *keys: str) -> list[Problem]:
    """The problems of those keys whose values are no ports."""
    return [(key, f"{getattr(section, key)} is no port; give 0 to 65535") for key in keys if not 0 <= getattr(section, key) <= 65535]
