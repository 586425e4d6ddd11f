"""Find what would make the host wait for a GPU, without a GPU: run a GPU path on CPU tensors under NoWaits.

NoWaits raises on every tensor operation whose result the host must see: item, bool(), tolist, nonzero, masks as indices, ...
`Nowhere` stands in for a Triton kernel or for the extension's module: it takes every launch and does nothing.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
OPS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "allclose", "_unique2", "unique_dim"),
    *("bincount", "argwhere", "unique_consecutive", "histc"),
}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class HostWait(AssertionError):
    """The host would wait here."""


def _waits(name: str, args, kwargs) -> bool:
    if name in OPS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and not (len(args) > 1 and isinstance(args[1], int))
    if name in BY_MASK and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        return name in ("index", "_unsafe_index") or args[2].numel() != 1  # one value by mask is a masked_fill
    return False


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            raise HostWait(f"Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if _waits(name, args, kwargs or {}):
            raise HostWait(str(func))
        return func(*args, **(kwargs or {}))


class NoWaits:
    """with NoWaits(): ..."""

    def __enter__(self):
        self._modes = (_Methods(), _Ops())
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class Nowhere:
    """A kernel or an extension module whose launches go nowhere; `launches` counts them, `grids` are Triton's."""

    def __init__(self):
        self.launches, self.grids = 0, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self._launch

    def __getattr__(self, name):
        return self._launch

    def _launch(self, *args, **kwargs):
        self.launches += 1
