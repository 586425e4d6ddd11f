"""linear_logprob's forward in one Triton kernel: the logits never leave the registers (formula: linear_logprob.py).

An alternative to cuBLAS products with statistics after them, which stays the default until a GPU has shown which is faster
(bench/bench_linear_logprob.py runs both). A program is ROWS tokens and one SPLIT of the vocabulary: tiles of COLUMNS logits by tl.dot (wgmma on
Hopper), each folded into the row's running (maximum, sum, dot, the token's y) as in _logit_rows; `finish` adds the splits in order.
SPLIT is a constant, so a row's result does not depend on the other rows. Logits are not rounded to 16 bits.
Suffixes: N tokens, D hidden, V vocabulary, S splits.
"""

import math

import torch
from torch import Tensor

from fastppo.kernels._logit_rows import LOWEST, MINUS_INF, LogitScales, _tanh
from fastppo.kernels._triton import INTERPRET, tl, triton

SPLIT = 4096
# Read off the compiler for sm_90: 255 registers, no spills (4 stages or 4 warps spill with a soft cap); the other is sm_80's
TMA_TILE = {"TMA": True, "ROWS": 128, "COLUMNS": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
TILE = {"TMA": False, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _logits(
    hidden_ND, weight_VD, row, column, N, V, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS] from `row` and `column` on; past the end anything finite stands for what was loaded.

    TMA: hidden_ND and weight_VD are tensor descriptors. Else pointers, and D is a multiple of DEPTH.
    """
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if not TMA:
        depth = tl.arange(0, DEPTH)
        rows = tl.minimum(row + tl.arange(0, ROWS), N - 1).to(tl.int64)  # int64: V * D may pass 2**31
        columns = tl.minimum(column + tl.arange(0, COLUMNS), V - 1).to(tl.int64)
        h_ptr = hidden_ND + rows[:, None] * D + depth[None, :]
        w_ptr = weight_VD + columns[:, None] * D + depth[None, :]
    for begin in range(0, D, DEPTH):
        if TMA:
            h, w = hidden_ND.load([row, begin]), weight_VD.load([column, begin])
        else:
            h, w = tl.load(h_ptr), tl.load(w_ptr)
            h_ptr += DEPTH
            w_ptr += DEPTH
        if INTERPRET:  # tl.dot on bf16 is silently wrong there
            h, w = h.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(h, w.T, sums, input_precision="ieee")
    return sums


@triton.jit
def linear_stats_kernel(
    hidden_ND, weight_VD, bias_V, tokens_N, state_SN4, N, V, D, to_log2, to_tanh,
    BIAS: tl.constexpr, CAP: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Programs next to each other share a split: its weights come from the L2 cache for all but one of them."""
    blocks = tl.cdiv(N, ROWS)
    split, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens_N + rows, mask=rows < N, other=-1)
    top, total = tl.full((ROWS,), MINUS_INF, tl.float32), tl.zeros((ROWS,), tl.float32)
    dot, target = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    end = tl.minimum(V, (split + 1) * SPLIT)
    for begin in range(split * SPLIT, end, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        y = _logits(hidden_ND, weight_VD, block * ROWS, begin, N, V, D, ROWS, COLUMNS, DEPTH, TMA)
        if BIAS:
            y += tl.load(bias_V + columns, mask=columns < V, other=0.0)[None, :]
        if CAP:
            y = _tanh(y * to_tanh)
        y = tl.where(columns[None, :] < V, y * to_log2, MINUS_INF)
        target += tl.sum(tl.where(columns[None, :] == token[:, None], y, 0.0), 1)
        new = tl.maximum(top, tl.max(y, 1))
        shift = tl.where(new == MINUS_INF, 0.0, new)
        move = tl.where(top == MINUS_INF, 0.0, top - shift)
        kept = tl.where(top == MINUS_INF, 0.0, tl.exp2(move))
        y = y - shift[:, None]
        y = tl.where(y < LOWEST, LOWEST, y)  # e * y is 0, not NaN, for -inf; a NaN compares false and stays
        e = tl.exp2(y)  # of a column past the end 2^-126, which rounds away beside the maximum's 1
        dot = kept * (dot + tl.maximum(move, LOWEST) * total) + tl.sum(e * y, 1)
        total = kept * total + tl.sum(e, 1)
        top = new
    at = state_SN4 + (split.to(tl.int64) * N + rows) * 4
    tl.store(at, top, mask=rows < N)
    tl.store(at + 1, total, mask=rows < N)
    tl.store(at + 2, dot, mask=rows < N)
    here = (token >= split * SPLIT) & (token < end)
    tl.store(at + 3, tl.where(here, target, float("nan")), mask=rows < N)


def finish(state_SN4: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """log-prob and entropy from the splits' (maximum, sum, dot, the token's y), in nats."""
    top_SN, total_SN, dot_SN, target_SN = state_SN4.unbind(2)
    top_N = top_SN.amax(0)
    away_SN = torch.where(top_SN == -torch.inf, -torch.inf, top_SN - top_N)
    factor_SN = away_SN.exp2()
    total_N = (total_SN * factor_SN).sum(0)
    dot_N = (factor_SN * (dot_SN + away_SN.clamp(min=-126.0) * total_SN)).sum(0)
    split_N = (tokens_N // SPLIT).clamp(
        0, len(top_SN) - 1
    )  # a token outside [0, V) finds the NaN of one that is not there
    log_total_N = total_N.log2()
    entropy_N = math.log(2) * (log_total_N - dot_N / total_N)
    logprob_N = math.log(2) * (target_SN.gather(0, split_N[None])[0] - top_N - log_total_N)
    bad_N = (top_N == -torch.inf) | entropy_N.isnan()
    return logprob_N.clamp(max=0).masked_fill(bad_N, torch.nan), entropy_N.clamp(min=0).masked_fill(bad_N, torch.nan)


def tile_for(device: torch.device) -> dict:
    """Hopper's, which loads by TMA, or the one for GPUs before it."""
    return TMA_TILE if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else TILE


def fused_forward(
    hidden_ND: Tensor, head, tokens_N: Tensor, *, temperature: float = 1.0, tile: dict | None = None
) -> tuple[Tensor, Tensor]:
    """log-prob and entropy of [N, D] hidden states; no gradient. Arguments as linear_logprob's, which checks them.

    Raises ValueError for a D that is no multiple of the tile's depth (with TMA: of 16 bytes).
    """
    (N, D), V, tile = hidden_ND.shape, len(head.weight_VD), tile or tile_for(hidden_ND.device)
    step = 16 // hidden_ND.element_size() if tile["TMA"] else tile["DEPTH"]
    if D % step:
        raise ValueError(f"linear_logprob: the fused forward needs a hidden size that is a multiple of {step}; got {D}")
    scales = LogitScales(temperature, float(head.logit_scale), float(head.softcap or 0.0))
    splits = triton.cdiv(V, SPLIT)
    state_SN4 = torch.empty(splits, N, 4, device=hidden_ND.device)
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    operands = [x.contiguous() for x in (hidden_ND, head.weight_VD)]
    operands = [x.clone() if x.data_ptr() % 16 else x for x in operands]  # TMA reads from multiples of 16 bytes
    if N:
        if tile["TMA"]:
            from triton.tools.tensor_descriptor import TensorDescriptor

            blocks = [tile["ROWS"], tile["DEPTH"]], [tile["COLUMNS"], tile["DEPTH"]]
            operands = [TensorDescriptor.from_tensor(x, block) for x, block in zip(operands, blocks, strict=True)]
        with torch.cuda.device_of(hidden_ND):
            linear_stats_kernel[(splits * triton.cdiv(N, tile["ROWS"]),)](
                *operands, bias_V, tokens_N, state_SN4, N, V, D, scales.to_log2, scales.to_tanh,
                BIAS=bias_V is not None, CAP=scales.cap, SPLIT=SPLIT, **tile,
            )  # fmt: skip
    return finish(state_SN4, tokens_N)
