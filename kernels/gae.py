"""gae: generalized advantage estimation over the tokens of each row, from the last to the first.

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        return_t = A_t + V_t

masked "zero": a masked token is a state of value 0 and reward 0 that the scan passes through.
masked "stop": the scan starts anew after a masked token.   masked "carry": masked tokens are left out of the row.
Suffixes: B sequences, T tokens. mask_BT is True where a token counts. Schulman et al. 2015, equation 16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASKED = ("zero", "stop", "carry")


class GAE(NamedTuple):
    advantages_BT: Tensor
    returns_BT: Tensor
    sums: Tensor  # float64 [3]: count, sum and sum of squares of the advantages over the mask


def gae_reference(rewards_BT, values_BT, mask_BT, *, gamma: float, lam: float, masked: str = "zero") -> GAE:
    rewards_BT, values_BT = rewards_BT * mask_BT, values_BT * mask_BT
    advantages = []
    carried_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        counts_B = mask_BT[:, t]
        advantage_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t] + gamma * lam * carried_B
        if masked != "zero":
            advantage_B = advantage_B * counts_B
        advantages.append(advantage_B)
        if masked == "carry":
            carried_B = torch.where(counts_B, advantage_B, carried_B)
            next_value_B = torch.where(counts_B, values_BT[:, t], next_value_B)
        else:
            carried_B, next_value_B = advantage_B, values_BT[:, t]
    advantages_BT = torch.stack(advantages[::-1], 1)
    counted = advantages_BT[mask_BT].double()
    sums = torch.stack([counted.new_tensor(counted.numel()), counted.sum(), (counted**2).sum()])
    return GAE(advantages_BT, advantages_BT + values_BT, sums)


BACKEND_TABLE = {"reference": gae_reference}


def gae(rewards_BT, values_BT, mask_BT, *, gamma, lam, masked="zero", backend=None) -> GAE:
    """Advantages and returns; raises ValueError when `masked` is none of MASKED."""
    if masked not in MASKED:
        raise ValueError(f"gae: masked must be one of {', '.join(MASKED)}; got {masked!r}")
    return gae_reference(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, masked=masked)
