"""logprob: logits -> log-probability of given tokens and entropy of each row, forward and backward.

    z = logits / T,  lse = log sum_j exp(z_j),  p_j = exp(z_j - lse)
    logprob = z[token] - lse                    entropy H = lse - sum_j p_j z_j
    dL/dlogits_j = (g * (1[j = token] - p_j) - h * p_j * (log p_j + H)) / T,   g = dL/dlogprob, h = dL/dH

One read of the logits forward (V * itemsize bytes per row), one read and one write backward: bound by memory
bandwidth on a GPU, by the exponential on a CPU with 16-bit logits. Statistics are float32 whatever the logits are.
On a CPU the memory of dlogits, up to _recycle.GRADIENT bytes, is kept for the next backward once nobody holds it.
Suffixes: N rows (any leading dimensions), V vocabulary.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.kernels import _logit_rows, _recycle
from fastppo.kernels._backend import extension, pick

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LogProb(NamedTuple):
    """logprob_N: nats, float32 (float64 for float64 logits). entropy_N: the same, of the tempered distribution."""

    logprob_N: Tensor
    entropy_N: Tensor


def logprob_reference(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> LogProb:
    """The definition, differentiable by autograd."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    logp_NV = z_NV.log_softmax(-1)
    logprob_N = logp_NV.gather(-1, tokens_N[..., None])[..., 0]
    log_or_zero_NV = logp_NV.masked_fill(logp_NV == -torch.inf, 0.0)  # 0 log 0 = 0
    return LogProb(logprob_N, -(logp_NV.exp() * log_or_zero_NV).sum(-1))


class _Refuse(torch.autograd.Function):
    """A gradient as it is; differentiating through it raises."""

    @staticmethod
    def forward(ctx, gradient, anchor, op):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op}: its gradient cannot be differentiated again; use backend='reference' for that")


def once(op: str) -> Callable:
    """Decorator of an autograd.Function's backward: a second derivative raises.

    torch's once_differentiable lets it pass in silence, as a constant, when the upstream gradients are constants.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *upstream):
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            if not torch.is_grad_enabled():  # enabled here only under create_graph=True
                return gradients
            anchor = torch.zeros((), requires_grad=True)
            return tuple(None if x is None else _Refuse.apply(x, anchor, op) for x in gradients)

        return run

    return decorate


class RowLayout(NamedTuple):
    """Rows of a tensor whose leading dimensions collapse to two; strides in elements."""

    count: int
    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(x_NV: Tensor) -> RowLayout | None:
    """How to step over the rows of a strided tensor, or None when its leading dimensions do not collapse to two."""
    if x_NV.numel() == 0:
        return RowLayout(0, 1, 0, 0)
    if x_NV.stride(-1) != 1 and x_NV.shape[-1] != 1:
        return None
    dims = []  # (size, stride), merged from the left where one dimension steps over the next exactly
    for size, stride in zip(x_NV.shape[:-1], x_NV.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(dims)) + dims
    return RowLayout(outer * inner, max(inner, 1), outer_stride, inner_stride)


class Launcher(NamedTuple):
    """One back end's two launches; `stats_N2` (base-2 maximum and sum) passes from the first to the second."""

    forward: Callable  # (logits_NV, tokens_N, temperature) -> logprob_N, entropy_N, stats_N2
    backward: Callable  # (logits_NV, dlogits_NV, tokens_N, temperature, stats_N2, entropy_N, g_N, h_N) -> None


