"""Memory for KV pages. On a CPU a rollout's pages are kept for the next one: fresh memory costs more than what is written there."""

import torch

from fastppo.kernels import _recycle
from fastppo.kernels._backend import extension, missing

MOST = 1 << 30  # bytes of pages that are kept; more than that is the system's again after a rollout


def zeros(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n] zeros; on a CPU in large pages where the system has them, which costs a fifth of the small ones' faults."""
    if device.type != "cpu" or missing("cpu", device) is not None:
        return torch.zeros(n, dtype=dtype, device=device)
    x = _recycle.empty(_name(dtype), (n,), dtype, MOST)
    extension().ask_for_huge_pages(x.data_ptr(), x.nbytes)
    return x.zero_()


def _name(dtype: torch.dtype) -> str:
    return f"KV pages, {dtype}"


def give_back_pages() -> None:
    """Free the pages that wait for the next rollout."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _recycle.release(_name(dtype))
