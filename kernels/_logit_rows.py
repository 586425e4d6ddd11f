"""Triton kernels over rows of logits: online statistics and gradient. Shared by logprob and linear_logprob.

A program takes a row and goes over it once in blocks; everything to base 2 (y = logit * log2(e) / T), so that exp2 needs
no other factor. A raw x may first get a bias and a soft cap. state_N4 holds (maximum, sum, dot, the token's y).
"""

import math

import torch
from torch import Tensor

from fastppo.kernels._triton import tl, triton

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
LOWEST = tl.constexpr(-126.0)  # 2^-126 is the smallest normal float32
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _tanh(u):
    """1 - 2 / (e^2u + 1), by its series where that would cancel; triton's own tanh has no interpreter."""
    q = u * u
    series = u + u * q * (((2.18694885e-2 * q - 5.39682540e-2) * q + 1.33333333e-1) * q - 3.33333333e-1)
    bounded = tl.minimum(tl.maximum(u, -10.0), 10.0)
    far = 1.0 - 2.0 / (tl.exp2(bounded * 2.88539008) + 1.0)
    return tl.where(q < 0.09, series, tl.where(u == u, far, u))


@triton.jit
def _raw(x_ptr, bias_ptr, cols, columns, BIAS: tl.constexpr):
    """float32 whatever is stored: arithmetic on bf16 is wrong in the interpreter. Past the end -inf, never a maximum."""
    x = tl.load(x_ptr + cols, mask=cols < columns, other=MINUS_INF).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < columns, other=0.0)
    return x


@triton.jit
def _log2_logit(x, to_log2, to_tanh, CAP: tl.constexpr):
    if CAP:
        x = _tanh(x * to_tanh)
    return x * to_log2


