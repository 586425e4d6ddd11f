"""triton and triton.language for the kernel files, or stand-ins that let them be imported where there is no triton.

    from fastppo.kernels._triton import INTERPRET, tl, triton

A stand-in takes every decorator, annotation and attribute, and raises ImportError only when a kernel is launched.
INTERPRET is a constexpr for use inside kernels: the interpreter stores bf16 as uint16, so arithmetic and tl.dot on
bf16 are silently wrong there; a kernel casts to float32 first (`if INTERPRET:` where a GPU should keep bf16).
"""

import os

try:
    import triton
    import triton.language as tl
except ImportError as error:

    class _StandIn:
        """Anything of triton's, named or called; a launch says what is missing."""

        def __init__(self, why: str):
            self._why = why

        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args, **kwargs):
            return self

        def __getitem__(self, grid):
            raise ImportError(f"a Triton kernel was launched, but triton does not import: {self._why}")

    triton = tl = _StandIn(str(error))

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
