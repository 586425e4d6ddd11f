"""Sample one token per row of logits, with its log-prob under the distribution sampled from and under the raw one.

    y   = logits; y[history] = y / penalty if y > 0 else y * penalty; y[banned] = -inf        (float32)
    z   = y / temperature
    keep_k = z >= (k-th largest z)                            top_k; all tokens equal to the k-th are kept
    keep_p = (mass under softmax(z | keep_k) of tokens with larger z) < top_p      top_p; at least the largest
    keep_m = z >= max z + ln(min_p)                           min_p: p >= min_p * max p
    p   = softmax(z | all three);  token ~ p;  sampled_logprob = ln p[token]
    raw = log_softmax(logits / logprob_temperature);  logprob = raw[token];  entropy = -sum e^raw * raw

The order and the conditions are those of transformers' processors (RepetitionPenalty, bans, Temperature, TopK, TopP,
MinP). Where those leave it to an unstable sort which of several equal tokens top-p drops, all of them stay: the
result depends on values only. temperature 0 or top_k 1 is argmax, the lowest index on ties, with sampled_logprob 0.

Random numbers: two uniforms from Philox4x32-10 at (seed, position) (see _philox.py). The first picks a tile of
TILE columns by inverse CDF over the tiles' masses in column order, the second a token in it. Nothing depends on other rows.

Suffixes: B rows (sequences), V vocabulary, L history tokens. Reads each row once from memory (V * bytes); bound by
memory on a GPU and by e^x on a CPU. Nothing here is differentiable.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fastppo.kernels._backend import extension, pick
from fastppo.kernels._philox import uniforms
from fastppo.kernels._sampling_gpu import sampling_cuda, sampling_triton
from fastppo.kernels._sampling_types import (
    BAD_HISTORY,
    BAD_NUMBER,
    DTYPE_CODES,
    NOTHING_LEFT,
    TILE,
    History,
    Sample,
    SamplingOptions,
)


def adjusted_logits_reference(x_BV, options, history, banned):
    """y of the module's formula: repetition penalty, then bans."""
    y_BV = x_BV.clone()
    if history is not None and options.repetition_penalty != 1.0:
        tokens_BL, mask_BL = history[0], history[1] & (history[0] >= 0) & (history[0] < x_BV.shape[1])
        rows_K, columns_K = (
            torch.arange(len(x_BV), device=x_BV.device)[:, None].expand_as(mask_BL)[mask_BL],
            tokens_BL[mask_BL],
        )
        old_K = x_BV[rows_K, columns_K]
        penalty = options.repetition_penalty
        y_BV[rows_K, columns_K] = torch.where(old_K > 0, old_K / penalty, old_K * penalty)
    return y_BV if banned is None else y_BV.masked_fill(banned, -math.inf)


def kept_reference(z_BV, options):
    """True where top_k, top_p and min_p all keep the token."""
    z_BV = z_BV.clone()
    if 0 < options.top_k < z_BV.shape[1]:
        z_BV[z_BV < z_BV.topk(options.top_k).values[:, -1:]] = -math.inf
    largest_B1 = z_BV.max(dim=1, keepdim=True).values
    if options.top_p < 1:
        sorted_BV = z_BV.sort(dim=1, descending=True).values
        p_BV = sorted_BV.softmax(dim=1)
        stays_BV = p_BV.cumsum(dim=1) - p_BV < options.top_p
        smallest_B1 = sorted_BV.masked_fill(~stays_BV, math.inf).min(dim=1, keepdim=True).values
        z_BV[z_BV < torch.minimum(smallest_B1, largest_B1)] = -math.inf
    if options.min_p > 0:
        z_BV[z_BV < largest_B1 + math.log(options.min_p)] = -math.inf
    return z_BV > -math.inf


