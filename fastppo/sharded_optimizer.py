"""An optimizer's state with whole tensors, saved and loaded whatever way its parameters are sharded."""

from typing import Any

import torch

from fastppo.distributed import full_tensor


def save(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """optimizer.state_dict() with whole tensors; every process must call it."""
    saved = optimizer.state_dict()
    whole_states = {
        key: {name: full_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in state.items()}
        for key, state in saved["state"].items()
    }
    return saved | {"state": whole_states}


def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """What save returned, laid out as the parameters are now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        key: {
            name: shard_like(x, parameters[key]) if isinstance(x, torch.Tensor) and x.dim() else x
            for name, x in state.items()
        }
        for key, state in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": states})


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` (whole, the same everywhere) laid out as `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