@triton.jit
def _row(x_ptr, row, inner, outer_stride, inner_stride):
    """int64: row * V overflows int32 past 2**31 elements."""
    return x_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def stats_kernel(
    x_ptr,
    bias_ptr,
    tokens_ptr,
    state_ptr,
    logprob_ptr,
    entropy_ptr,
    stats_ptr,
    inner,
    outer_stride,
    inner_stride,
    columns,
    first,
    to_log2,
    to_tanh,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    CONTINUE: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """CONTINUE: start from state_ptr. FINISH: write log-prob, entropy and (maximum, sum); else write the state."""
    row = tl.program_id(0).to(tl.int64)
    x_row = _row(x_ptr, row, inner, outer_stride, inner_stride)
    top, total, dot = tl.full((), MINUS_INF, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if CONTINUE:
        top, total, dot = (
            tl.load(state_ptr + row * 4),
            tl.load(state_ptr + row * 4 + 1),
            tl.load(state_ptr + row * 4 + 2),
        )
    for begin in range(0, columns, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        y = _log2_logit(_raw(x_row, bias_ptr + first, cols, columns, BIAS), to_log2, to_tanh, CAP)
        y = tl.where(cols < columns, y, MINUS_INF)  # a soft cap makes -inf finite
        new_top = tl.maximum(top, tl.max(y, 0))
        shift = tl.where(new_top == MINUS_INF, 0.0, new_top)
        move = tl.where(top == MINUS_INF, 0.0, top - shift)
        kept = tl.where(top == MINUS_INF, 0.0, tl.exp2(move))
        y -= shift
        y = tl.where(y < LOWEST, LOWEST, y)  # e * y is 0, not NaN, for -inf; a NaN compares false and stays
        e = tl.where(cols < columns, tl.exp2(y), 0.0)
        dot = kept * (dot + tl.maximum(move, LOWEST) * total) + tl.sum(e * y, 0)
        total = kept * total + tl.sum(e, 0)
        top = new_top
    token = tl.load(tokens_ptr + row) - first
    here = (token >= 0) & (token < columns)
    target = _raw(x_row, bias_ptr + first, tl.where(here, token, 0) + tl.arange(0, 1), columns, BIAS)
    target = tl.sum(_log2_logit(target, to_log2, to_tanh, CAP), 0)
    if FINISH:
        log_total = tl.log2(total)
        entropy = (log_total - dot / total) * LN2
        logprob = (target - top - log_total) * LN2
        bad = (top == MINUS_INF) | (entropy != entropy)
        logprob = tl.where(logprob > 0.0, 0.0, logprob)
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(logprob_ptr + row, tl.where(bad | (here == 0), float("nan"), logprob))
        tl.store(entropy_ptr + row, tl.where(bad, float("nan"), entropy))
        tl.store(stats_ptr + row * 2, top)
        tl.store(stats_ptr + row * 2 + 1, total)
    else:
        tl.store(state_ptr + row * 4, top)
        tl.store(state_ptr + row * 4 + 1, total)
        tl.store(state_ptr + row * 4 + 2, dot)
        tl.store(state_ptr + row * 4 + 3, target, mask=here)


@triton.jit
def grad_kernel(
    x_ptr,
    dx_ptr,
    bias_ptr,
    tokens_ptr,
    stats_ptr,
    entropy_ptr,
    g_ptr,
    h_ptr,
    inner,
    outer_stride,
    inner_stride,
    d_inner,
    d_outer_stride,
    d_inner_stride,
    columns,
    first,
    to_log2,
    to_tanh,
    slope,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = slope (g 1[j = token] - p (g + h (log p + H))), times 1 - tanh^2 under a soft cap. dx may be x."""
    row = tl.program_id(0).to(tl.int64)
    x_row = _row(x_ptr, row, inner, outer_stride, inner_stride)
    dx_row = _row(dx_ptr, row, d_inner, d_outer_stride, d_inner_stride)
    g, h = tl.load(g_ptr + row), tl.load(h_ptr + row)
    token = tl.load(tokens_ptr + row) - first
    if (g == 0.0) & (h == 0.0):
        zero = tl.zeros((BLOCK,), tl.float32).to(dx_ptr.dtype.element_ty)
        for begin in range(0, columns, BLOCK):
            cols = begin + tl.arange(0, BLOCK)
            tl.store(dx_row + cols, zero, mask=cols < columns)
    else:
        top, total, entropy = tl.load(stats_ptr + row * 2), tl.load(stats_ptr + row * 2 + 1), tl.load(entropy_ptr + row)
        a = tl.where(h == 0.0, g, g + h * (entropy - tl.log2(total) * LN2)) / total
        b = h * LN2 / total
        for begin in range(0, columns, BLOCK):
            cols = begin + tl.arange(0, BLOCK)
            x = _raw(x_row, bias_ptr + first, cols, columns, BIAS)
            d = tl.full((BLOCK,), 0.0, tl.float32) + slope
            if CAP:
                x = _tanh(x * to_tanh)
                d *= 1.0 - x * x
            y = x * to_log2 - top
            below = y < LOWEST
            y = tl.where(below, LOWEST, y)
            p_part = tl.where(below, 0.0, tl.exp2(y) * (a + b * y))
            d *= tl.where(cols == token, g, 0.0) - p_part
            tl.store(dx_row + cols, d.to(dx_ptr.dtype.element_ty), mask=cols < columns)


class LogitScales:
    """The kernels' numbers from temperature, logit scale and soft cap (0: none)."""

    def __init__(self, temperature: float, logit_scale: float = 1.0, softcap: float = 0.0):
        self.cap = softcap > 0
        self.to_log2 = (softcap if self.cap else logit_scale) * LOG2E / temperature
        self.to_tanh = logit_scale / softcap if self.cap else 0.0
        self.slope = logit_scale / temperature


def block_of(columns: int) -> dict[str, int]:
    """4096 columns over 8 warps: 16 per thread, two (float32: four) 16-byte loads in flight, and several rows per SM."""
    block = min(4096, max(16, triton.next_power_of_2(columns)))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


def launch_stats(
    x: Tensor, layout, columns: int, first: int, scales: LogitScales, bias_V, tokens_N, state_N4, out
) -> None:
    """out: (logprob_N, entropy_N, stats_N2) to finish, or None to leave the state. `layout`: logprob.RowLayout of x."""
    if layout.count == 0:
        return
    logprob_N, entropy_N, stats_N2 = out or (x, x, x)
    with torch.cuda.device_of(x):
        stats_kernel[(layout.count,)](
            x,
            x if bias_V is None else bias_V,
            tokens_N,
            x if state_N4 is None else state_N4,
            logprob_N,
            entropy_N,
            stats_N2,
            *layout[1:],
            columns,
            first,
            scales.to_log2,
            scales.to_tanh,
            BIAS=bias_V is not None,
            CAP=scales.cap,
            CONTINUE=first > 0,
            FINISH=out is not None,
            **block_of(columns),
        )


def launch_grad(x, dx, layouts, columns: int, first: int, scales: LogitScales, bias_V, tokens_N, saved) -> None:
    """layouts: of x and dx. saved: stats_N2, entropy_N, g_N, h_N."""
    if layouts[0].count == 0:
        return
    with torch.cuda.device_of(x):
        grad_kernel[(layouts[0].count,)](
            x,
            dx,
            x if bias_V is None else bias_V,
            tokens_N,
            *saved,
            *layouts[0][1:],
            *layouts[1][1:],
            columns,
            first,
            scales.to_log2,
            scales.to_tanh,
            scales.slope,
            BIAS=bias_V is not None,
            CAP=scales.cap,
            **block_of(columns),
        )
