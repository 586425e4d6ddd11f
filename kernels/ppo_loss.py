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
from fastppo.kernels._triton import tl, triton


@dataclass(frozen=True)
class PPOLossOptions:
    """The coefficients of the loss."""

    cliprange: float = 0.2  # c > 0: the ratio's clip range
    cliprange_value: float = 0.2  # c_v > 0: how far the value may move from the old one
    vf_coef: float = 0.1  # weight of the value loss
    dual_clip: float | None = None  # > 1: bound of the policy loss, in units of -A, where A < 0; None is off
    entropy_coef: float = 0.0  # weight of the entropy bonus; needs entropy_N


class PPOBatch(NamedTuple):
    """What the loss compares with: data, not differentiated. All float32 [N], mask_N bool or None (all count)."""

    old_logprobs_N: torch.Tensor
    old_values_N: torch.Tensor
    advantages_N: torch.Tensor
    returns_N: torch.Tensor
    mask_N: torch.Tensor | None = None


# What PPOStats counts, in the order of its tensor. Sums over mask_N, except: *_m2 is the sum of squared distances from
# the mean (so that a variance loses no digits), ratio_max is a maximum. TRL's name of the mean stands beside it.
STATS = (
    "count",
    "policy_loss",  # ppo/loss/policy
    "value_loss",  # ppo/loss/value, the 0.5 included
    "entropy",  # ppo/policy/entropy
    "policy_clipped",  # ppo/policy/clipfrac
    "value_clipped",  # ppo/val/clipfrac
    "dual_clipped",
    "approx_kl",  # ppo/policy/approxkl: 0.5 d^2
    "policy_kl",  # ppo/policy/policykl: old - new
    "ratio",  # mean ratio, TRL's ratio_threshold
    "advantage",  # ppo/policy/advantages_mean (whitened where whitening is on)
    "return",  # ppo/returns/mean
    "return_m2",  # ppo/returns/var
    "old_value",  # ppo/val/mean
    "old_value_m2",  # ppo/val/var
    "value",  # ppo/val/vpred
    "value_error",  # ppo/val/error: (v - R)^2
    "ratio_max",
)


@dataclass(frozen=True)
class PPOStats:
    """Statistics of one or more micro-batches; `a + b` is that of both. Nothing waits for a GPU until .sums() is called."""

    parts: tuple[torch.Tensor, ...]  # each [len(STATS)]

    def __add__(self, other: "PPOStats") -> "PPOStats":
        return PPOStats(self.parts + other.parts)

    def sums(self) -> dict[str, float]:
        """Every name of STATS as a float, over all parts."""
        parts = torch.stack(self.parts).double().cpu()
        column = {name: parts[:, i] for i, name in enumerate(STATS)}
        total = dict(zip(STATS, parts.sum(0).tolist(), strict=True))
        total["ratio_max"] = column["ratio_max"].max().item()
        if len(parts) == 1:
            return total
        counted = column["count"].clamp(min=1)
        for name in ("return", "old_value"):  # Chan et al. 1979: squared distances of the parts' means
            apart = column[name] / counted - total[name] / max(total["count"], 1.0)
            total[f"{name}_m2"] += (column["count"] * apart**2).sum().item()
        return total

    def means(self) -> dict[str, float]:
        """sums() per token that counts (0 where none does), ratio_max as it is, and return_var and old_value_var (unbiased)."""
        total = self.sums()
        count = total.pop("count")
        mean = {name: value / max(count, 1.0) for name, value in total.items() if not name.endswith("_m2")}
        mean["ratio_max"] = total["ratio_max"]
        for name in ("return", "old_value"):
            mean[f"{name}_var"] = total[f"{name}_m2"] / max(count - 1.0, 1.0)
        return mean


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


# --- Triton: every block writes its partial sums, the last one to finish adds them in block order ---


@triton.jit
def _load(x_ptr, inside, on):
    """What lies at x_ptr, 0 where it does not count. Not masked by `on`: a mask that varies by token makes every load 4 bytes wide."""
    return tl.where(on, tl.load(x_ptr, mask=inside, other=0.0), 0.0)


