"""Gradients of many parameters side by side in one buffer: processes add them up in one reduction, as they lie.

The engine writes into the buffer; what autograd made elsewhere (a value head's) is copied to its place.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastppo.kernels import _recycle

Neighbours = Sequence[Sequence[nn.Parameter | None]]
ALIGNED = 16  # numbers between two starts: a cache line of float32


class FlatGradients:
    """whole: the buffer.   views: each parameter's part of it."""

    def __init__(self, parameters: Iterable[nn.Parameter], neighbours: Neighbours = (), zeros: bool = True):
        """parameters: what is trained, of one dtype on one device, in the same order on all processes.

        neighbours: parameters whose gradients are written as one matrix; they lie without a gap where alignment has none.
        zeros: whether the buffer begins as zeros; without, its gaps and what nobody writes are undefined.
        """
        wanted = dict.fromkeys(parameters)
        first = [p for group in neighbours for p in group if p in wanted]
        order = list(dict.fromkeys([*first, *wanted]))
        starts, end = [], 0
        for parameter in order:
            starts.append(end)
            end += -(-parameter.numel() // ALIGNED) * ALIGNED
        self.whole = _memory(end, order[0])
        if zeros:
            self.whole.zero_()
        self.views: dict[nn.Parameter, Tensor] = {
            p: self.whole[start : start + p.numel()].view(p.shape) for p, start in zip(order, starts, strict=True)
        }

    def matrix(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """[rows of all, ...] over the parts of these parameters; None unless they lie one below the other."""
        parts = [self.views.get(p) for p in parameters]
        if any(part is None for part in parts):
            return None
        start = end = parts[0].storage_offset()
        for part in parts:
            if part.storage_offset() != end or part.shape[1:] != parts[0].shape[1:]:
                return None
            end += part.numel()
        return self.whole[start:end].view(-1, *parts[0].shape[1:])

    def take(self) -> None:
        """Every .grad is its part of the buffer: copied where it was elsewhere, zeros where there was none."""
        for parameter, view in self.views.items():
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                view.copy_(parameter.grad)
            parameter.grad = view


def _memory(count: int, like: Tensor) -> Tensor:
    """[count], uninitialised; on a CPU where packed weights of a rollout may have been."""
    if like.device.type != "cpu":
        return torch.empty(count, dtype=like.dtype, device=like.device)
    return _recycle.of_stage(_recycle.WEIGHTS_OR_GRADIENTS, (count,), like.dtype)


def for_one_stage(parameters: Iterable[Tensor | None], neighbours: Neighbours) -> FlatGradients | None:
    """FlatGradients of those that are trained; None where none is, or where they are of several kinds."""
    trained = [p for p in parameters if isinstance(p, nn.Parameter) and p.requires_grad]
    kinds = {(p.dtype, p.device) for p in trained}
    return FlatGradients(trained, neighbours, zeros=False) if len(kinds) == 1 else None