def _first_above(weights, u):
    """The first index at which the running sum of weights over the last dimension exceeds u times its total."""
    cumulative = weights.cumsum(dim=-1)
    return (cumulative <= u[..., None] * cumulative[..., -1:]).sum(dim=-1)


def sampling_reference(logits_BV, seeds_B, positions_B, options, history=None, banned=None):
    """The definition above in plain PyTorch, computed in float32 (float64 for float64 logits)."""
    x_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    y_BV = adjusted_logits_reference(x_BV, options, history, banned)
    B, V = x_BV.shape
    nothing_B = ~(y_BV > -math.inf).any(dim=1)
    bad_B = (x_BV.isnan() | (x_BV == math.inf)).any(dim=1)
    raw_BV = (x_BV / options.logprob_temperature).log_softmax(dim=1)
    entropy_B = -(raw_BV.exp() * raw_BV.masked_fill(raw_BV == -math.inf, 0)).sum(dim=1)
    if options.greedy:
        tokens_B = y_BV.argmax(dim=1)
        sampled_B = torch.zeros_like(entropy_B)
    else:
        z_BV = y_BV / options.temperature
        log_p_BV = z_BV.masked_fill(~kept_reference(z_BV, options), -math.inf).log_softmax(dim=1)
        u_tile_B, u_token_B = uniforms(seeds_B, positions_B)
        p_BNK = torch.nn.functional.pad(log_p_BV.exp(), (0, -V % TILE)).unflatten(1, (-1, TILE))
        tile_B = _first_above(p_BNK.sum(dim=2), u_tile_B).clamp(max=p_BNK.shape[1] - 1)
        inside_B = _first_above(p_BNK[torch.arange(B, device=tile_B.device), tile_B], u_token_B)
        tokens_B = (tile_B * TILE + inside_B).clamp(max=V - 1)
        sampled_B = log_p_BV.gather(1, tokens_B[:, None])[:, 0]
    logprob_B = raw_BV.gather(1, tokens_B[:, None])[:, 0]
    tokens_B = torch.where(bad_B, BAD_NUMBER, torch.where(nothing_B, NOTHING_LEFT, tokens_B))
    if history is not None and options.repetition_penalty != 1.0:
        outside_B = (history[1] & ((history[0] < 0) | (history[0] >= V))).any(dim=1)
        tokens_B = torch.where(outside_B & ~bad_B, BAD_HISTORY, tokens_B)
    numbers = (x.masked_fill(tokens_B < 0, math.nan) for x in (sampled_B, logprob_B, entropy_B))
    return Sample(tokens_B, *numbers)


def sampling_cpu_unchecked(logits_BV, seeds_B, positions_B, options, history, banned, out: Sample) -> Sample:
    """Launch the C++ kernel on arguments that are known to be right, into `out`; a row's last stride must be 1."""
    B, V = logits_BV.shape
    extension().sampling(
        logits_BV.data_ptr(),
        DTYPE_CODES[logits_BV.dtype],
        B,
        V,
        logits_BV.stride(0),
        seeds_B.data_ptr(),
        positions_B.data_ptr(),
        *((history[0].data_ptr(), history[1].data_ptr(), history[0].shape[1]) if history is not None else (0, 0, 0)),
        *((banned.data_ptr(), banned.stride(0) if banned.dim() == 2 else 0) if banned is not None else (0, 0)),
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty,
        options.logprob_temperature,
        out[0].data_ptr(),
        out[1].data_ptr(),
        out[2].data_ptr(),
        out[3].data_ptr(),
    )
    return out


def empty_sample(B: int, device: torch.device) -> Sample:
    """Room for the results of B rows."""
    return Sample(torch.empty(B, dtype=torch.int64, device=device), *torch.empty(3, B, device=device))


def _sampling_cpu(logits_BV, seeds_B, positions_B, options, history=None, banned=None):
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    if history is not None:
        history = History(*(x.contiguous() for x in history))
    banned = banned if banned is None else banned.contiguous()
    out = empty_sample(len(logits_BV), logits_BV.device)
    return sampling_cpu_unchecked(
        logits_BV, seeds_B.contiguous(), positions_B.contiguous(), options, history, banned, out
    )