@triton.jit
def _policy_terms(log_ratio, advantage, on, low, high, dual_clip, DUAL: tl.constexpr):
    """ratio, plain and clipped surrogates, loss, d loss / d logprob, and where the dual clip holds."""
    ratio = tl.where(on, tl.exp(log_ratio), 0.0)
    clipped_ratio = tl.minimum(tl.maximum(ratio, low), high)
    plain = -advantage * ratio
    clipped = -advantage * clipped_ratio
    # a NaN must reach the loss and the gradient: by itself, tl.maximum takes the other side
    policy = tl.where(on, tl.maximum(plain, clipped, propagate_nan=tl.PropagateNan.ALL), 0.0)
    gradient = tl.where((clipped_ratio == ratio) | (plain > clipped) | (plain != plain), plain, 0.0)
    dual = on & (advantage < 0) & (policy > -advantage * dual_clip) & DUAL
    policy = tl.where(dual, -advantage * dual_clip, policy)
    return ratio, plain, clipped, policy, tl.where(on & (dual == 0), gradient, 0.0), dual


@triton.jit
def _value_terms(value, old_value, ret, cliprange_value):
    """error, clipped error, loss, d loss / d value."""
    clipped_value = tl.minimum(tl.maximum(value, old_value - cliprange_value), old_value + cliprange_value)
    error = (value - ret) * (value - ret)
    clipped_error = (clipped_value - ret) * (clipped_value - ret)
    # torch.maximum halves the gradient at a tie; inside the clip range both sides carry it.
    weight = tl.where(error > clipped_error, 1.0, tl.where(error == clipped_error, 0.5, 0.0))
    weight = tl.where(clipped_value == value, 1.0, weight)
    loss = 0.5 * tl.maximum(error, clipped_error, propagate_nan=tl.PropagateNan.ALL)
    return error, clipped_error, loss, (value - ret) * weight


