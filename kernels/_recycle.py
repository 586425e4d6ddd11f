"""Memory for an op's outputs that is used again once nobody holds them.

Fresh memory of a few MB costs a page fault per 4 KB the first time it is written, and malloc gives memory of that size back
to the system when it is freed: in an op that takes 0.3 ms the faults cost more than the arithmetic, and on 100 MB they take
30 ms of two cores.
"""

import math
import sys

import numpy
import torch

WORTH_IT, MOST = 1 << 18, 1 << 25  # bytes: below, malloc keeps the memory; above, it is too much to hold on to
GRADIENT = 1 << 28  # bytes: MOST for a gradient of the logits or of the output embedding, which every step makes anew

_kept: dict[str, numpy.ndarray] = {}  # at most one buffer for each op
_FREE = 2  # what sys.getrefcount says of an array that one local name holds


def empty(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, most: int = MOST) -> torch.Tensor:
    """An uninitialised CPU tensor; `op`'s last one again if it has room and no tensor, view or array refers to it.

    most: bytes that `op` may hold on to; a larger tensor is fresh memory and is given back when it is freed.
    """
    bytes_needed = math.prod(shape) * dtype.itemsize
    if not WORTH_IT <= bytes_needed <= most:
        return torch.empty(shape, dtype=dtype)
    buffer = _kept.pop(op, None)  # taken out first: another thread must not find it
    if buffer is None or buffer.size < bytes_needed or sys.getrefcount(buffer) > _FREE:
        buffer = torch.empty(bytes_needed, dtype=torch.uint8).numpy()
    tensor = (
        torch.from_numpy(buffer)[:bytes_needed].view(dtype).view(shape)
    )  # refers to the array as long as a view of it lives
    _kept[op] = buffer
    return tensor


def release(op: str | None = None) -> None:
    """Give back what no tensor holds, of one op or of all; the next calls start with fresh memory."""
    if op is None:
        _kept.clear()
    else:
        _kept.pop(op, None)
