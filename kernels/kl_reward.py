"""kl_reward: per-token KL estimate between policy and reference, and the reward made of it.

    d = logprob - ref_logprob      kl: d    abs: |d|    mse: d^2 / 2    k1: d    k2: d^2 / 2    k3: exp(-d) - 1 + d
    full: sum over the vocabulary of p (log p - log q), given as full_kl_BT
    reward = -kl_coef * KL, plus the sequence's score on the last token of the row that counts

Suffixes: B sequences, T tokens, V vocabulary. mask_BT is True where a token counts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("kl", "abs", "mse", "k1", "k2", "k3", "full")


class KLReward(NamedTuple):
    rewards_BT: Tensor  # non_score_BT, with the score on the last token that counts
    non_score_BT: Tensor  # -kl_coef * kl_BT
    kl_BT: Tensor  # not masked


def kl_reward_reference(
    logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, *, kl_coef: float, kind: str = "kl", full_kl_BT=None
) -> KLReward:
    difference_BT = logprobs_BT - ref_logprobs_BT
    kl_BT = {
        "kl": lambda: difference_BT,
        "abs": lambda: difference_BT.abs(),
        "mse": lambda: 0.5 * difference_BT**2,
        "k1": lambda: difference_BT,
        "k2": lambda: 0.5 * difference_BT**2,
        "k3": lambda: torch.expm1(-difference_BT) + difference_BT,
        "full": lambda: full_kl_BT,
    }[kind]()
    non_score_BT = -kl_coef * kl_BT
    columns_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B1 = torch.where(mask_BT, columns_T, -1).max(1, keepdim=True).values
    rewards_BT = non_score_BT + torch.where(columns_T == last_B1, scores_B[:, None], 0.0)
    return KLReward(rewards_BT, non_score_BT, kl_BT)


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the last axis, in nats; log-probs will do for logits."""
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


BACKEND_TABLE = {"reference": kl_reward_reference}


def kl_reward(
    logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, *, kl_coef, kind="kl", full_kl_BT=None, backend=None
) -> KLReward:
    """Rewards of a batch; kind is one of KINDS, full_kl_BT is for kind "full". Raises ValueError for another kind."""
    if kind not in KINDS:
        raise ValueError(f"kl_reward: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return kl_reward_reference(
        logprobs_BT, ref_logprobs_BT, mask_BT, scores_B, kl_coef=kl_coef, kind=kind, full_kl_BT=full_kl_BT
    )
