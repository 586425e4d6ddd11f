"""Causal attention over packed sequences.

    out[i] = sum_j softmax_j(cap * tanh(scale * q[i] . k[j] / cap)) v[j],   j <= i in the same sequence, i - j < window

Suffixes: N packed tokens, H query heads, K key/value heads (H is a multiple), D head dimension; b, t a padded bucket.
SDPA path: the sequences are right-padded bucket by bucket (layout.Packed.buckets), one call each. Causality hides the
padding from every real token, so that no mask is needed unless there is a window shorter than the bucket.
"""

import torch
import torch.nn.functional as F

from fastppo.attention import backends
from fastppo.attention.layout import Bucket, Packed


class _Pad(torch.autograd.Function):
    """[N, ...] -> one [b * t, ...] per bucket. Every real token goes to one slot, so the gradient is a gather."""

    @staticmethod
    def forward(ctx, x, layout: Packed):
        ctx.layout = layout
        return tuple(x.index_select(0, bucket.gather) for bucket in layout.buckets)

    @staticmethod
    def backward(ctx, *grads):
        out = grads[0].new_empty((sum(ctx.layout.lengths), *grads[0].shape[1:]))
        for bucket, grad in zip(ctx.layout.buckets, grads, strict=True):
            out.index_copy_(0, bucket.tokens, grad.index_select(0, bucket.slots))
        return out, None


class _Unpad(torch.autograd.Function):
    """One [b * t, ...] per bucket -> [N, ...]: the inverse of _Pad, padding dropped."""

    @staticmethod
    def forward(ctx, layout: Packed, *parts):
        ctx.layout = layout
        out = parts[0].new_empty((sum(layout.lengths), *parts[0].shape[1:]))
        for bucket, part in zip(layout.buckets, parts, strict=True):
            out.index_copy_(0, bucket.tokens, part.index_select(0, bucket.slots))
        return out

    @staticmethod
    def backward(ctx, grad):
        parts = []
        for bucket in ctx.layout.buckets:
            part = grad.new_zeros((bucket.b * bucket.t, *grad.shape[1:]))
            parts.append(part.index_copy_(0, bucket.slots, grad.index_select(0, bucket.tokens)))
        return None, *parts


def varlen_attention(
    q_NHD: torch.Tensor,
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    layout: Packed,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every token over its own sequence up to itself; returns [N, H, D]. Differentiable.

    Raises RuntimeError when FASTPPO_ATTN names a back end that can't run this call.
    """
    if window is not None and window >= layout.max_seqlen:
        window = None
    call = backends.Call(q_NHD.device.type, q_NHD.dtype, q_NHD.shape[-1], v_NKD.shape[-1], softcap, dropout)
    name = backends.choose(call, window)
    if name != "sdpa":
        run = backends.BACKENDS[name][2]
        return run(q_NHD, k_NKD, v_NKD, layout, scale=scale, window=window, softcap=softcap, dropout=dropout)

    def attend(q, k, v, bucket: Bucket):
        q, k, v = (x.view(bucket.b, bucket.t, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = _padded_attention(q, k, v, scale, window, softcap, dropout)
        return out.transpose(1, 2).reshape(bucket.b * bucket.t, *out.shape[1::2])

    buckets = layout.buckets
    if all(bucket.start is not None for bucket in buckets):
        in_order = sorted(buckets, key=lambda bucket: bucket.start)
        rows = [slice(x.start, x.start + x.b * x.t) for x in in_order]
        parts = [attend(q_NHD[r], k_NKD[r], v_NKD[r], x) for r, x in zip(rows, in_order, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    padded = zip(*(_Pad.apply(x, layout) for x in (q_NHD, k_NKD, v_NKD)), buckets, strict=True)
    return _Unpad.apply(layout, *(attend(*part) for part in padded))


def _padded_attention(q_bHtD, k_bKtD, v_bKtD, scale, window, softcap, dropout):
    t, gqa = q_bHtD.shape[2], q_bHtD.shape[1] != k_bKtD.shape[1]
    mask_tt = None
    if softcap or (window is not None and window < t):
        mask_tt = band(t, t, window, q_bHtD.device)
    if softcap:
        return capped_attention(q_bHtD, k_bKtD, v_bKtD, mask_tt, scale, softcap, dropout)
    return F.scaled_dot_product_attention(
        *(q_bHtD, k_bKtD, v_bKtD),
        attn_mask=mask_tt,
        dropout_p=dropout,
        is_causal=mask_tt is None,
        scale=scale,
        enable_gqa=gqa,
    )


def band(queries: int, keys: int, window: int | None, device) -> torch.Tensor:
    """bool [queries, keys]: True where the key is not after the query and inside its window; last query = last key."""
    age = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (age >= 0) if window is None else (age >= 0) & (age < window)


def capped_attention(q_bHtD, k_bKsD, v_bKsD, mask, scale, softcap, dropout=0.0):
    """Attention with tanh-capped scores (Gemma-2), which SDPA doesn't have."""
    groups = q_bHtD.shape[1] // k_bKsD.shape[1]
    k_bHsD, v_bHsD = (x.repeat_interleave(groups, dim=1) for x in (k_bKsD, v_bKsD))
    scores = softcap * torch.tanh(q_bHtD @ k_bHsD.transpose(-1, -2) * (scale / softcap))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(q_bHtD.dtype)
    return F.dropout(weights, dropout) @ v_bHsD
