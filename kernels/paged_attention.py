"""Attention over a paged key/value cache, and the write into it.

    s[i, j] = scale * q[i] . k[j];  with softcap c: s = c * tanh(s / c)
    out[i]  = sum_j softmax_j(s[i, j]) v[j]     over j <= p(i), and j > p(i) - window where a window is given

p(i) = context_len - query_len + i is the position of the sequence's i-th query: with one query per sequence (decode) the
last position, whose key and value are in the cache already. Several queries (cu_seqlens_q) are a chunk of a prompt that
attends causally to a cached prefix and to itself. Query head h reads key/value head h // (H / KV).

A cache is [blocks, block_size, KV, D]; slot = block * block_size + offset; a sequence's j-th token lies in block
block_tables_BM[b, j // block_size] at offset j % block_size.

Suffixes: B sequences, N query tokens, M blocks per sequence, H query heads, KV key/value heads, D head size. Decode is
bound by memory: it reads 2 * context_len * KV * D * bytes per sequence, H / KV multiply-adds per byte pair.

Long contexts are cut every SPLIT tokens, whatever the batch: the parts run in parallel and are merged in order
(flash-decoding), so a sequence's result does not depend, in any bit, on the rest of the batch; on a CPU neither on whether
a query came alone or in a chunk.
"""

from collections.abc import Callable

import torch

from fastppo.kernels._backend import pick
from fastppo.kernels._paged_attention_launch import (
    DTYPE_CODES,
    cache_write_cpu,
    cache_write_cuda,
    cache_write_triton,
    decode_cuda,
    decode_triton,
    paged_attention_cpu,
)


def cache_write_reference(k_NKD, v_NKD, k_cache, v_cache, slots_N):
    """cache[slot] = token's key and value, where slot >= 0."""
    kept_N = slots_N >= 0
    for new_NKD, cache in ((k_NKD, k_cache), (v_NKD, v_cache)):
        cache.flatten(0, 1)[slots_N[kept_N]] = new_NKD[kept_N].to(cache.dtype)


