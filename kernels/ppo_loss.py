"""PPO's clipped policy loss and clipped value loss, their statistics and their gradients, in one pass.

    d       = logprob - old_logprob            r = exp(d)            A = advantage, or (advantage - mean) * rstd
    policy  = max(-A r, -A clip(r, 1 - c, 1 + c))                    (dual clip: at most -A * dual_clip where A < 0)
    value   = 0.5 max((v - R)^2, (clip(v, v_old - c_v, v_old + c_v) - R)^2)
    loss    = sum over mask of (policy + vf_coef value - entropy_coef entropy) / normalizer

Suffix: N tokens (any shape; all tensors alike). mask_N is True where a token counts; what stands at a False token,
NaN included, has no effect and gets gradient zero. Bound by memory: 25 bytes read and 8 written per token.
PPO: Schulman et al. 2017, equation 7; dual clip: Ye et al. 2020, equation 5.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastppo.kernels._backend import extension, pick
from fastppo.kernels._ppo_loss_triton import ppo_loss_kernel
from fastppo.kernels._ppo_stats import STATS, PPOStats
from fastppo.kernels._tickets import current_stream, ticket
from fastppo.kernels._triton import triton


@dataclass(frozen=True)
class PPOLossOptions:
    """The coefficients of the loss.

    cliprange: c > 0, the ratio's clip range. cliprange_value: c_v > 0, how far a value may move from the old one.
    vf_coef, entropy_coef: weights of the value loss and of the entropy bonus (which needs entropy_N).
    dual_clip: > 1, bound of the policy loss where A < 0, in units of -A; None: off.
    """

    cliprange: float = 0.2  # c > 0: the ratio's clip range
    cliprange_value: float = 0.2  # c_v > 0: how far the value may move from the old one
    vf_coef: float = 0.1  # weight of the value loss
    dual_clip: float | None = None  # > 1: bound of the policy loss, in units of -A, where A < 0; None is off
    entropy_coef: float = 0.0  # weight of the entropy bonus; needs entropy_N


class PPOBatch(NamedTuple):
    """What the loss compares with: data, not differentiated.

    old_logprobs_N, old_values_N, advantages_N, returns_N: float32 [N]. mask_N: bool [N], or None: all count.
    """

    old_logprobs_N: torch.Tensor
    old_values_N: torch.Tensor
    advantages_N: torch.Tensor
    returns_N: torch.Tensor
    mask_N: torch.Tensor | None = None


class PPOLoss(NamedTuple):
    """loss: scalar, differentiable in logprobs_N, values_N and entropy_N. stats: PPOStats."""

    loss: torch.Tensor
    stats: PPOStats


def ppo_loss_reference(
    logprobs_N, values_N, batch, options, *, entropy_N=None, normalizer=None, whiten=None
) -> PPOLoss:
    """The definition above in plain PyTorch, any float dtype. A tie in max passes half the gradient to each side."""
    mask_N = torch.ones_like(logprobs_N, dtype=torch.bool) if batch.mask_N is None else batch.mask_N
    keep = lambda x_N: torch.where(mask_N, x_N, torch.zeros_like(x_N))  # noqa: E731  NaN at a False token must not spread
    logprobs_N, values_N = keep(logprobs_N), keep(values_N)
    old_logprobs_N, old_values_N, advantages_N, returns_N = (keep(x_N) for x_N in batch[:4])
    if whiten is not None:
        advantages_N = keep((advantages_N - whiten[0]) * whiten[1])
    if normalizer is None:
        normalizer = mask_N.sum().clamp(min=1)

    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = log_ratio_N.exp()
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - options.cliprange, 1 + options.cliprange)
    policy_N = torch.maximum(plain_N, clipped_N)
    dual_N = torch.zeros_like(mask_N)
    if options.dual_clip is not None:
        dual_N = mask_N & (advantages_N < 0) & (policy_N > -advantages_N * options.dual_clip)
        policy_N = torch.where(dual_N, -advantages_N * options.dual_clip, policy_N)

    low_N, high_N = old_values_N - options.cliprange_value, old_values_N + options.cliprange_value
    error_N = (values_N - returns_N) ** 2
    clipped_error_N = (torch.clamp(values_N, low_N, high_N) - returns_N) ** 2
    value_N = 0.5 * torch.maximum(error_N, clipped_error_N)

    entropy_N = torch.zeros_like(logprobs_N) if entropy_N is None else keep(entropy_N)
    token_N = policy_N + options.vf_coef * value_N - options.entropy_coef * entropy_N
    loss = keep(token_N).sum() / normalizer

    with torch.no_grad():
        count = mask_N.sum()
        m2 = lambda x_N: (keep(x_N - x_N.sum() / count.clamp(min=1)) ** 2).sum()  # noqa: E731
        stats = [
            count,
            keep(policy_N).sum(),
            keep(value_N).sum(),
            entropy_N.sum(),
            (mask_N & (clipped_N > plain_N)).sum(),
            (mask_N & (clipped_error_N > error_N)).sum(),
            dual_N.sum(),
            (0.5 * log_ratio_N**2).sum(),
            -log_ratio_N.sum(),
            keep(ratio_N).sum(),
            advantages_N.sum(),
            returns_N.sum(),
            m2(returns_N),
            old_values_N.sum(),
            m2(old_values_N),
            values_N.sum(),
            error_N.sum(),
            keep(ratio_N).max() if ratio_N.numel() else torch.zeros_like(loss),
        ]
        return PPOLoss(loss, PPOStats((torch.stack([x.to(logprobs_N.dtype) for x in stats]),)))


_BLOCK, _BLOCK_G = 1024, 128


# --- launchers: (logprobs_N, values_N, entropy_N, batch, options, normalizer, whiten, grad) -> loss, stats, gradients ---


def _launch_triton(logprobs_N, values_N, entropy_N, batch, options, normalizer, whiten, grad):
    N, device = logprobs_N.numel(), logprobs_N.device
    G = max(1, triton.cdiv(N, _BLOCK))
    mask_N = batch.mask_N
    if normalizer is None:
        normalizer = float(N) if mask_N is None else mask_N.sum(dtype=torch.float32)
    count = isinstance(normalizer, torch.Tensor)
    if whiten is not None and any(isinstance(x, torch.Tensor) for x in whiten):  # float(x) would wait for the GPU
        whiten = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in whiten])
    in_tensor = isinstance(whiten, torch.Tensor)
    mean, rstd = (0.0, 1.0) if whiten is None or in_tensor else whiten
    work = torch.empty(len(STATS) * (G + 1) + 1, dtype=torch.float32, device=device)
    partials_KG, stats_K, loss = work[: -len(STATS) - 1], work[-len(STATS) - 1 : -1], work[-1]
    grads = tuple(torch.empty_like(x) if x is not None and grad else None for x in (logprobs_N, values_N, entropy_N))
    ppo_loss_kernel[(G,)](
        logprobs_N, values_N, entropy_N, *batch[:4], mask_N, *grads, partials_KG, ticket(device, current_stream(device)),
        whiten if in_tensor else None, normalizer if count else None, loss, stats_K,
        N, G, 1 - options.cliprange, 1 + options.cliprange, options.cliprange_value, options.vf_coef,
        float(options.dual_clip or 0.0), options.entropy_coef, float(mean), float(rstd),
        1.0 if count else max(float(normalizer), 1e-30),
        HAS_MASK=mask_N is not None, HAS_ENTROPY=entropy_N is not None, GRAD=grad,
        DUAL=options.dual_clip is not None, WHITEN=0 if whiten is None else 1 + in_tensor, COUNT=count,
        BLOCK=_BLOCK, BLOCK_G=_BLOCK_G,
    )  # fmt: skip
    return loss, stats_K, grads


def _launch_cpu(logprobs_N, values_N, entropy_N, batch, options, normalizer, whiten, grad):
    mean, rstd = (0.0, 1.0) if whiten is None else (float(x) for x in whiten)
    grads = tuple(torch.empty_like(x) if x is not None and grad else None for x in (logprobs_N, values_N, entropy_N))
    inputs = (logprobs_N, values_N, entropy_N, *batch, *grads)
    stats_K = torch.empty(len(STATS), dtype=torch.float64)
    loss = extension().ppo_loss(
        [0 if x is None else x.data_ptr() for x in inputs],
        logprobs_N.numel(),
        [
            1 - options.cliprange,
            1 + options.cliprange,
            options.cliprange_value,
            options.vf_coef,
            options.dual_clip or 0.0,
            options.entropy_coef,
            mean,
            rstd,
            0.0 if normalizer is None else float(normalizer),
        ],
        stats_K.data_ptr(),
    )
    return torch.tensor(loss, dtype=torch.float32), stats_K, grads


class _PPOLoss(torch.autograd.Function):
    """The gradients are complete after the forward pass; the backward only scales them."""

    @staticmethod
    def forward(ctx, logprobs_N, values_N, entropy_N, launch, batch, options, normalizer, whiten):
        grad = any(ctx.needs_input_grad[:3])
        loss, stats_K, grads = launch(logprobs_N, values_N, entropy_N, batch, options, normalizer, whiten, grad)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(stats_K)
        ctx.set_materialize_grads(False)
        return loss, stats_K

    @staticmethod
    def backward(ctx, grad_loss, _):
        if torch.is_grad_enabled():  # create_graph=True: the second derivative would be silently zero
            raise RuntimeError(
                "ppo_loss: its backward has no derivative; use backend='reference' for create_graph=True"
            )
        if grad_loss is None:
            return (None,) * 8
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return (*(x_N * grad_loss if x_N is not None and need else None for x_N, need in wanted), *(None,) * 5)


def _fused(launch, logprobs_N, values_N, batch, options, *, entropy_N, normalizer, whiten) -> PPOLoss:
    _check_dtypes(logprobs_N, values_N, entropy_N, batch)
    ready = lambda x_N: None if x_N is None else x_N.contiguous()  # noqa: E731
    batch = PPOBatch(*(ready(x_N.detach()) if x_N is not None else None for x_N in batch))
    inputs = map(ready, (logprobs_N, values_N, entropy_N))
    loss, stats_K = _PPOLoss.apply(*inputs, launch, batch, options, normalizer, whiten)
    return PPOLoss(loss, PPOStats((stats_K,)))


BACKEND_TABLE = {
    "triton": functools.partial(_fused, _launch_triton),
    "cpu": functools.partial(_fused, _launch_cpu),
    "reference": ppo_loss_reference,
}


def _named(logprobs_N, values_N, entropy_N, batch):
    return (("logprobs_N", logprobs_N), ("values_N", values_N), ("entropy_N", entropy_N), *batch._asdict().items())


def _check_dtypes(logprobs_N, values_N, entropy_N, batch):
    for name, x_N in _named(logprobs_N, values_N, entropy_N, batch):
        if x_N is not None and name != "mask_N" and x_N.dtype != torch.float32:
            raise ValueError(
                f"ppo_loss: {name} must be torch.float32, got {x_N.dtype}; convert it, or ask for backend='reference'"
            )


def ppo_loss(
    logprobs_N: torch.Tensor,
    values_N: torch.Tensor,
    batch: PPOBatch,
    options: PPOLossOptions,
    *,
    entropy_N: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    whiten: tuple[float, float] | torch.Tensor | None = None,
    backend: str | None = None,
) -> PPOLoss:
    """Return the loss (scalar, differentiable in logprobs_N, values_N and entropy_N) and its statistics.

    All tensors have one shape (any) and are float32 (the reference takes any float), batch.mask_N bool.
    normalizer: what the sum over tokens is divided by; None is the mask's count (at least 1). Pass the mini-batch's count
        to every micro-batch and their losses add up to the mini-batch's. A number needs one launch on a GPU.
    whiten: (mean, 1/std) for the advantages, numbers or a float32 tensor [2] on the device (no wait for the GPU).
    backend: "triton", "cpu" or "reference"; None picks the fastest here.
    Raises ValueError on a wrong shape, dtype or option; RuntimeError if `backend` cannot run here. No second derivatives.
    Statistics are the same to the last bit from run to run and, on a CPU, whatever the number of threads.
    """
    for name, x_N in _named(logprobs_N, values_N, entropy_N, batch):
        if x_N is not None and (x_N.shape != logprobs_N.shape or x_N.device != logprobs_N.device):
            raise ValueError(
                f"ppo_loss: {name} must be of shape {tuple(logprobs_N.shape)} on {logprobs_N.device} like logprobs_N; "
                f"got {tuple(x_N.shape)} on {x_N.device}"
            )
    if batch.mask_N is not None and batch.mask_N.dtype != torch.bool:
        raise ValueError(
            f"ppo_loss: mask_N must be torch.bool (True counts), got {batch.mask_N.dtype}; use mask_N.bool()"
        )
    if options.dual_clip is not None and options.dual_clip <= 1:
        raise ValueError(f"ppo_loss: dual_clip must be above 1 or None, got {options.dual_clip}")
    if options.entropy_coef and entropy_N is None:
        raise ValueError(f"ppo_loss: entropy_coef is {options.entropy_coef} but entropy_N is None; pass the entropies")
    run = pick("ppo_loss", BACKEND_TABLE, logprobs_N.device, backend)
    return run(logprobs_N, values_N, batch, options, entropy_N=entropy_N, normalizer=normalizer, whiten=whiten)
