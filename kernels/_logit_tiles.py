"""Two launches on a tile of logits, statistics and gradient in place, in C++ and in Triton: what the linear rooms share.

Formulas and suffixes: linear_logprob.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.kernels import _logit_rows
from fastppo.kernels._backend import extension
from fastppo.kernels.logprob import DTYPE_CODES, row_layout


class Scales(NamedTuple):
    """The head's numbers, as the kernels take them."""

    temperature: float
    logit_scale: float
    softcap: float  # 0: none


class Launcher(NamedTuple):
    """One back end's work on a tile of logits; state_N4 and stats_N2 are the back end's own."""

    new_state: Callable  # (N, device) -> state_N4
    tile_stats: Callable  # (tile_RC, first column, scales, bias_V, tokens_R, state_R4) -> None
    finish: Callable  # (state_N4) -> logprob_N, entropy_N, stats_N2
    tile_grad: Callable  # (tile_RC, first column, scales, bias_V, tokens_R, stats_R2, entropy_R, g_R, h_R) -> None


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def tile_tuple(tile_RC: Tensor, first: int) -> tuple[int, ...]:
    rows, columns = tile_RC.shape
    return (tile_RC.data_ptr(), rows, columns, tile_RC.stride(0), first, DTYPE_CODES[tile_RC.dtype])


def cpu_new_state(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, 4, dtype=torch.float64)


def cpu_tile_stats(tile_RC, first, scales, bias_V, tokens_R, state_R4) -> None:
    extension().linear_logprob_tile_stats(
        tile_tuple(tile_RC, first), scales, address(bias_V), tokens_R.data_ptr(), state_R4.data_ptr()
    )


def cpu_finish(state_N4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = len(state_N4)
    logprob_N, entropy_N, stats_N2 = torch.empty(count), torch.empty(count), torch.empty(count, 2)
    out = (logprob_N.data_ptr(), entropy_N.data_ptr(), stats_N2.data_ptr())
    extension().linear_logprob_finish(count, state_N4.data_ptr(), out)
    return logprob_N, entropy_N, stats_N2


def cpu_tile_grad(tile_RC, first, scales, bias_V, tokens_R, stats_R2, entropy_R, g_R, h_R) -> None:
    extension().linear_logprob_tile_grad(
        tile_tuple(tile_RC, first),
        scales,
        address(bias_V),
        tokens_R.data_ptr(),
        (stats_R2.data_ptr(), entropy_R.data_ptr(), g_R.data_ptr(), h_R.data_ptr()),
    )


def triton_new_state(count: int, device: torch.device) -> Tensor:
    """NaN: what stays of it is the logit of a token that no tile holds; the first tile writes the other three."""
    return torch.full((count, 4), torch.nan, device=device)


def triton_tile_stats(tile_RC, first, scales, bias_V, tokens_R, state_R4) -> None:
    _logit_rows.launch_stats(
        tile_RC,
        row_layout(tile_RC),
        tile_RC.shape[1],
        first,
        _logit_rows.LogitScales(*scales),
        bias_V,
        tokens_R,
        state_R4,
        None,
    )


def triton_finish(state_N4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N numbers: torch's own operations do."""
    top_N, sum_N, dot_N, target_N = state_N4.unbind(1)
    log_sum_N = sum_N.log2()
    entropy_N = math.log(2) * (log_sum_N - dot_N / sum_N)
    logprob_N = math.log(2) * (target_N - top_N - log_sum_N)
    bad_N = (top_N == -torch.inf) | entropy_N.isnan()
    nan_where_bad = lambda x_N: x_N.masked_fill(bad_N, torch.nan)  # noqa: E731
    return nan_where_bad(logprob_N.clamp(max=0)), nan_where_bad(entropy_N.clamp(min=0)), state_N4[:, :2].contiguous()


def triton_tile_grad(tile_RC, first, scales, bias_V, tokens_R, *saved) -> None:
    layouts = (row_layout(tile_RC),) * 2
    _logit_rows.launch_grad(
        tile_RC,
        tile_RC,
        layouts,
        tile_RC.shape[1],
        first,
        _logit_rows.LogitScales(*scales),
        bias_V,
        tokens_R,
        saved,
    )


# The products stay torch's (cuBLAS): a Triton product that keeps the logits on chip saves their trip to the cache and
# back, 4 bytes per logit where the product spends 2 D FLOPs on it (about 8 % at D = 2048 on an H200 while the tile fits
# the L2 cache), and loses more than that to cuBLAS on the product itself. With it backward takes the same two
# products per tile at full speed, in the order of 6 N V D.
TRITON = Launcher(triton_new_state, triton_tile_stats, triton_finish, triton_tile_grad)
CPU = Launcher(cpu_new_state, cpu_tile_stats, cpu_finish, cpu_tile_grad)