@triton.jit
def _ppo_loss_kernel(
    logprobs_N, values_N, entropy_N, old_logprobs_N, old_values_N, advantages_N, returns_N, mask_N,
    grad_logprobs_N, grad_values_N, grad_entropy_N, partials_KG, ticket, whiten_2, normalizer_1, loss_1, stats_K,
    N, G, low, high, cliprange_value, vf_coef, dual_clip, entropy_coef, mean, rstd, normalizer,
    HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr, GRAD: tl.constexpr, DUAL: tl.constexpr,
    WHITEN: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """WHITEN 0: off, 1: numbers, 2: tensor. COUNT: the normalizer comes from a tensor."""
    block = tl.program_id(0)
    n = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    on = inside
    if HAS_MASK:
        on &= tl.load(mask_N + n, mask=inside, other=0) != 0
    if WHITEN == 2:
        mean = tl.load(whiten_2)
        rstd = tl.load(whiten_2 + 1)
    if COUNT:
        normalizer = tl.maximum(tl.load(normalizer_1), 1.0)
    scale = 1.0 / normalizer

    log_ratio = _load(logprobs_N + n, inside, on) - _load(old_logprobs_N + n, inside, on)
    advantage = _load(advantages_N + n, inside, on)
    if WHITEN:
        advantage = tl.where(on, (advantage - mean) * rstd, 0.0)
    ratio, plain, clipped, policy, grad_logprob, dual = _policy_terms(
        log_ratio, advantage, on, low, high, dual_clip, DUAL
    )
    value = _load(values_N + n, inside, on)
    old_value = _load(old_values_N + n, inside, on)
    ret = _load(returns_N + n, inside, on)
    error, clipped_error, value_loss, grad_value = _value_terms(value, old_value, ret, cliprange_value)
    entropy = _load(entropy_N + n, inside, on) if HAS_ENTROPY else tl.zeros([BLOCK], tl.float32)

    if GRAD:
        tl.store(grad_logprobs_N + n, grad_logprob * scale, mask=inside)
        tl.store(grad_values_N + n, grad_value * (vf_coef * scale), mask=inside)
        if HAS_ENTROPY:
            tl.store(grad_entropy_N + n, tl.where(on, -entropy_coef * scale, 0.0), mask=inside)

    count = tl.sum(on.to(tl.float32))
    return_sum, old_value_sum = tl.sum(ret), tl.sum(old_value)
    away_return = tl.where(on, ret - return_sum / tl.maximum(count, 1.0), 0.0)
    away_value = tl.where(on, old_value - old_value_sum / tl.maximum(count, 1.0), 0.0)
    tl.store(partials_KG + 0 * G + block, count)
    tl.store(partials_KG + 1 * G + block, tl.sum(policy))
    tl.store(partials_KG + 2 * G + block, tl.sum(value_loss))
    tl.store(partials_KG + 3 * G + block, tl.sum(entropy))
    tl.store(partials_KG + 4 * G + block, tl.sum((on & (clipped > plain)).to(tl.float32)))
    tl.store(partials_KG + 5 * G + block, tl.sum((on & (clipped_error > error)).to(tl.float32)))
    tl.store(partials_KG + 6 * G + block, tl.sum(dual.to(tl.float32)))
    tl.store(partials_KG + 7 * G + block, tl.sum(0.5 * log_ratio * log_ratio))
    tl.store(partials_KG + 8 * G + block, tl.sum(-log_ratio))
    tl.store(partials_KG + 9 * G + block, tl.sum(ratio))
    tl.store(partials_KG + 10 * G + block, tl.sum(advantage))
    tl.store(partials_KG + 11 * G + block, return_sum)
    tl.store(partials_KG + 12 * G + block, tl.sum(away_return * away_return))
    tl.store(partials_KG + 13 * G + block, old_value_sum)
    tl.store(partials_KG + 14 * G + block, tl.sum(away_value * away_value))
    tl.store(partials_KG + 15 * G + block, tl.sum(value))
    tl.store(partials_KG + 16 * G + block, tl.sum(error))
    tl.store(partials_KG + 17 * G + block, tl.max(ratio))
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == G - 1:
        _finish(partials_KG, loss_1, stats_K, G, vf_coef, entropy_coef, scale, BLOCK_G)
        tl.store(ticket, 0)  # ready for the next launch on this stream


@triton.jit
def _add_blocks(partials_KG, k, G, BLOCK_G: tl.constexpr):
    total = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        total += tl.load(partials_KG + k * G + g, mask=g < G, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def _add_squares(partials_KG, k, G, count, total, BLOCK_G: tl.constexpr):
    """Squared distances from the common mean (Chan et al. 1979): those from the blocks' means and of the blocks' means."""
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        n = tl.load(partials_KG + g, mask=g < G, other=0.0, cache_modifier=".cg")
        block_sum = tl.load(partials_KG + k * G + g, mask=g < G, other=0.0, cache_modifier=".cg")
        block_m2 = tl.load(partials_KG + (k + 1) * G + g, mask=g < G, other=0.0, cache_modifier=".cg")
        away = block_sum / tl.maximum(n, 1.0) - mean
        squares += block_m2 + n * away * away
    return tl.sum(squares)


@triton.jit
def _finish(partials_KG, loss_1, stats_K, G, vf_coef, entropy_coef, scale, BLOCK_G: tl.constexpr):
    for k in tl.static_range(17):
        if k != 12 and k != 14:
            tl.store(stats_K + k, _add_blocks(partials_KG, k, G, BLOCK_G))
    count = _add_blocks(partials_KG, 0, G, BLOCK_G)
    for k in tl.static_range(11, 14, 2):
        total = _add_blocks(partials_KG, k, G, BLOCK_G)
        tl.store(stats_K + k + 1, _add_squares(partials_KG, k, G, count, total, BLOCK_G))
    most = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        most = tl.maximum(most, tl.load(partials_KG + 17 * G + g, mask=g < G, other=0.0, cache_modifier=".cg"))
    tl.store(stats_K + 17, tl.max(most))
    policy = _add_blocks(partials_KG, 1, G, BLOCK_G)
    value = _add_blocks(partials_KG, 2, G, BLOCK_G)
    entropy = _add_blocks(partials_KG, 3, G, BLOCK_G)
    tl.store(loss_1, (policy + vf_coef * value - entropy_coef * entropy) * scale)


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
    _ppo_loss_kernel[(G,)](
        logprobs_N, values_N, entropy_N, *batch[:4], mask_N, *grads, partials_KG, tickets(device),
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


@functools.cache
def _ticket(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def tickets(device: torch.device) -> torch.Tensor:
    """The counter by which a launch's last block knows itself; zero between launches, one per device and stream."""
    return _ticket(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


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
