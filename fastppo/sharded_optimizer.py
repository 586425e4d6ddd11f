"""An optimizer's state for a checkpoint, saved and loaded whatever way its parameters are sharded.

DDP and FSDP2: whole tensors. DeepSpeed ZeRO: every process's part, in fastppo/zero.py.
"""

from typing import TYPE_CHECKING, Any

import torch

from fastppo import checkpoint as ckpt
from fastppo import distributed, zero

if TYPE_CHECKING:
    from accelerate import Accelerator


def save(accelerator: "Accelerator", optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Any]:
    """(tensors, JSON values) for load; every process must call it."""
    if zero.engine_of(accelerator):
        return zero.save_optimizer(accelerator)
    tensors, values = ckpt.split_tensors(optimizer.state_dict())
    return distributed.whole_tensors(accelerator, None, lambda: tensors), values


def load(
    accelerator: "Accelerator", optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], values: Any
) -> None:
    """What save returned and state_checks.check_optimizer has checked, laid out as the parameters are now."""
    if zero.engine_of(accelerator):
        zero.load_optimizer(accelerator, tensors, values)
        return
    saved = ckpt.join_tensors(tensors, values)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def laid_out(x: Any, like: torch.Tensor) -> Any:
        return shard_like(x, like) if isinstance(x, torch.Tensor) and x.shape == like.shape else x

    states = {
        key: {name: laid_out(x, parameters[key]) for name, x in state.items()} for key, state in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": states})


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` (whole, the same everywhere) laid out as `like`."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
