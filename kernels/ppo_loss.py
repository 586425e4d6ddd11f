"""PPO's clipped policy loss and clipped value loss, their statistics and their gradients, in one pass.

    d       = logprob - old_logprob            r = exp(d)            A = advantage, or (advantage - mean) * rstd
    policy  = max(-A r, -A clip(r, 1 - c, 1 + c))                    (dual clip: at most -A * dual_clip where A < 0)
    value   = 0.5 max((v - R)^2, (clip(v, v_old - c_v, v_old + c_v) - R)^2)
    loss    = sum over mask of (policy + vf_coef value - entropy_coef entropy) / normalizer

Suffix: N tokens (any shape; all tensors alike). mask_N is True where a token counts; what stands at a False token,
NaN included, has no effect and gets gradient zero. Bound by memory: 25 bytes read and 8 written per token.
PPO: Schulman et al. 2017, equation 7; dual clip: Ye et al. 2020, equation 5.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


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
        total = {name: values.sum().item() for name, values in column.items()}
        total["ratio_max"] = column["ratio_max"].max().item()
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
    clipped_error_N = (torch.minimum(torch.maximum(values_N, low_N), high_N) - returns_N) ** 2
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


BACKEND_TABLE = {"reference": ppo_loss_reference}


def ppo_loss(
    logprobs_N, values_N, batch, options, *, entropy_N=None, normalizer=None, whiten=None, backend=None
) -> PPOLoss:
    return ppo_loss_reference(
        logprobs_N, values_N, batch, options, entropy_N=entropy_N, normalizer=normalizer, whiten=whiten
    )
