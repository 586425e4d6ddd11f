"""Memory for an op's outputs that is used again once nobody holds them.

Fresh memory of a few MB costs a page fault per 4 KB the first time it is written, and malloc gives memory of that size back
to the system when it is freed: in an op that takes 0.3 ms the faults cost more than the arithmetic, and on 100 MB they take
30 ms of two cores.
"""

import math
import mmap
import sys
from collections.abc import Callable

import numpy
import torch

from fastppo.kernels._backend import extension

WORTH_IT, MOST = 1 << 18, 1 << 25  # bytes: below, malloc keeps the memory; above, it is too much to hold on to
GRADIENT = 1 << 28  # bytes: MOST for a gradient of the logits or of the output embedding, which every step makes anew

# memory that the stages of a PPO step on a CPU have one after the other, by what is in it while decoding and while learning
WEIGHTS_OR_GRADIENTS, PAGES_OR_ACTIVATIONS, SCRATCH = (
    "packed weights or gradients",
    "KV pages or activations",
    "scratch",
)
OF_STAGE = 1 << 30  # bytes: MOST for these; what is larger is the system's again after its stage

_kept: dict[str, numpy.ndarray] = {}  # at most one buffer for each op
_FREE = 2  # what sys.getrefcount says of an array that one local name holds


def empty(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, most: int = MOST) -> torch.Tensor:
    """An uninitialised CPU tensor; `op`'s last one again if it has room and no tensor, view or array refers to it.

    most: bytes that `op` may hold on to; a larger tensor is fresh memory and is given back when it is freed.
    """
    return _empty(op, shape, dtype, most, _from_malloc)


def _from_malloc(count: int) -> numpy.ndarray:
    return torch.empty(count, dtype=torch.uint8).numpy()


def _from_the_system(count: int) -> numpy.ndarray:
    """Memory that is the system's again at once when it is freed, where malloc may keep it. A quarter more than `count`: what nobody
    writes to takes no memory, and the next micro-batch may be longer."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return numpy.frombuffer(mmap.mmap(-1, count + count // 4, **private), dtype=numpy.uint8)
    except OSError as error:
        raise MemoryError(f"{count} bytes for a stage of a PPO step") from error


def _empty(op, shape, dtype, most, make: Callable[[int], numpy.ndarray]) -> torch.Tensor:
    bytes_needed = math.prod(shape) * dtype.itemsize
    if not WORTH_IT <= bytes_needed <= most:
        return torch.empty(shape, dtype=dtype)
    buffer = _kept.pop(op, None)  # taken out first: another thread must not find it
    if buffer is None or buffer.size < bytes_needed or sys.getrefcount(buffer) > _FREE:
        buffer = None  # freed before the larger one is made
        buffer = make(bytes_needed)
    # refers to the array as long as a view of it lives
    tensor = torch.from_numpy(buffer)[:bytes_needed].view(dtype).view(shape)
    _kept[op] = buffer
    return tensor


def of_stage(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """empty() for one of the three names above; in large pages where the system has them, which costs a fifth of the small ones' faults."""
    x = _empty(name, shape, dtype, OF_STAGE, _from_the_system)
    module = extension()
    if not isinstance(module, str):
        module.ask_for_huge_pages(x.data_ptr(), x.nbytes)
    return x


def release_over(name: str, most: int) -> None:
    """Give back what waits for `name` if it is larger than `most` bytes."""
    buffer = _kept.get(name)
    if buffer is not None and buffer.size > most:
        _kept.pop(name, None)


def release(op: str | None = None) -> None:
    """Give back what no tensor holds, of one op or of all; the next calls start with fresh memory."""
    if op is None:
        _kept.clear()
    else:
        _kept.pop(op, None)
