"""What csrc/cpu/train_rows.cpp and train_attention.cpp compute, with shapes. Callers pass contiguous CPU tensors.

T: float32 or bfloat16, what matrix products read and write. The residual stream, statistics and the gradients of
parameters are float32. Suffixes: N packed tokens, D hidden, F width of the MLP, H query heads, K key/value heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.kernels._backend import extension

GELU, GATED = 0, 1


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class Norm(NamedTuple):
    """LayerNorm (x - mean) rstd w + b, or with layer=False RMSNorm x rstd w; parameters, live."""

    weight_D: Tensor
    bias_D: Tensor | None
    eps: float
    layer: bool


class Normed(NamedTuple):
    x_ND: Tensor  # float32, what was normed
    y_ND: Tensor  # T
    stats_N2: Tensor  # mean and rstd of each row


def norm(x_ND: Tensor, add_ND: Tensor | None, f: Norm, dtype: torch.dtype) -> Normed:
    """Norm of x, or of x + add (add: of `dtype`), rounded to `dtype`."""
    N, D = x_ND.shape
    total_ND = x_ND if add_ND is None else torch.empty_like(x_ND)
    y_ND, stats_N2 = torch.empty(N, D, dtype=dtype), torch.empty(N, 2)
    tensors = (x_ND, add_ND, total_ND, f.weight_D, f.bias_D, y_ND, stats_N2)
    extension().train_norm([_at(x) for x in tensors], N, D, f.eps, f.layer, dtype == torch.bfloat16)
    return Normed(total_ND, y_ND, stats_N2)


class NormGradients(NamedTuple):
    weight_D: Tensor | None
    bias_D: Tensor | None
    add: bool  # to what is there


def norm_backward(dy_ND, x_ND, stats_N2, f: Norm, dres_ND, grads: NormGradients, *, fresh=False, again=True):
    """dres += dx (fresh: dres = dx), in place. Returns (dres as T, y once more or None).

    grads: where the parameters' gradients go. again: whether to compute the forward's y again.
    """
    N, D = x_ND.shape
    half = dy_ND.dtype == torch.bfloat16
    out_ND = torch.empty_like(dy_ND) if half else None
    y_ND = torch.empty_like(dy_ND) if again else None
    tensors = (dy_ND, x_ND, stats_N2, f.weight_D, f.bias_D, dres_ND, out_ND, y_ND, grads.weight_D, grads.bias_D)
    extension().train_norm_backward([_at(x) for x in tensors], N, D, f.layer, fresh, grads.add, half)
    return (out_ND if half else dres_ND), y_ND


def activation(pre: Tensor, kind: int) -> Tensor:
    """GELU: tanh form of pre [N, F].   GATED: silu(gate) up of pre [N, 2F], gate and up side by side.   -> [N, F]"""
    N, F = pre.shape[0], pre.shape[1] // (1 + kind)
    act_NF = pre.new_empty(N, F)
    extension().train_activation((pre.data_ptr(), act_NF.data_ptr(), 0, 0), N, F, kind, pre.dtype == torch.bfloat16)
    return act_NF


def activation_backward(pre: Tensor, dact_NF: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """(dpre, the activation once more)."""
    N, F = dact_NF.shape
    act_NF, dpre = torch.empty_like(dact_NF), torch.empty_like(pre)
    tensors = (pre, act_NF, dact_NF, dpre)
    extension().train_activation([_at(x) for x in tensors], N, F, kind, pre.dtype == torch.bfloat16)
    return dpre, act_NF


def sum_columns(x_NF: Tensor, out_F: Tensor, add: bool) -> None:
    """out (+)= x.sum(0), in float32. x: contiguous rows, at any distance."""
    half = x_NF.dtype == torch.bfloat16
    extension().train_sum_columns(x_NF.data_ptr(), *x_NF.shape, x_NF.stride(0), out_F.data_ptr(), add, half)


def copy_all(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Each (x float32, to `dtype`): to = x, rounded; both contiguous, of one shape."""
    addresses = [(x.data_ptr(), to.data_ptr()) for x, to in pairs]
    extension().train_copy(addresses, [x.numel() for x, _ in pairs], dtype == torch.bfloat16)


def embedding_backward(tokens_N: Tensor, dx_ND: Tensor, out_VD: Tensor) -> None:
    """out[tokens[i]] += dx[i], in the order of i."""
    N, D = len(tokens_N), out_VD.shape[1]
    extension().train_embedding_backward(tokens_N.data_ptr(), dx_ND.data_ptr(), N, D, out_VD.data_ptr())


class Heads(NamedTuple):
    """Shape of a layer's attention; q, k, v lie side by side in rows of (H + 2 K) D numbers."""

    H: int
    K: int
    D: int
    scale: float
    window: int | None

    @property
    def width(self) -> int:
        return (self.H + 2 * self.K) * self.D


class Where(NamedTuple):
    """cu_seqlens int32 [B + 1]; cos and sin [N, D] of the rotary embedding, or None."""

    cu_seqlens: Tensor
    cos_ND: Tensor | None
    sin_ND: Tensor | None


def _attention(qkv, out, lse, where: Where, heads: Heads, dout=None, dqkv=None) -> None:
    size, q, k = qkv.element_size(), heads.H * heads.D, heads.K * heads.D
    parts = lambda x: (0, 0, 0) if x is None else (x.data_ptr(), x.data_ptr() + q * size, x.data_ptr() + (q + k) * size)  # noqa: E731
    tables = (_at(where.cos_ND), _at(where.sin_ND), where.cu_seqlens.data_ptr())
    addresses = (*parts(qkv), out.data_ptr(), lse.data_ptr(), *tables, _at(dout), *parts(dqkv))
    sizes = (len(where.cu_seqlens) - 1, heads.H, heads.K, heads.D, heads.width, heads.width, q, heads.window or 0)
    extension().train_attention(addresses, sizes, heads.scale, qkv.dtype == torch.bfloat16)


def attention(qkv: Tensor, where: Where, heads: Heads) -> tuple[Tensor, Tensor]:
    """(out [N, H D], lse [N, H]) of causal attention within each sequence; rows past the last sequence are 0."""
    out, lse = qkv.new_empty(len(qkv), heads.H * heads.D), torch.empty(len(qkv), heads.H)
    out[int(where.cu_seqlens[-1]) :] = 0
    _attention(qkv, out, lse, where, heads)
    return out, lse


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, where: Where, heads: Heads) -> Tensor:
    """dqkv, as qkv."""
    dqkv = torch.empty_like(qkv)
    dqkv[int(where.cu_seqlens[-1]) :] = 0
    _attention(qkv, out, lse, where, heads, dout, dqkv)
    return dqkv
