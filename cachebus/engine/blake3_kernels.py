"""BLAKE3 for a GPU, in Triton: leaves of 1 KiB, and the nodes above them.

Written after the specification (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020). Every value is a tensor of uint32, one a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

_CHUNK_START, _CHUNK_END, _PARENT, _ROOT, _KEYED = (tl.constexpr(flag) for flag in (1, 2, 4, 8, 16))


@triton.jit
def _rotated(x, bits: tl.constexpr):
    return (x >> bits) | (x << (32 - bits))


@triton.jit
def _mixed(a, b, c, d, x, y):
    a = a + b + x
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b + y
    d = _rotated(d ^ a, 8)
    c = c + d
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _round(v, m):
    v0, v4, v8, v12 = _mixed(v[0], v[4], v[8], v[12], m[0], m[1])
    v1, v5, v9, v13 = _mixed(v[1], v[5], v[9], v[13], m[2], m[3])
    v2, v6, v10, v14 = _mixed(v[2], v[6], v[10], v[14], m[4], m[5])
    v3, v7, v11, v15 = _mixed(v[3], v[7], v[11], v[15], m[6], m[7])
    v0, v5, v10, v15 = _mixed(v0, v5, v10, v15, m[8], m[9])
    v1, v6, v11, v12 = _mixed(v1, v6, v11, v12, m[10], m[11])
    v2, v7, v8, v13 = _mixed(v2, v7, v8, v13, m[12], m[13])
    v3, v4, v9, v14 = _mixed(v3, v4, v9, v14, m[14], m[15])
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@triton.jit
def _permuted(m):
    return m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13], m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8]


@triton.jit
def _compressed(h, m, counter, flags):
    """The chaining value after a block ``m`` of 64 bytes. All are uint32, one a lane; ``counter`` and ``flags`` too."""
    zero = counter * 0
    v = (
        h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7],
        zero + 0x6A09E667, zero + 0xBB67AE85, zero + 0x3C6EF372, zero + 0xA54FF53A, counter, zero, zero + 64, flags,
    )  # fmt: skip
    for _ in tl.static_range(6):
        v = _round(v, m)
        m = _permuted(m)
    v = _round(v, m)
    return v[0] ^ v[8], v[1] ^ v[9], v[2] ^ v[10], v[3] ^ v[11], v[4] ^ v[12], v[5] ^ v[13], v[6] ^ v[14], v[7] ^ v[15]


@triton.jit
def _four(words, place):
    """Four words in a row for each lane, which is one load of 16 bytes."""
    LANES: tl.constexpr = words.shape[0]
    quad = tl.load(words[:, None] + place + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(quad, (LANES, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _key_words(key, zero):
    return (
        zero + tl.load(key), zero + tl.load(key + 1), zero + tl.load(key + 2), zero + tl.load(key + 3),
        zero + tl.load(key + 4), zero + tl.load(key + 5), zero + tl.load(key + 6), zero + tl.load(key + 7),
    )  # fmt: skip


@triton.jit
def _store(nodes, place, h, mask):
    for word in tl.static_range(8):
        tl.store(nodes + place * 8 + word, h[word], mask=mask)


@triton.jit
def leaves(addresses, blocks, extents, key, nodes, shape, PAGE_LEAVES: tl.constexpr, LANES: tl.constexpr):
    """The chaining values of all leaves, one a lane, as ``nodes`` [entry, leaf, 8].

    ``addresses``: of each layer; ``blocks``: [entry, block]; ``extents``: address of each entry in the region; ``shape``: bytes from a block to
    the next, leaves in an entry, blocks in an entry.
    """
    stride, leaf_count, in_entry = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)
    entry = tl.program_id(1).to(tl.int64)
    leaf = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = leaf < leaf_count
    # Lanes beyond the end take the first leaf's work again, and keep it to themselves.
    leaf = tl.where(there, leaf, 0)
    page = leaf // PAGE_LEAVES
    block = tl.load(blocks + entry * in_entry + page % in_entry)
    inside = tl.load(addresses + page // in_entry) + block * stride + (leaf % PAGE_LEAVES).to(tl.int64) * 1024
    outside = tl.load(extents + entry) + leaf.to(tl.int64) * 1024
    words = tl.where(block >= 0, inside, outside).to(tl.pointer_type(tl.uint32))
    # Pages and extents lie at multiples of 1024: four words are one load.
    words = tl.multiple_of(words, 16)
    counter = leaf.to(tl.uint32)
    h = _key_words(key, counter * 0)
    for number in range(16):
        m0, m1, m2, m3 = _four(words, number * 16)
        m4, m5, m6, m7 = _four(words, number * 16 + 4)
        m8, m9, m10, m11 = _four(words, number * 16 + 8)
        m12, m13, m14, m15 = _four(words, number * 16 + 12)
        flags = counter * 0 + _KEYED + tl.where(number == 0, _CHUNK_START, 0) + tl.where(number == 15, _CHUNK_END, 0)
        flags = tl.where(leaf_count == 1, tl.where(number == 15, flags + _ROOT, flags), flags).to(tl.uint32)
        h = _compressed(h, (m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15), counter, flags)
    _store(nodes, entry * leaf_count + leaf, h, there)


@triton.jit
def _join(below, above, key, count, node, there):
    """The nodes ``node`` of the level above ``count`` nodes. A last one without a partner moves up as it is."""
    alone = 2 * node + 1 >= count
    words = below + node.to(tl.int64) * 16
    # A node without a partner is read twice: what would follow it may lie behind the end.
    partner = words + tl.where(alone, 0, 8)
    l0, l1, l2, l3 = _four(words, 0)
    l4, l5, l6, l7 = _four(words, 4)
    r0, r1, r2, r3 = _four(partner, 0)
    r4, r5, r6, r7 = _four(partner, 4)
    zero = (node * 0).to(tl.uint32)
    flags = (zero + _KEYED + _PARENT + tl.where(count == 2, _ROOT, 0)).to(tl.uint32)
    h = _compressed(_key_words(key, zero), (l0, l1, l2, l3, l4, l5, l6, l7, r0, r1, r2, r3, r4, r5, r6, r7), zero, flags)
    left = (l0, l1, l2, l3, l4, l5, l6, l7)
    for word in tl.static_range(8):
        tl.store(above + node.to(tl.int64) * 8 + word, tl.where(alone, left[word], h[word]), mask=there)


@triton.jit(do_not_specialize=["count"])
def joined(below, above, key, count, LANES: tl.constexpr):
    """Joins the ``count`` nodes of each entry in ``below`` [entry, node, 8] in pairs; one pair a lane."""
    entry = tl.program_id(1).to(tl.int64)
    node = tl.program_id(0) * LANES + tl.arange(0, LANES)
    half = (count + 1) // 2
    there = node < half
    _join(below + entry * count * 8, above + entry * half * 8, key, count, tl.where(there, node, 0), there)


@triton.jit(do_not_specialize=["count"])
def climbed(nodes, scratch, key, digests, count, LANES: tl.constexpr):
    """Joins all ``count`` nodes of each entry, level by level, one entry a program; ``scratch`` is as large as ``nodes``."""
    entry = tl.program_id(0).to(tl.int64)
    below = nodes + entry * count * 8
    above = scratch + entry * count * 8
    left = count
    while left > 1:
        half = (left + 1) // 2
        start = half * 0
        while start < half:
            node = start + tl.arange(0, LANES)
            there = node < half
            _join(below, above, key, left, tl.where(there, node, 0), there)
            start += LANES
        # The next level reads what other threads of this program wrote.
        tl.debug_barrier()
        below, above = above, below
        left = half
    words = tl.arange(0, 8)
    tl.store(digests + entry * 8 + words, tl.load(below + words))
