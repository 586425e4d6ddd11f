"""The Triton kernels of the room `paged_attention` (formula: paged_attention.py): split-KV decode, its merge, the cache write.

One program is one (sequence, key/value head, part of SPLIT tokens); the query heads of the group are the rows of one tl.dot.
"""

from fastppo.kernels._triton import INTERPRET, tl, triton

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _dot(a, b):
    if INTERPRET:  # tl.dot on bf16 is silently wrong there
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _capped(s, softcap):
    # tanh by e^-2|x|, which cannot overflow
    e = tl.exp(-2.0 * tl.abs(s / softcap))
    return softcap * tl.where(s < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def paged_attention_kernel(
    q_BHD,
    k_cache,
    v_cache,
    tables_BM,
    lens_B,
    partial,
    q_row,
    q_head,
    M,
    parts,
    scale,
    softcap,
    window,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    D_PADDED: tl.constexpr,
    STEP: tl.constexpr,
):
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    kv, b = rest % KV, (rest // KV).to(tl.int64)
    length = tl.load(lens_B + b)
    g, d = tl.arange(0, GROUP_PADDED), tl.arange(0, D_PADDED)
    live = (g[:, None] < GROUP) & (d[None, :] < D)
    heads = (kv * GROUP + g).to(tl.int64)  # int64: the stride of a head may be all tokens' (heads stored before tokens)
    q = tl.load(q_BHD + b * q_row + heads[:, None] * q_head + d[None, :], mask=live, other=0.0)
    top = tl.full((GROUP_PADDED,), NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    acc = tl.zeros((GROUP_PADDED, D_PADDED), tl.float32)
    first_seen = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    end = tl.minimum(length, (part + 1) * SPLIT)
    for start in range(part * SPLIT, end, STEP):
        t = start + tl.arange(0, STEP)
        seen = (t < end) & (t >= first_seen)
        block = tl.load(tables_BM + b * M + t // BLOCK, mask=seen, other=0).to(tl.int64)
        at = ((block * BLOCK + t % BLOCK) * KV + kv) * D  # int64: a cache may hold more than 2**31 elements
        inside = seen[:, None] & (d[None, :] < D)
        k = tl.load(k_cache + at[:, None] + d[None, :], mask=inside, other=0.0)
        s = _dot(q.to(k.dtype), tl.trans(k)) * scale
        if softcap > 0:
            s = _capped(s, softcap)
        s = tl.where(seen[None, :], s, NEGATIVE_INFINITY)
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new > NEGATIVE_INFINITY, new, 0.0)
        keep = tl.exp(top - base)
        p = tl.exp(s - base[:, None])
        v = tl.load(v_cache + at[:, None] + d[None, :], mask=inside, other=0.0)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + _dot(p.to(v.dtype), v)
        top = new
    row = partial + ((b * KV * GROUP + heads) * parts + part) * (D + 2)
    tl.store(row[:, None] + d[None, :], acc, mask=live)
    tl.store(row + D, top, mask=g < GROUP)
    tl.store(row + D + 1, total, mask=g < GROUP)


@triton.jit
def merge_kernel(
    partial, lens_B, out_BHD, parts, H: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, D_PADDED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    top = tl.full((), NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((D_PADDED,), tl.float32)
    used = (tl.load(lens_B + row // H) + SPLIT - 1) // SPLIT
    for part in range(0, used):
        at = partial + (row * parts + part) * (D + 2)
        part_top, part_total = tl.load(at + D), tl.load(at + D + 1)
        new = tl.maximum(top, part_top)
        base = tl.where(new > NEGATIVE_INFINITY, new, 0.0)
        keep, add = tl.exp(top - base), tl.exp(part_top - base)
        acc = acc * keep + tl.load(at + d, mask=d < D, other=0.0) * add
        total = total * keep + part_total * add
        top = new
    out = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(out_BHD + row * D + d, out.to(out_BHD.dtype.element_ty), mask=d < D)


@triton.jit
def cache_write_kernel(
    k_NKD,
    v_NKD,
    k_cache,
    v_cache,
    slots_N,
    k_token,
    k_head,
    v_token,
    v_head,
    KV: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_N + n)
    i = tl.arange(0, PADDED)
    head = (i // D).to(tl.int64)
    live = i < tl.where(slot >= 0, KV * D, 0)
    k = tl.load(k_NKD + n * k_token + head * k_head + i % D, mask=live)
    v = tl.load(v_NKD + n * v_token + head * v_head + i % D, mask=live)
    tl.store(k_cache + slot * KV * D + i, k, mask=live)
    tl.store(v_cache + slot * KV * D + i, v, mask=live)