def large_buffer(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; on a CPU the last one's memory if nobody holds it, and 2 MB pages where the system has them."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    made = _recycle.empty("logprob", shape, dtype, _recycle.GRADIENT)
    if made.nbytes >= 4 * 2**20 and not isinstance(extension(), str):
        extension().advise_huge_pages(made.data_ptr(), made.nbytes)
    return made


def _new_outputs(tokens_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = [tokens_N.new_empty(tokens_N.shape, dtype=torch.float32) for _ in range(2)]
    return *made, tokens_N.new_empty((*tokens_N.shape, 2), dtype=torch.float32)


def triton_forward(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    out, scales = _new_outputs(tokens_N), _logit_rows.LogitScales(temperature)
    _logit_rows.launch_stats(
        logits_NV, row_layout(logits_NV), logits_NV.shape[-1], 0, scales, None, tokens_N, None, out
    )
    return out


def triton_backward(logits_NV, dlogits_NV, tokens_N, temperature, *saved) -> None:
    layouts, scales = (row_layout(logits_NV), row_layout(dlogits_NV)), _logit_rows.LogitScales(temperature)
    _logit_rows.launch_grad(logits_NV, dlogits_NV, layouts, logits_NV.shape[-1], 0, scales, None, tokens_N, saved)


def c_launcher(module: Callable[[], ModuleType], prefix: str = "", stream: Callable[[], tuple] = tuple) -> Launcher:
    """The C++ launches of csrc/cpu, or with "cuda_" those of csrc/cuda, which take the current stream."""

    def forward(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        out = _new_outputs(tokens_N)
        with torch.cuda.device_of(logits_NV):
            getattr(module(), f"{prefix}logprob_forward")(
                logits_NV.data_ptr(),
                DTYPE_CODES[logits_NV.dtype],
                row_layout(logits_NV),
                logits_NV.shape[-1],
                temperature,
                tokens_N.data_ptr(),
                tuple(x.data_ptr() for x in out),
                *stream(),
            )
        return out

    def backward(logits_NV, dlogits_NV, tokens_N, temperature, *saved) -> None:
        with torch.cuda.device_of(logits_NV):
            getattr(module(), f"{prefix}logprob_backward")(
                logits_NV.data_ptr(),
                dlogits_NV.data_ptr(),
                DTYPE_CODES[logits_NV.dtype],
                row_layout(logits_NV),
                row_layout(dlogits_NV),
                logits_NV.shape[-1],
                temperature,
                tokens_N.data_ptr(),
                tuple(x.data_ptr() for x in saved),
                *stream(),
            )

    return Launcher(forward, backward)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, tokens_N, temperature, inplace_backward, launcher):
        logprob_N, entropy_N, stats_N2 = launcher.forward(logits_NV, tokens_N, temperature)
        ctx.save_for_backward(logits_NV, tokens_N, stats_N2, entropy_N)
        ctx.temperature, ctx.inplace_backward, ctx.launcher = temperature, inplace_backward, launcher
        ctx.overwritten = False
        ctx.set_materialize_grads(True)
        return logprob_N, entropy_N

    @staticmethod
    @once("logprob")
    def backward(ctx, g_N, h_N):
        if ctx.overwritten:
            raise RuntimeError(
                "logprob: backward ran before with inplace_backward=True and has overwritten the logits; "
                "use inplace_backward=False to run it twice"
            )
        logits_NV, tokens_N, stats_N2, entropy_N = ctx.saved_tensors
        g_N, h_N = g_N.contiguous(), h_N.contiguous()  # an expanded scalar has stride 0
        if ctx.inplace_backward:
            ctx.overwritten = True
            dlogits_NV = logits_NV.detach()
        else:
            dlogits_NV = large_buffer(*logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
        ctx.launcher.backward(logits_NV, dlogits_NV, tokens_N, ctx.temperature, stats_N2, entropy_N, g_N, h_N)
        if ctx.inplace_backward:
            torch.autograd.graph.increment_version(logits_NV)  # whoever else saved these logits gets an error
        return dlogits_NV, None, None, None, None


def _run(launcher: Launcher) -> Callable:
    def run(logits_NV, tokens_N, temperature, inplace_backward):
        if logits_NV.dtype not in DTYPE_CODES:
            raise ValueError(f"logprob: logits must be float32, bfloat16 or float16 here; got {logits_NV.dtype}")
        if row_layout(logits_NV) is None:
            logits_NV = logits_NV.contiguous()
        return LogProb(*_LogProb.apply(logits_NV, tokens_N.contiguous(), temperature, inplace_backward, launcher))

    return run


def _run_reference(logits_NV, tokens_N, temperature, inplace_backward):
    return logprob_reference(logits_NV, tokens_N, temperature)


BACKEND_TABLE = {
    "cuda": _run(c_launcher(extension, "cuda_", lambda: (torch.cuda.current_stream().cuda_stream,))),
    "triton": _run(Launcher(triton_forward, triton_backward)),
    "cpu": _run(c_launcher(extension)),
    "reference": _run_reference,
}


def check_tokens(op: str, tokens_N: Tensor, shape: torch.Size, device: torch.device, vocab: int) -> None:
    """Raise unless the tokens are int64 of `shape` on `device` and, where looking costs no device wait, inside [0, V)."""
    if tokens_N.dtype != torch.int64 or tokens_N.shape != shape or tokens_N.device != device:
        raise ValueError(
            f"{op}: tokens_N must be torch.int64 of shape {tuple(shape)} on {device}; "
            f"got {tokens_N.dtype} {tuple(tokens_N.shape)} on {tokens_N.device}"
        )
    if device.type == "cpu" and tokens_N.numel():
        low, high = (int(x) for x in torch.aminmax(tokens_N))
        if low < 0 or high >= vocab:
            raise ValueError(
                f"{op}: tokens_N must be in [0, {vocab}); got values from {low} to {high} "
                "(select the rows that count before the call instead of marking the others with -100)"
            )


def check_temperature(op: str, temperature: float) -> float:
    if not (isinstance(temperature, (int, float)) and 0 < temperature < float("inf")):
        raise ValueError(f"{op}: temperature must be a positive finite number; got {temperature!r}")
    return float(temperature)


def logprob(
    logits_NV: Tensor,
    tokens_N: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> LogProb:
    """Log-probability of `tokens_N` and entropy of softmax(logits / temperature); both are differentiable once.

    logits_NV: [..., V] float32, bfloat16 or float16 (float64 runs the reference), any strides: rows need not be
    contiguous (logits[:, :-1] is read in place). tokens_N: [...] int64 in [0, V): a CPU tensor is checked, on a GPU a
    token outside gives NaN, because looking would make the host wait. A row with zero upstream gradients costs one
    fill in backward. A row whose logits are all -inf, or that holds a NaN or +inf, gives NaN.

    inplace_backward=True lets backward write dlogits over the logits (half the memory traffic's footprint): the
    logits are gone afterwards and a second backward raises. Not for leaf tensors or expanded views.

    Raises ValueError for a wrong shape, dtype, device, token or temperature; RuntimeError for a back end that cannot run.
    """
    if logits_NV.dim() < 1 or not logits_NV.is_floating_point() or logits_NV.shape[-1] == 0:
        raise ValueError(
            f"logprob: logits_NV must be floating point of shape [..., V] with V > 0; "
            f"got {logits_NV.dtype} {tuple(logits_NV.shape)}"
        )
    check_tokens("logprob", tokens_N, logits_NV.shape[:-1], logits_NV.device, logits_NV.shape[-1])
    temperature = check_temperature("logprob", temperature)
    if inplace_backward and logits_NV.requires_grad:
        expanded = any(s == 0 and n > 1 for s, n in zip(logits_NV.stride(), logits_NV.shape, strict=True))
        if logits_NV.is_leaf or expanded or row_layout(logits_NV) is None:
            raise ValueError(
                "logprob: inplace_backward=True needs logits that are computed by the graph, not a leaf, an expanded "
                "or a column-strided view; use inplace_backward=False"
            )
    if backend is None and logits_NV.dtype == torch.float64:
        backend = "reference"
    return pick("logprob", BACKEND_TABLE, logits_NV.device, backend)(logits_NV, tokens_N, temperature, inplace_backward)
