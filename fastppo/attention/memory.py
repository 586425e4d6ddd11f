"""Memory for KV pages."""

import torch

from fastppo.kernels._backend import extension, missing


def zeros(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n] zeros; on a CPU in large pages where the system has them, which costs a fifth of the small ones' faults."""
    x = torch.empty(n, dtype=dtype, device=device)
    if x.device.type == "cpu" and missing("cpu", x.device) is None:
        extension().ask_for_huge_pages(x.data_ptr(), x.nbytes)
    return x.zero_()
