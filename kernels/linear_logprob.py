"""linear_logprob: hidden states and the output embedding -> log-prob of given tokens and entropy, no [N, V] tensor.

    x = hidden W^T + b,  u = scale * x, or cap * tanh(scale * x / cap) with a soft cap,  z = u / T
    logprob and entropy of softmax(z) as in logprob.py

Forward: 2 N V D FLOPs (one matrix product); backward: 6 N V D (the logits once more, then dhidden and dweight); bound
by the matrix products, which are torch's or _products.py's. The logits exist one tile at a time: TILE_BYTES of workspace, and for 16-bit
inputs float32 accumulators of dhidden [N, D] and of one tile's dweight [columns, D]; rows whose upstream gradients are
zero are left out of backward.

Tiles go over the vocabulary, not over rows: a tile of dweight is then written once, where tiles of rows would read and
write the whole [V, D] gradient for each.
Suffixes: N tokens, D hidden, V vocabulary; C columns of one tile, R rows of one tile.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.kernels._backend import pick
from fastppo.kernels._logit_tiles import CPU, TRITON, Launcher, Scales
from fastppo.kernels._products import mm
from fastppo.kernels.logprob import (
    DTYPE_CODES,
    LogProb,
    check_temperature,
    check_tokens,
    logprob_reference,
    once,
)

TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
MAX_TILE_ROWS = 4096
WAIT_FLOPS = 2e11  # 0.25 ms of products on an H100: the host's wait (tens of us) can only win back more than it costs


class Head(NamedTuple):
    """The output embedding and what the model does to its logits.

    weight_VD: [V, D]. bias_V: [V] or None. logit_scale: a factor of the logits.
    softcap: logits = softcap * tanh(logits / softcap); None: off.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def head_logits(hidden_ND: Tensor, head: Head) -> Tensor:
    """All logits, before the temperature: the definition of Head."""
    logits_NV = torch.nn.functional.linear(hidden_ND, head.weight_VD, head.bias_V) * head.logit_scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return logits_NV


def linear_logprob_reference(hidden_ND: Tensor, head: Head, tokens_N: Tensor, temperature: float = 1.0) -> LogProb:
    """The definition, differentiable by autograd; makes the [N, V] logits."""
    return logprob_reference(head_logits(hidden_ND, head), tokens_N, temperature)


def spans(total: int, step: int) -> Iterator[slice]:
    for begin in range(0, total, step):
        yield slice(begin, min(begin + step, total))


