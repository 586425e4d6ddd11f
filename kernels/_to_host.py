"""Numbers on their way from the GPU to the host, so that launches can go on while they travel."""

import torch


class ToHost:
    """Start copying the small integer tensor `x`; read() waits for this copy only, not for what was launched after it.

    Everything that makes the host wait for a GPU inside the kernel rooms goes through read(), nonzero() or check=True;
    tests/test_host_waits.py holds the rooms to that.
    """

    def __init__(self, x: torch.Tensor):
        self._x, self._ready = x, None
        if x.is_cuda:
            self._x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(x.device))

    def read(self) -> list[int]:
        if self._ready is not None:
            self._ready.synchronize()
        return self._x.tolist()
