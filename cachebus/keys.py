"""Content addresses: a hash chain over what a chunk's KV depends on.

A chunk is ``chunk_size`` tokens. Its key is BLAKE3 over its parent's key and its token ids, so it names the whole prefix
up to its end; the chain starts at a root made of the namespace (all that changes the values of KV: weights, KV dtype,
engine, ...; see ``cachebus.engine.namespace``), a tenant's salt and an adapter. The blocks of a prompt's end that fill no chunk
have keys of their own kind, so that a block can't be taken for a chunk. No key ever comes from a client or from ``hash()``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from blake3 import blake3

from cachebus.chunk import TENANT_BYTES

KEY_BYTES = 32
"""Length of a key."""

_ROOT, _CHUNK, _TAIL, _TENANT, _RANK = b"headstart root 1", b"c", b"t", b"headstart tenant 1", b"headstart rank 1"


def namespace_digest(parts: dict[str, str]) -> bytes:
    """One digest (32 bytes) of named parts; any difference in a name or a value changes it."""
    return _digest(_ROOT, *(field for name in sorted(parts) for field in (name.encode(), parts[name].encode())))


def root_key(namespace: bytes, salt: str = "", adapter: str = "") -> bytes:
    """Where a prompt's chain starts: tokens under different namespaces, salts or adapters never share a key."""
    return _digest(_ROOT, namespace, salt.encode(), adapter.encode())


def tenant_id(salt: str) -> bytes:
    """Names the tenant of a salt (8 bytes) without telling the salt; zeros where there is none."""
    return _digest(_TENANT, salt.encode())[:TENANT_BYTES] if salt else bytes(TENANT_BYTES)


def chunk_key(parent: bytes, words: bytes) -> bytes:
    """The key of the chunk after ``parent`` (a chunk or a root); ``words``: its token ids, 4 bytes each in the machine's order."""
    return blake3(_CHUNK + parent + words).digest()


def extend_chunk_keys(keys: list[bytes], root: bytes, token_ids: Sequence[int], chunk_size: int) -> None:
    """Appends to ``keys`` the keys of all full chunks of ``token_ids`` that it lacks."""
    parent = keys[-1] if keys else root
    for start in range(len(keys) * chunk_size, len(token_ids) - chunk_size + 1, chunk_size):
        parent = chunk_key(parent, array("I", token_ids[start : start + chunk_size]).tobytes())
        keys.append(parent)


def chunk_keys(root: bytes, token_ids: Sequence[int], chunk_size: int) -> list[bytes]:
    """The keys of all full chunks of ``token_ids``."""
    keys: list[bytes] = []
    extend_chunk_keys(keys, root, token_ids, chunk_size)
    return keys


def tail_keys(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The keys of the blocks of ``token_ids``, which follow the chunk (or root) ``parent``; the last block may be partly filled.

    A key names exactly the tokens of its block, so a partly filled block is found again only by a prompt that ends in it.
    """
    keys = []
    for start in range(0, len(token_ids), block_size):
        parent = blake3(_TAIL + parent + array("I", token_ids[start : start + block_size]).tobytes()).digest()
        keys.append(parent)
    return keys


def rank_key(key: bytes, rank: int) -> bytes:
    """The key of what tensor-parallel rank ``rank`` has of a chunk or tail block; the first rank's is the chunk's own key."""
    return key if rank == 0 else _digest(_RANK, rank.to_bytes(4, "little"), key)


def _digest(*fields: bytes) -> bytes:
    hasher = blake3()
    for field in fields:
        hasher.update(len(field).to_bytes(8, "little"))
        hasher.update(field)
    return hasher.digest()
