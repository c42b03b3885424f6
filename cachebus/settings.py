"""The sections of the settings that every role shares. ``cachebus.settings_file`` reads them; a key's help is the string below it."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cachebus.errors import SettingsError
from cachebus.settings_file import Problem, Section, negative, ports

REMOTE_SCHEMES = ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+cluster://", "redis+sentinel://", "rediss+sentinel://")
_AT_LEAST_ONE = ("remote_timeout_ms", "remote_connections", "promote_ms_max", "peer_streams", "peer_timeout_ms", "handover_hold_ms")
_PEER = re.compile(r"(?:(?P<name>[^@\s]+)@)?(?:\[(?P<six>[0-9a-fA-F:]+)\]|(?P<host>[^:@\s\[\]]+)):(?P<port>[0-9]{1,5})")
_NODE_PORTS = 3
_IPC_PATH_BYTES_MAX = 107
_LONGEST_SOCKET = "/events.sock"
_TOO_LONG = f"too long for a socket's path ({_IPC_PATH_BYTES_MAX} bytes with the socket's name): choose a shorter one"


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
    segment_cache_mb: int = 64
    """Megabytes (1e6 bytes) for token ids of texts that a worker's API server tokenised before, at 4 bytes a token; 0: tokenise every prompt whole"""
    adapters: list[str] = []  # noqa: RUF012 - msgspec gives each its own
    """LoRA adapters that every worker serves beside the model: NAME=FOLDER, NAME as clients have it in `model`"""

    def named_adapters(self) -> dict[str, str]:
        """Folders by name."""
        return {name: folder for name, _, folder in (adapter.partition("=") for adapter in self.adapters)}

    def problems(self) -> list[Problem]:
        problems = negative(self, "max_model_len", "block_size", "seed", "segment_cache_mb")
        problems += [("adapters", f"{adapter!r} is not NAME=FOLDER") for adapter in self.adapters if not all(adapter.partition("="))]
        if len(self.named_adapters()) < len(self.adapters) or (self.served_name or self.name) in self.named_adapters():
            problems.append(("adapters", "two have the same name, or one has the model's"))
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
    remote_capacity_gb: float = 0.0
    """Gigabytes (1e9 bytes) of the shared tier that tenants' shares are of, in a cluster of all nodes together; 0: the servers' own maxmemory"""
    remote_connections: int = 4
    """Connections for reading from the shared tier, each with a thread; a quarter as many write"""
    node_host: str = "127.0.0.1"
    """Address where other nodes reach this one; one that is not loopback needs security.keys_dir"""
    node_port: int = 0
    """Port for other nodes, with the two after it; 0: none reaches this one"""
    peers: list[str] = []  # noqa: RUF012 - msgspec gives each its own
    """Other nodes whose chunks may be pulled: HOST:PORT (their node_port), or NAME@HOST:PORT with keys, NAME as in `headstart keys add`"""
    peers_dns: str = ""
    """One name for all nodes, written like a peer: every address that it resolves to (a headless service's) is a peer, for as long as it does"""
    peer_workers: bool = False
    """Tell routers here of the workers of other nodes, too: for the bus of a router that runs apart from the workers"""
    peer_streams: int = 6
    """Connections for reading from other nodes, each with a thread"""
    peer_timeout_ms: int = 200
    """Longest silence of another node while it is read from: then its chunk is a miss"""
    eviction: Literal["lru", "s3fifo"] = "lru"
    """What goes first when a tier is full: lru, or s3fifo, which prompts that come once can't flush"""
    chunk_ttl_seconds: int = 0
    """A chunk that was not used for this long is dropped from DRAM and NVMe; 0: never"""
    tenant_share_max: float = 1.0
    """Share of a tier, the shared one too, that chunks under one cache_salt may take"""
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
    handover: Literal["region", "hbm"] = "region"
    """Way from prefill to decode worker of a node: region, or hbm: out of the engine's own blocks, where one GPU reaches them, else the region"""
    handover_hold_ms: int = 1000
    """With hbm: longest time that a prefill worker keeps a computed prompt's blocks for who reads them"""
    handover_hold_gb: float = 8.0
    """With hbm: gigabytes (1e9 bytes) of blocks that a worker keeps so at most"""
    pull_tokens_min: int = 64
    """A prefix that saves fewer tokens than this is computed, not pulled"""
    metrics_host: str = "127.0.0.1"
    """Address of the cachebus's own /metrics, /health and /ready"""
    metrics_port: int = 0
    """Their port; 0: none"""

    @property
    def hold_ms(self) -> int:
        """``handover_hold_ms`` where blocks are handed over, else 0."""
        return self.handover_hold_ms if self.handover == "hbm" else 0

    def problems(self) -> list[Problem]:
        found = negative(
            self, "lookup_ms_max", "pull_tokens_min", "remote_ttl_seconds", "chunk_ttl_seconds", "write_behind_gb_max", "handover_hold_gb"
        )
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
        if not 0 <= self.remote_capacity_gb < math.inf:
            found.append(("remote_capacity_gb", f"{self.remote_capacity_gb} is no size; it is in gigabytes, 0: the servers' own maxmemory"))
        if not 0 < self.tenant_share_max <= 1:
            found.append(("tenant_share_max", f"{self.tenant_share_max} is no share; give more than 0 and at most 1"))
        return found

    def _peer_problems(self) -> list[Problem]:
        bad = [peer for peer in self.peers if not _PEER.fullmatch(peer)]
        found = [("peers", f"{peer!r} is no address; write HOST:PORT, or NAME@HOST:PORT with keys") for peer in bad]
        if self.peers_dns and not _PEER.fullmatch(self.peers_dns):
            found.append(("peers_dns", f"{self.peers_dns!r} is no address; write HOST:PORT, or NAME@HOST:PORT with keys"))
        if self.peer_workers and not self.peers and not self.peers_dns:
            found.append(("peer_workers", "there are no other nodes: give peers or peers_dns"))
        if self.node_port > 65535 - _NODE_PORTS:
            found.append(("node_port", f"{self.node_port} leaves no room for the two ports after it"))
        return found

    def peer_places(self) -> list[tuple[str, str, int]]:
        """Name ("" where none is given), host and port of every peer."""
        return [_place(peer) for peer in self.peers]

    def dns_place(self) -> tuple[str, str, int] | None:
        """The same of the name that stands for all nodes."""
        return _place(self.peers_dns) if self.peers_dns else None

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
    tenants_file: str = ""
    """File of tenants, the hashes of their API keys and their limits (`headstart keys tenant` writes it); empty: everybody may ask, as one tenant"""
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
    """Address that a worker's HTTP server binds; 0.0.0.0: every one, and routers are told that of the machine's own name"""
    port: int = 0
    """Its port; 0: a free one"""
    metrics_port: int = 0
    """Port of the worker process's own /metrics, /health and /ready (the engine's metrics are on its HTTP port); 0: none"""
    max_num_batched_tokens: int = 0
    """Tokens in one engine step; 0: the engine's default"""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that the engine takes"""
    kv_cache_gb: int = 1
    """GiB of KV cache of an engine on CPU"""
    engine_args: list[str] = []  # noqa: RUF012 - msgspec gives each its own
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


def _place(peer: str) -> tuple[str, str, int]:
    match = _PEER.fullmatch(peer)
    assert match is not None, "problems() refuses such settings"
    return match["name"] or "", match["six"] or match["host"], int(match["port"])


def _fits_sockets(run_dir: Path) -> bool:
    return len(os.fsencode(f"{run_dir}{_LONGEST_SOCKET}")) <= _IPC_PATH_BYTES_MAX
