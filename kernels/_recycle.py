"""Memory for an op's outputs that is used again once nobody holds them.

Fresh memory of a few MB costs a page fault per 4 KB the first time it is written, and malloc gives memory of that size back
to the system when it is freed: in an op that takes 0.3 ms the faults cost more than the arithmetic.
"""

import math
import sys

import numpy
import torch

WORTH_IT, MOST = 1 << 18, 1 << 25  # bytes: below, malloc keeps the memory; above, it is too much to hold on to

_kept: dict[str, numpy.ndarray] = {}  # at most one buffer for each op
_FREE = 2  # what sys.getrefcount says of an array that one local name holds


def empty(op: str, shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised float32 CPU tensor; `op`'s last one of this size again if no tensor, view or array refers to it."""
    count = math.prod(shape)
    if not WORTH_IT <= 4 * count <= MOST:
        return torch.empty(shape, dtype=torch.float32)
    buffer = _kept.pop(op, None)  # taken out first: another thread must not find it
    if buffer is None or buffer.size != count or sys.getrefcount(buffer) > _FREE:
        buffer = torch.empty(count, dtype=torch.float32).numpy()
    tensor = torch.from_numpy(buffer).view(shape)  # refers to the array as long as any view of it lives
    _kept[op] = buffer
    return tensor