def paged_attention_reference(
    q_NHD, k_cache, v_cache, block_tables_BM, context_lens_B, *, scale, window=None, softcap=None, cu_seqlens_q=None
):
    """The definition above, one sequence at a time, in float32 (float64 for float64 queries)."""
    dtype = torch.float64 if q_NHD.dtype == torch.float64 else torch.float32
    group = q_NHD.shape[1] // k_cache.shape[2]
    out_NHD = torch.zeros_like(q_NHD)
    starts = range(len(q_NHD) + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for b, context_len in enumerate(context_lens_B.tolist()):
        first, end = starts[b], starts[b + 1]
        if context_len == 0 or first == end:
            continue
        blocks_M = block_tables_BM[b, : -(-context_len // k_cache.shape[1])].long()
        k_THD, v_THD = (
            cache[blocks_M].flatten(0, 1)[:context_len].to(dtype).repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )
        s_HNT = torch.einsum("nhd,thd->hnt", q_NHD[first:end].to(dtype), k_THD) * scale
        if softcap is not None:
            s_HNT = softcap * torch.tanh(s_HNT / softcap)
        j_T = torch.arange(context_len, device=q_NHD.device)
        p_N1 = torch.arange(context_len - (end - first), context_len, device=q_NHD.device)[:, None]
        visible_NT = (j_T <= p_N1) & (j_T > p_N1 - (window or context_len))
        p_HNT = s_HNT.masked_fill(~visible_NT, -torch.inf).softmax(dim=-1)
        out_NHD[first:end] = torch.einsum("hnt,thd->nhd", p_HNT, v_THD).to(q_NHD.dtype)
    return out_NHD


def _decode_only(decode):
    """Give a decode kernel several queries per sequence: each becomes a sequence of its own, with its own context length.

    The keys of a chunk are then read once per query; a GPU's prefill belongs to flash-attn, this is what works without it.
    """

    def run(q_NHD, k_cache, v_cache, block_tables_BM, context_lens_B, *, cu_seqlens_q=None, **options):
        if cu_seqlens_q is not None:
            lens_B, N = cu_seqlens_q.diff(), len(q_NHD)
            b_N = torch.repeat_interleave(torch.arange(len(lens_B), device=q_NHD.device), lens_B, output_size=N)
            behind_N = cu_seqlens_q[1:][b_N] - 1 - torch.arange(N, device=q_NHD.device)
            block_tables_BM, context_lens_B = block_tables_BM[b_N], (context_lens_B[b_N] - behind_N).int()
        return decode(q_NHD, k_cache, v_cache, block_tables_BM, context_lens_B, **options)

    return run


BACKEND_TABLE: dict[str, Callable] = {
    "cuda": _decode_only(decode_cuda),
    "triton": _decode_only(decode_triton),
    "cpu": paged_attention_cpu,
    "reference": paged_attention_reference,
}
WRITE_TABLE: dict[str, Callable] = {
    "cuda": cache_write_cuda,
    "triton": cache_write_triton,
    "cpu": cache_write_cpu,
    "reference": cache_write_reference,
}


def _check_caches(op, k_cache, v_cache):
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        ok = cache.dim() == 4 and cache.dtype in DTYPE_CODES and cache.is_contiguous() and cache.shape == k_cache.shape
        if not ok or cache.dtype != k_cache.dtype or cache.device != k_cache.device:
            raise ValueError(
                f"{op}: {name} must be contiguous float32, bfloat16 or float16 of shape (blocks, block_size, KV, D) like "
                f"k_cache; got {cache.dtype} {tuple(cache.shape)}, stride {cache.stride()} on {cache.device}"
            )


def _rows(op, name, x, shape, cache):
    """x with a last stride of 1; raises unless it has `shape` on the cache's device and a floating dtype of ours."""
    if tuple(x.shape) != shape or x.dtype not in DTYPE_CODES or x.device != cache.device:
        raise ValueError(
            f"{op}: {name} must be float32, bfloat16 or float16 of shape {shape} on {cache.device}; "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    return x.detach() if x.stride(-1) == 1 else x.detach().contiguous()


def cache_write(
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_N: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Store the keys and values of N tokens in their cache slots, converted to the cache's dtype.

    k_NKD, v_NKD: float, any strides.   k_cache, v_cache: contiguous (blocks, block_size, KV, D).   slots_N: int64,
    block * block_size + offset, -1 for a token to skip; distinct. On a CPU a slot outside the cache raises ValueError; on a GPU
    that would cost a synchronisation and is not looked at.
    Raises ValueError on a wrong shape, dtype or layout; RuntimeError if `backend` cannot run here.
    """
    _check_caches("cache_write", k_cache, v_cache)
    shape = (len(slots_N), *k_cache.shape[2:])
    k_NKD, v_NKD = (_rows("cache_write", n, x, shape, k_cache) for n, x in (("k_NKD", k_NKD), ("v_NKD", v_NKD)))
    if slots_N.dtype != torch.int64 or slots_N.dim() != 1 or not slots_N.is_contiguous() or k_NKD.dtype != v_NKD.dtype:
        raise ValueError(
            "cache_write: slots_N must be contiguous int64 of shape (N,) and k_NKD and v_NKD of one dtype; "
            f"got {slots_N.dtype} {tuple(slots_N.shape)}, {k_NKD.dtype} and {v_NKD.dtype}"
        )
    slots = k_cache.shape[0] * k_cache.shape[1]
    if slots_N.device.type == "cpu" and len(slots_N) and int(slots_N.max()) >= slots:
        raise ValueError(f"cache_write: slots_N must be below {slots} (blocks * block_size); got {int(slots_N.max())}")
    pick("cache_write", WRITE_TABLE, k_cache.device, backend)(k_NKD, v_NKD, k_cache, v_cache, slots_N)


def _check_tables(q_NHD, k_cache, block_tables_BM, context_lens_B, cu_seqlens_q):
    B = len(context_lens_B)
    wanted = [
        ("block_tables_BM", block_tables_BM, (B, block_tables_BM.shape[-1])),
        ("context_lens_B", context_lens_B, (B,)),
    ]
    if cu_seqlens_q is not None:
        wanted.append(("cu_seqlens_q", cu_seqlens_q, (B + 1,)))
    elif len(q_NHD) != B:
        raise ValueError(
            f"paged_attention: q must hold one query per sequence ({B}) unless cu_seqlens_q is given; got {len(q_NHD)}"
        )
    for name, x, shape in wanted:
        if tuple(x.shape) != shape or x.dtype != torch.int32 or not x.is_contiguous() or x.device != k_cache.device:
            raise ValueError(
                f"paged_attention: {name} must be contiguous torch.int32 of shape {shape} on {k_cache.device}; "
                f"got {x.dtype} {tuple(x.shape)}, stride {x.stride()} on {x.device}"
            )
    if k_cache.device.type != "cpu" or B == 0:
        return  # values on a GPU are not looked at: that would wait for them
    longest, room = int(context_lens_B.max()), block_tables_BM.shape[1] * k_cache.shape[1]
    if longest > room or int(context_lens_B.min()) < 0:
        raise ValueError(f"paged_attention: context_lens_B must be in [0, {room}] (M * block_size); got {longest}")
    if cu_seqlens_q is not None:
        lens_B = cu_seqlens_q.diff()
        if bool((lens_B < 0).any() | (lens_B > context_lens_B).any()) or int(cu_seqlens_q[-1]) != len(q_NHD):
            raise ValueError(
                "paged_attention: cu_seqlens_q must rise from 0 to N with no sequence longer than its context_len; "
                f"got {cu_seqlens_q.tolist()} for N = {len(q_NHD)}, context_lens_B {context_lens_B.tolist()}"
            )


def paged_attention(
    q_NHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BM: torch.Tensor,
    context_lens_B: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention of each query over its sequence's cached keys and values; out_NHD in q's dtype, sums in float32.

    q_NHD: float32, bfloat16 or float16; one query per sequence (N == B), or with cu_seqlens_q (int32, (B + 1,)) the last
    cu_seqlens_q[b + 1] - cu_seqlens_q[b] positions of sequence b, attending causally.   k_cache, v_cache: contiguous
    (blocks, block_size, KV, D), H a multiple of KV, D a multiple of 8 up to 256.   block_tables_BM: int32.
    context_lens_B: int32, tokens in the cache, the queries' own included; 0 gives zeros.   scale: factor of the scores,
    usually D ** -0.5.   window: how many positions a query sees, itself included.   softcap: bound of the scores.
    Raises ValueError on a wrong shape, dtype, layout or length (values on a GPU are not looked at); RuntimeError if `backend`
    cannot run here.
    """
    _check_caches("paged_attention", k_cache, v_cache)
    KV, D = k_cache.shape[2:]
    H = q_NHD.shape[1] if q_NHD.dim() == 3 else 0
    q_NHD = _rows("paged_attention", "q", q_NHD, (len(q_NHD), H, D), k_cache)
    if H == 0 or H % KV or D % 8 or D > 256:
        raise ValueError(
            "paged_attention: H must be a multiple of KV and D a multiple of 8 up to 256; "
            f"got q {tuple(q_NHD.shape)} and caches {tuple(k_cache.shape)}"
        )
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise ValueError(f"paged_attention: window must be >= 1 and softcap > 0, or None; got {window} and {softcap}")
    _check_tables(q_NHD, k_cache, block_tables_BM, context_lens_B, cu_seqlens_q)
    run = pick("paged_attention", BACKEND_TABLE, k_cache.device, backend)
    return run(
        q_NHD,
        k_cache,
        v_cache,
        block_tables_BM,
        context_lens_B,
        scale=scale,
        window=window,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
    )
