"""Settings: one YAML file of sections, refused as a whole with every problem named, or taken.

Each section is a frozen msgspec struct; a key's help is the string below it. This file holds the strict loader and the sections that every
role shares. ``HEADSTART_SECTION_KEY`` in the environment overrides a key of the file, ``section.key=value`` overrides both.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_type_hints

import msgspec
import yaml

from cachebus.errors import SettingsError

ENVIRONMENT_PREFIX = "HEADSTART_"
REMOTE_SCHEMES = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://", "redis+sentinel://", "rediss+sentinel://")
_AT_LEAST_ONE = ("remote_timeout_ms", "remote_connections", "promote_ms_max", "peer_streams", "peer_timeout_ms")
_PEER = re.compile(r"(?:(?P<name>[^@\s]+)@)?(?:\[(?P<six>[0-9a-fA-F:]+)\]|(?P<host>[^:@\s\[\]]+)):(?P<port>[0-9]{1,5})")
_NODE_PORTS = 3
_IPC_PATH_BYTES_MAX = 107
_LONGEST_SOCKET = "/events.sock"
_TOO_LONG = f"too long for a socket's path ({_IPC_PATH_BYTES_MAX} bytes with the socket's name): choose a shorter one"

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
    tensor_parallel_size: int = 1
    """GPUs that one worker computes on together; each publishes and pulls its part of a chunk"""
    enforce_eager: bool = False
    """Run without compiled graphs: a faster start, a slower engine on GPUs"""
    seed: int = 0
    """Seed of the engine"""

    def problems(self) -> list[Problem]:
        problems = negative(self, "max_model_len", "block_size", "seed")
        if self.tensor_parallel_size < 1:
            problems.append(("tensor_parallel_size", f"{self.tensor_parallel_size} is less than 1"))
        return problems


class CacheSettings(Section, frozen=True):
    """The cache of a node."""

    chunk_size: int = 256
    """Tokens in a chunk, the unit that is stored; a multiple of the block size"""
    local_cpu: bool = True
    """Keep chunks in DRAM; the region is also the way between workers, so it can't be false"""
    max_local_cpu_size: float = 5.0
    """Gigabytes (1e9 bytes) of DRAM for the whole node (LMCache's key of this name counts for one worker)"""
    local_disk: str = ""
    """Folder of the NVMe tier, on a file system with O_DIRECT; empty: no such tier"""
    max_local_disk_size: float = 0.0
    """Gigabytes (1e9 bytes) that the NVMe tier may take on disk, all its files together"""
    remote_url: str = ""
    """Shared tier: redis://, rediss://, unix://, redis+cluster:// or redis+sentinel://HOST:PORT,.../SERVICE (Valkey is the same); empty: none"""
    remote_ttl_seconds: int = 604_800
    """How long the shared tier keeps a chunk that nobody asks for; 0: until it evicts it"""
    remote_timeout_ms: int = 40
    """Longest silence of the shared tier during one operation: then it is a miss, and the tier is left alone until it answers again"""
    remote_connections: int = 4
    """Connections for reading from the shared tier, each with a thread; a quarter as many write"""
    node_host: str = "127.0.0.1"
    """Address where other nodes reach this one; one that is not loopback needs security.keys_dir"""
    node_port: int = 0
    """Port for other nodes, with the two after it; 0: none reaches this one"""
    peers: list[str] = []
    """Other nodes whose chunks may be pulled: HOST:PORT (their node_port), or NAME@HOST:PORT with keys, NAME as in `headstart keys add`"""
    peer_streams: int = 4
    """Connections for reading from other nodes, each with a thread"""
    peer_timeout_ms: int = 200
    """Longest silence of another node while it is read from: then its chunk is a miss"""
    eviction: Literal["lru", "s3fifo"] = "lru"
    """What goes first when a tier is full: lru, or s3fifo, which prompts that come once can't flush"""
    chunk_ttl_seconds: int = 0
    """A chunk that was not used for this long is dropped from DRAM and NVMe; 0: never"""
    tenant_share_max: float = 1.0
    """Share of a tier that chunks under one cache_salt may take"""
    write_behind_gb_max: float = 1.0
    """Gigabytes of the region that may wait to be written to slower tiers; what exceeds it is written when DRAM evicts it"""
    promote_ms_max: int = 500
    """Longest wait for the next chunk on its way up from a slower tier; then the rest is computed"""
    save_decode_cache: bool = True
    """Publish what decode workers generate, so that a chat's next turn is a hit"""
    run_dir: str = ""
    """Folder of the bus's sockets and locks; empty: $XDG_RUNTIME_DIR/headstart, or /tmp/headstart-UID"""
    region_path: str = ""
    """The shared memory file; empty: in /dev/shm, named after run_dir"""
    lookup_ms_max: int = 200
    """Longest wait for a chunk that another worker is just writing"""
    hbm_events: bool = True
    """Let engines tell what their HBM holds, so that prompts go there; costs an engine with blocks of 16 tokens up to 0.4 ms per 1,000 new tokens"""
    pull_tokens_min: int = 64
    """A prefix that saves fewer tokens than this is computed, not pulled"""
    metrics_port: int = 0
    """Port of the cachebus's own /metrics; 0: none"""

    def problems(self) -> list[Problem]:
        found = negative(self, "lookup_ms_max", "pull_tokens_min", "remote_ttl_seconds", "chunk_ttl_seconds", "write_behind_gb_max")
        found += ports(self, "metrics_port", "node_port") + self._tier_problems() + self._peer_problems()
        if self.chunk_size < 16 or self.chunk_size % 16:
            found.append(("chunk_size", f"{self.chunk_size} is no multiple of 16; 256 suits most models, 512 contexts over 128K"))
        if not self.local_cpu:
            found.append(("local_cpu", "the shared region is how workers exchange KV: leave it true and lower max_local_cpu_size"))
        # Written so that "not a number" is refused, too.
        if not 0 < self.max_local_cpu_size < math.inf:
            found.append(("max_local_cpu_size", f"{self.max_local_cpu_size} gives no room; it is in gigabytes, for the whole node"))
        if self.run_dir and not _fits_sockets(Path(self.run_dir).absolute()):
            found.append(("run_dir", _TOO_LONG))
        return found

    def _tier_problems(self) -> list[Problem]:
        found = [(key, f"{getattr(self, key)} is too small; give at least 1") for key in _AT_LEAST_ONE if getattr(self, key) < 1]
        if not 0 <= self.max_local_disk_size < math.inf or (self.local_disk and not self.max_local_disk_size):
            found.append(("max_local_disk_size", f"{self.max_local_disk_size} gives local_disk no room; it is in gigabytes"))
        if self.remote_url and not self.remote_url.startswith(REMOTE_SCHEMES):
            found.append(("remote_url", f"no shared tier is known that starts so; give one of {', '.join(REMOTE_SCHEMES)}"))
        if not 0 < self.tenant_share_max <= 1:
            found.append(("tenant_share_max", f"{self.tenant_share_max} is no share; give more than 0 and at most 1"))
        return found

    def _peer_problems(self) -> list[Problem]:
        bad = [peer for peer in self.peers if not _PEER.fullmatch(peer)]
        found = [("peers", f"{peer!r} is no address; write HOST:PORT, or NAME@HOST:PORT with keys") for peer in bad]
        if self.node_port > 65535 - _NODE_PORTS:
            found.append(("node_port", f"{self.node_port} leaves no room for the two ports after it"))
        return found

    def peer_places(self) -> list[tuple[str, str, int]]:
        """Name ("" where none is given), host and port of every peer."""
        found = [match for peer in self.peers if (match := _PEER.fullmatch(peer))]
        return [(match["name"] or "", match["six"] or match["host"], int(match["port"])) for match in found]

    def resolved_run_dir(self, environ: Mapping[str, str]) -> Path:
        """The run directory. Raises SettingsError where a socket in it would have a path too long for the kernel."""
        runtime = environ.get("XDG_RUNTIME_DIR")
        default = f"{runtime}/headstart" if runtime else f"/tmp/headstart-{os.getuid()}"
        folder = Path(self.run_dir or default).absolute()
        if not _fits_sockets(folder):
            raise SettingsError(f"cache.run_dir: {folder} is {_TOO_LONG}")
        return folder

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
    """File of 32 bytes that key the digests; empty: keys_dir's, or made by the cachebus in local_disk or run_dir. Nodes that share chunks share it"""
    keys_dir: str = ""
    """This node's folder of keys, made by `headstart keys`: with it the bus speaks to other nodes encrypted, and only to those that it knows"""
    encrypt_at_rest: bool = False
    """Encrypt chunks on disk and in the shared tier (AES-GCM); needs digest_key_file or keys_dir, kept elsewhere than local_disk"""
    encrypt_peer_bytes: bool = True
    """Encrypt chunks' bytes between nodes, too, at 0.9 GB/s a stream; false: they travel as they are, checked by their keyed digest all the same"""

    def problems(self) -> list[Problem]:
        if self.encrypt_at_rest and not self.digest_key_file and not self.keys_dir:
            return [("encrypt_at_rest", "its key comes from the digest key, which would lie beside the chunks: give digest_key_file or keys_dir")]
        return []


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
        for key in ("port", "metrics_port"):
            port = getattr(self, key)
            if port and self.count > 1:
                found.append((key, f"{self.count} workers can't share port {port}: leave it 0, or start each by itself with its own port"))
        return found


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


def _build(name: str, section_class: type[Section], values: Mapping[str, _Given], source: str, problems: list[str]) -> Section:
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


def _fits_sockets(run_dir: Path) -> bool:
    return len(os.fsencode(f"{run_dir}{_LONGEST_SOCKET}")) <= _IPC_PATH_BYTES_MAX


def negative(section: Section, *keys: str) -> list[Problem]:
    """The problems of those keys whose values are below 0."""
    return [(key, f"{getattr(section, key)} is negative; give 0 or more") for key in keys if getattr(section, key) < 0]


def ports(section: Section, *keys: str) -> list[Problem]:
    """The problems of those keys whose values are no ports."""
    return [(key, f"{getattr(section, key)} is no port; give 0 to 65535") for key in keys if not 0 <= getattr(section, key) <= 65535]
