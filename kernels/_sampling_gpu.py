"""sampling's launchers for a GPU, Triton and CUDA. Penalty and bans make a float32 copy of the logits first."""

import math

import torch

from fastppo.kernels._backend import extension
from fastppo.kernels._sampling_triton import sampling_kernel
from fastppo.kernels._sampling_types import BAD_HISTORY, BAD_NUMBER, DTYPE_CODES, TILE, Sample


def _adjusted_on_gpu(logits_BV, options, history, banned):
    """(y_BV, rows whose history is wrong): a float32 copy with penalty and bans, or the logits themselves without either."""
    if history is None and banned is None:
        return logits_BV, None
    y_BV, outside_B, V = logits_BV.float(), None, logits_BV.shape[1]
    if history is not None:  # as adjusted_logits_reference does, without selecting by a mask, which waits for the GPU
        tokens_BL, mask_BL = history
        outside_BL = (tokens_BL < 0) | (tokens_BL >= V)
        outside_B = (mask_BL & outside_BL).any(dim=1)
        column_BL = tokens_BL.masked_fill(outside_BL | ~mask_BL, V)  # what does not count goes to a column of its own
        seen_BV = torch.zeros(len(y_BV), V + 1, dtype=torch.bool, device=y_BV.device).scatter_(1, column_BL, True)[
            :, :V
        ]
        penalty = options.repetition_penalty
        y_BV = torch.where(seen_BV, torch.where(y_BV > 0, y_BV / penalty, y_BV * penalty), y_BV)
    return y_BV if banned is None else y_BV.masked_fill(banned, -math.inf), outside_B


def sampling_triton(logits_BV, seeds_B, positions_B, options, history=None, banned=None):
    logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    B, V = logits_BV.shape
    y_BV, outside_B = _adjusted_on_gpu(logits_BV, options, history, banned)
    tokens_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    numbers_3B = torch.empty(3, B, device=logits_BV.device)
    if B:
        tiles = -(-V // TILE)
        sampling_kernel[(B,)](
            logits_BV,
            y_BV,
            seeds_B.contiguous(),
            positions_B.contiguous(),
            tokens_B,
            numbers_3B,
            B,
            V,
            logits_BV.stride(0),
            y_BV.stride(0),
            1.0 if options.greedy else 1.0 / options.temperature,
            1.0 / options.logprob_temperature,
            float(min(options.top_k, V)),
            options.top_p,
            math.log(options.min_p) * options.temperature if options.min_p > 0 else -math.inf,
            GREEDY=options.greedy,
            TOP_K=0 < options.top_k < V,
            TOP_P=options.top_p < 1,
            TILE=TILE,
            TILES=1 << (tiles - 1).bit_length(),
            num_warps=8,
        )
    return _with_bad_history(Sample(tokens_B, *numbers_3B), outside_B)


def sampling_cuda_on(module, stream, logits_BV, seeds_B, positions_B, options, history=None, banned=None):
    """Launch the CUDA kernel of `module`: the extension's, or in tests the same source compiled for the CPU."""
    logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    B, V = logits_BV.shape
    y_BV, outside_B = _adjusted_on_gpu(logits_BV, options, history, banned)
    seeds_B, positions_B = seeds_B.contiguous(), positions_B.contiguous()
    tokens_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    numbers_3B = torch.empty(3, B, device=logits_BV.device)
    module.sampling_cuda(
        logits_BV.data_ptr(),
        DTYPE_CODES[logits_BV.dtype],
        logits_BV.stride(0),
        0 if y_BV is logits_BV else y_BV.data_ptr(),
        y_BV.stride(0),
        B,
        V,
        seeds_B.data_ptr(),
        positions_B.data_ptr(),
        options.temperature,
        options.top_k,
        options.top_p,
        math.log(options.min_p) * options.temperature if options.min_p > 0 else -math.inf,
        options.logprob_temperature,
        tokens_B.data_ptr(),
        numbers_3B.data_ptr(),
        stream,
    )
    return _with_bad_history(Sample(tokens_B, *numbers_3B), outside_B)


def sampling_cuda(logits_BV, *args):
    with torch.cuda.device(logits_BV.device):
        return sampling_cuda_on(extension(), torch.cuda.current_stream().cuda_stream, logits_BV, *args)


def _with_bad_history(out, outside_B):
    if outside_B is None:
        return out
    tokens_B = torch.where(outside_B & (out.tokens_B != BAD_NUMBER), BAD_HISTORY, out.tokens_B)
    return Sample(tokens_B, *(x.masked_fill(tokens_B < 0, math.nan) for x in out[1:]))
