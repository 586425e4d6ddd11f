"""Mean and standard deviation of a stream of batches, over all processes."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING

import torch

from fastppo import distributed

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass
class RunningMoments:
    """Running mean and variance by Chan's parallel update.

    With old (n_a, mean_a, var_a), batch (n_b, mean_b, var_b), both variances biased, n = n_a + n_b, d = mean_b - mean_a:
        mean = mean_a + d * n_b / n
        var  = (n_a * var_a + n_b * var_b + d**2 * n_a * n_b / n) / n
    Chan, Golub, LeVeque: "Algorithms for computing the sample variance" (1983), equation 2.1.

    mean: of everything seen. std: its unbiased standard deviation (n - 1). var: the biased variance. count: elements seen.
    One element has no standard deviation: std then keeps its start value and update returns nan for the batch.
    """

    accelerator: "Accelerator"
    mean: float = 0
    std: float = 1
    var: float = 1
    count: float = 1e-24

    @torch.no_grad()
    def update(self, xs: torch.Tensor) -> tuple[float, float]:
        """Take in a batch of any shape; returns the batch's mean and unbiased standard deviation over all processes."""
        batch_count, batch_mean, batch_var = self._batch_moments(xs)
        total = self.count + batch_count
        delta = batch_mean - self.mean
        squares = self.count * self.var + batch_count * batch_var + delta**2 * self.count * batch_count / total
        self.mean += delta * batch_count / total
        self.var = squares / total
        if total > 1:
            self.std = math.sqrt(squares / (total - 1))
        self.count = total
        batch_std = math.sqrt(batch_var * batch_count / (batch_count - 1)) if batch_count > 1 else math.nan
        return batch_mean, batch_std

    def _batch_moments(self, xs: torch.Tensor) -> tuple[float, float, float]:
        """Element count, mean and biased variance over all processes."""
        xs = xs.detach()
        # MPS has no float64
        xs = xs.to(torch.float32 if xs.device.type == "mps" else torch.float64)
        count, total = self._sum_over_processes(torch.stack([xs.new_tensor(xs.numel()), xs.sum()]))
        if count == 0:
            raise ValueError("RunningMoments.update: xs has no element; hand over at least one score")
        mean = total / count
        (squares,) = self._sum_over_processes(((xs - mean) ** 2).sum()[None])
        return count, mean, squares / count

    def _sum_over_processes(self, sums: torch.Tensor) -> list[float]:
        if self.accelerator is not None and self.accelerator.use_distributed:
            sums = distributed.total(self.accelerator, sums)
        return sums.tolist()

    def save_to_json(self, json_path: str) -> None:
        """Everything but the accelerator."""
        state = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "accelerator"
        }
        with open(json_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(state, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load_from_json(cls, accelerator: "Accelerator", json_path: str) -> "RunningMoments":
        with open(json_path, encoding="utf-8") as file:
            return cls(accelerator=accelerator, **json.load(file))
