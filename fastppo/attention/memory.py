"""Memory for KV pages. On a CPU a rollout's pages are kept for the next stage: fresh memory costs more than what is written there."""

import torch

from fastppo.kernels import _recycle
from fastppo.kernels._backend import missing


def zeros(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n] zeros."""
    if device.type != "cpu" or missing("cpu", device) is not None:
        return torch.zeros(n, dtype=dtype, device=device)
    return _recycle.of_stage(_recycle.PAGES_OR_ACTIVATIONS, (n,), dtype).zero_()