BACKEND_TABLE: dict[str, Callable] = {
    "cuda": sampling_cuda,
    "triton": sampling_triton,
    "cpu": _sampling_cpu,
    "reference": sampling_reference,
}


def raise_on_bad_rows(sample: Sample) -> Sample:
    """Return `sample`, or raise ValueError naming the first row without a token. Waits for a GPU's result."""
    bad_K = (sample.tokens_B < 0).nonzero()[:, 0]
    if len(bad_K) == 0:
        return sample
    row = int(bad_K[0])
    why = {
        BAD_NUMBER: "holds NaN or +inf; look at the model's output (a diverged policy, or half-precision overflow)",
        NOTHING_LEFT: "has no token left: every logit is -inf or banned; allow at least one token",
        BAD_HISTORY: "has a history token outside the vocabulary; mask padding out",
    }[int(sample.tokens_B[row])]
    raise ValueError(f"sampling: row {row} of logits_BV {why} ({len(bad_K)} of {len(sample.tokens_B)} rows are bad)")


def _check(logits_BV, seeds_B, positions_B, history, banned):
    if logits_BV.dim() != 2 or logits_BV.dtype not in DTYPE_CODES or logits_BV.shape[1] == 0:
        raise ValueError(
            "sampling: logits_BV must be float32, bfloat16 or float16 of shape (B, V) with V > 0; "
            f"got {logits_BV.dtype} {tuple(logits_BV.shape)}"
        )
    B, V = logits_BV.shape
    wanted = [("seeds_B", seeds_B, torch.int64, [(B,)]), ("positions_B", positions_B, torch.int64, [(B,)])]
    if history is not None:
        shape = (B, history[0].shape[-1])
        wanted += [
            ("history tokens", history[0], torch.int64, [shape]),
            ("history mask", history[1], torch.bool, [shape]),
        ]
    if banned is not None:
        wanted.append(("banned", banned, torch.bool, [(V,), (B, V)]))
    for name, x, dtype, shapes in wanted:
        if x.dtype != dtype or tuple(x.shape) not in shapes or x.device != logits_BV.device:
            raise ValueError(
                f"sampling: {name} must be {dtype} of shape {' or '.join(map(str, shapes))} on {logits_BV.device}; "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def sampling(
    logits_BV: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    options: SamplingOptions | None = None,
    *,
    history: History | tuple | None = None,
    banned: torch.Tensor | None = None,
    check: bool = True,
    backend: str | None = None,
) -> Sample:
    """Sample a token per row; the formula and its conditions stand above.

    logits_BV: float32, bfloat16 or float16, any row stride.   seeds_B, positions_B: int64; a row's random numbers are
    a function of its (seed, position) alone.   history: (tokens int64, mask bool) of shape (B, L), used when
    repetition_penalty is not 1.   banned: bool (V,) or (B, V), True where a token must not be sampled.
    check: raise for rows that cannot be sampled; on a GPU that waits for the result, so a decode loop passes False
    and calls raise_on_bad_rows (or looks for negative tokens) when it reads the tokens anyway.
    Raises ValueError on a wrong shape, dtype or device, on NaN or +inf logits and on rows with no token left (both
    name the row); RuntimeError if `backend` cannot run here.
    """
    options = options or SamplingOptions()
    _check(logits_BV, seeds_B, positions_B, history, banned)
    if history is None or options.repetition_penalty == 1.0:
        history, options = None, replace(options, repetition_penalty=1.0)
    run = pick("sampling", BACKEND_TABLE, logits_BV.device, backend)
    out = run(logits_BV.detach(), seeds_B, positions_B, options, history, banned)
    return raise_on_bad_rows(out) if check else out


sample = sampling