def tile_shape(rows: int, vocab: int, itemsize: int, device_type: str) -> tuple[int, int]:
    """Rows and columns of a tile of at most TILE_BYTES; columns a multiple of 256 that splits the vocabulary evenly."""
    tile_rows = max(1, min(rows, MAX_TILE_ROWS))
    columns = max(256, TILE_BYTES[device_type] // (tile_rows * itemsize) // 256 * 256)
    tiles = -(-vocab // columns)
    even = -(-vocab // tiles)
    return tile_rows, min(vocab, -(-even // 256) * 256)


def forward_tiles(launcher: Launcher, hidden_ND, head: Head, scales: Scales, tokens_N) -> tuple[Tensor, Tensor, Tensor]:
    vocab = head.weight_VD.shape[0]
    rows, columns = tile_shape(len(hidden_ND), vocab, hidden_ND.element_size(), hidden_ND.device.type)
    state_N4 = launcher.new_state(len(hidden_ND), hidden_ND.device)
    workspace = hidden_ND.new_empty(min(rows, len(hidden_ND)) * columns)
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    for cols in spans(vocab, columns):
        weight_CD = head.weight_VD[cols]
        for span in spans(len(hidden_ND), rows):
            hidden_RD = hidden_ND[span]
            tile_RC = workspace[: len(hidden_RD) * len(weight_CD)].view(len(hidden_RD), len(weight_CD))
            mm(hidden_RD, weight_CD.t(), tile_RC)
            launcher.tile_stats(tile_RC, cols.start, scales, bias_V, tokens_N[span], state_N4[span])
    return launcher.finish(state_N4)


class Gradients(NamedTuple):
    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def backward_tiles(launcher: Launcher, hidden_ND, head: Head, scales: Scales, tokens_N, saved, needs) -> Gradients:
    """saved: stats_N2, entropy_N, g_N, h_N. needs: which of hidden, weight, bias want a gradient."""
    vocab, depth = head.weight_VD.shape
    rows, columns = tile_shape(len(hidden_ND), vocab, hidden_ND.element_size(), hidden_ND.device.type)
    workspace = hidden_ND.new_empty(min(rows, len(hidden_ND)) * columns)
    exact = torch.float32 if hidden_ND.element_size() == 2 else hidden_ND.dtype
    dhidden_ND = torch.zeros_like(hidden_ND, dtype=exact) if needs[0] else None
    dweight_VD = None
    if needs[1]:
        dweight_VD = torch.empty(vocab, depth, dtype=hidden_ND.dtype, device=hidden_ND.device)
    if needs[1] and not len(hidden_ND):
        dweight_VD.zero_()  # no row, no product that would write it
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    dbias_V = torch.zeros_like(bias_V) if needs[2] else None
    for cols in spans(vocab, columns):
        weight_CD = head.weight_VD[cols]
        accumulator = WeightAccumulator(dweight_VD[cols], exact) if needs[1] else None
        for span in spans(len(hidden_ND), rows):
            hidden_RD = hidden_ND[span]
            tile_RC = workspace[: len(hidden_RD) * len(weight_CD)].view(len(hidden_RD), len(weight_CD))
            mm(hidden_RD, weight_CD.t(), tile_RC)
            launcher.tile_grad(tile_RC, cols.start, scales, bias_V, tokens_N[span], *(x[span] for x in saved))
            if needs[0]:
                mm(tile_RC, weight_CD, dhidden_ND[span], add=True)
            if needs[1]:
                accumulator.add(tile_RC.t(), hidden_RD, last=span.stop == len(hidden_ND))
            if needs[2]:
                dbias_V[cols] += tile_RC.sum(0, dtype=torch.float32)
    return Gradients(
        dhidden_ND.to(hidden_ND.dtype) if needs[0] else None,
        dweight_VD,
        dbias_V.to(head.bias_V.dtype) if needs[2] else None,
    )


class WeightAccumulator:
    """A tile of dweight: written directly by its only product, through a float32 buffer when 16-bit parts are summed."""

    def __init__(self, out_CD: Tensor, exact: torch.dtype):
        self.out_CD, self.exact, self.sum_CD = out_CD, exact, None

    def add(self, a: Tensor, b: Tensor, last: bool) -> None:
        if self.sum_CD is None and (last or self.exact == self.out_CD.dtype):
            self.sum_CD = mm(a, b, self.out_CD)
        elif self.sum_CD is None:
            self.sum_CD = mm(a, b, torch.empty_like(self.out_CD, dtype=self.exact))
        else:
            mm(a, b, self.sum_CD, add=True)
        if last and self.sum_CD is not self.out_CD:
            self.out_CD.copy_(self.sum_CD)


def live_rows(live_N: Tensor, row_flops: int) -> Tensor | None:
    """Indices of the True rows; None for all, and on a GPU where finding out costs more than it could save.

    There the host waits once for the number of rows: not for less than WAIT_FLOPS of products, nor inside a capture.
    """
    if live_N.is_cuda and (len(live_N) * row_flops < WAIT_FLOPS or torch.cuda.is_current_stream_capturing()):
        return None
    index_M = live_N.nonzero()[:, 0]
    return index_M if len(index_M) < len(live_N) else None


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, tokens_N, scales, launcher):
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = Head(weight_VD, bias_V)
            logprob_N, entropy_N, stats_N2 = forward_tiles(launcher, hidden_ND, head, scales, tokens_N)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, tokens_N, stats_N2, entropy_N)
        ctx.scales, ctx.launcher = scales, launcher
        return logprob_N, entropy_N

    @staticmethod
    @once("linear_logprob")
    def backward(ctx, g_N, h_N):
        hidden_ND, weight_VD, bias_V, tokens_N, stats_N2, entropy_N = ctx.saved_tensors
        saved = [stats_N2, entropy_N, g_N.contiguous(), h_N.contiguous()]
        live_N = live_rows((g_N != 0) | (h_N != 0), 6 * weight_VD.numel())
        compact = live_N is not None
        if compact:
            hidden_MD, tokens_M = hidden_ND[live_N], tokens_N[live_N]
            saved = [x[live_N] for x in saved]
        else:
            hidden_MD, tokens_M = hidden_ND, tokens_N
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = Head(weight_VD, bias_V)
            grads = backward_tiles(ctx.launcher, hidden_MD, head, ctx.scales, tokens_M, saved, ctx.needs_input_grad[:3])
        dhidden_ND = grads.hidden_ND
        if compact and dhidden_ND is not None:
            dhidden_ND = torch.zeros_like(hidden_ND).index_copy_(0, live_N, dhidden_ND)
        return dhidden_ND, grads.weight_VD, grads.bias_V, None, None, None


def _run(launcher: Launcher) -> Callable:
    def run(hidden_ND, head, tokens_N, temperature):
        if hidden_ND.dtype not in DTYPE_CODES:
            raise ValueError(f"linear_logprob: hidden must be float32, bfloat16 or float16 here; got {hidden_ND.dtype}")
        scales = Scales(temperature, float(head.logit_scale), float(head.softcap or 0.0))
        flat_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
        out = _LinearLogProb.apply(
            flat_ND, head.weight_VD, head.bias_V, tokens_N.reshape(-1).contiguous(), scales, launcher
        )
        return LogProb(*(x.view(tokens_N.shape) for x in out))

    return run


BACKEND_TABLE = {"triton": _run(TRITON), "cpu": _run(CPU), "reference": linear_logprob_reference}


def check_head(op: str, hidden_ND: Tensor, head: Head) -> None:
    weight_VD, bias_V, logit_scale, softcap = head
    depth = hidden_ND.shape[-1] if hidden_ND.dim() else 0
    if weight_VD.dim() != 2 or weight_VD.shape[1] != depth or weight_VD.shape[0] == 0:
        raise ValueError(
            f"{op}: head.weight_VD must have shape (V, {depth}) for hidden_ND of shape {tuple(hidden_ND.shape)}; "
            f"got {tuple(weight_VD.shape)}"
        )
    if weight_VD.dtype != hidden_ND.dtype or weight_VD.device != hidden_ND.device or not hidden_ND.is_floating_point():
        raise ValueError(
            f"{op}: hidden_ND and head.weight_VD must be floating point of one dtype on one device; got "
            f"{hidden_ND.dtype} on {hidden_ND.device} and {weight_VD.dtype} on {weight_VD.device}"
        )
    if bias_V is not None and (bias_V.shape != weight_VD.shape[:1] or bias_V.device != weight_VD.device):
        raise ValueError(
            f"{op}: head.bias_V must have shape ({weight_VD.shape[0]},) on {weight_VD.device}; "
            f"got {tuple(bias_V.shape)} on {bias_V.device}"
        )
    if not logit_scale > 0 or (softcap is not None and not softcap > 0):
        raise ValueError(
            f"{op}: head.logit_scale must be positive, head.softcap positive or None; got {logit_scale} and {softcap}"
        )


def autocast_inputs(hidden_ND: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Under torch.autocast the product runs in the autocast dtype, as torch.nn.functional.linear's would."""
    device = hidden_ND.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_ND, head
    dtype = torch.get_autocast_dtype(device)
    return hidden_ND.to(dtype), head._replace(weight_VD=head.weight_VD.to(dtype))


def linear_logprob(
    hidden_ND: Tensor, head: Head, tokens_N: Tensor, *, temperature: float = 1.0, backend: str | None = None
) -> LogProb:
    """Log-probability of `tokens_N` and entropy under `head` applied to `hidden_ND`; both are differentiable once.

    hidden_ND: [..., D] and head.weight_VD: [V, D] of one dtype, float32, bfloat16 or float16 (float64 runs the
    reference); tokens_N: [...] int64 in [0, V): a CPU tensor is checked, on a GPU a token outside gives NaN. Gradients go to hidden, weight and bias. 16-bit
    logits are rounded to 16 bits once, as the model's own head would; their statistics and sums are float32.

    Extra memory: one tile of TILE_BYTES (16 MiB on a CPU, 256 MiB on a GPU), 40 bytes per row, in backward the gradients themselves and, when some
    rows have zero upstream gradient, a copy of the others.
    Raises ValueError for a wrong shape, dtype, device, token, head or temperature.
    """
    check_head("linear_logprob", hidden_ND, head)
    hidden_ND, head = autocast_inputs(hidden_ND, head)
    check_tokens("linear_logprob", tokens_N, hidden_ND.shape[:-1], hidden_ND.device, head.weight_VD.shape[0])
    temperature = check_temperature("linear_logprob", temperature)
    if backend is None and hidden_ND.dtype == torch.float64:
        backend = "reference"
    return pick("linear_logprob", BACKEND_TABLE, hidden_ND.device, backend)(hidden_ND, head, tokens_N, temperature)
