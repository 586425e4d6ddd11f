"""The statistics that ppo_loss and linear_ppo_loss return, and how those of several micro-batches become one."""

from dataclasses import dataclass

import torch

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
