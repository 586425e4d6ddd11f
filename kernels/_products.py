"""Matrix products of training, without autograd: torch.mm and addmm, on AMX tiles where they are faster (csrc/cpu/products.cpp).

There a float is the sum of three bfloat16 numbers and six of their nine products are added up, in float32: errors are at most
those of torch's float32 product. An infinite factor gives NaN where torch gives infinity or NaN; numbers below 1e-38 count as
0, and float32 numbers below 1e-33 with fewer bits. A row of the result does not depend on the other rows, in any bit.
FASTPPO_AMX=0 in the environment leaves everything to torch.
"""

import functools

import torch
from torch import Tensor

from fastppo.kernels._backend import extension

# Measured with 2 threads: fewer rows or values of k, or fewer multiplications, are faster by torch.
LEAST_ROWS, LEAST_DEPTH, LEAST_WORK = 24, 48, {torch.float32: 1 << 21, torch.bfloat16: 1 << 16}
MOST_HALF_DEPTH = 1 << 13  # k of bfloat16 factors: the output embedding's 50,257 are read too slowly (0.6 of torch)


@functools.cache
def _amx():
    """The extension's product, or None where there are no tiles to run it."""
    module = extension()
    return None if isinstance(module, str) or not module.amx_works() else module.product


def mm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, bias: Tensor | None = None, add: bool = False) -> Tensor:
    """a b (+ bias [N]) into `out` [M, N], which is made where it is None; add: added to what is in `out`.

    a and b: of one dtype on one device. out: of that dtype, or float32 for bfloat16 factors, whose sums are then not rounded.
    bias: of a's dtype or float32. Which product runs depends on sizes, dtypes and strides, never on values.
    """
    M, K = a_MK.shape
    N = b_KN.shape[1]
    if out is None:
        out = a_MK.new_empty(M, N)
    if not faster(M, N, K, a_MK.dtype) or not on_tiles(a_MK, b_KN, out, bias, add):
        by_torch(a_MK, b_KN, out, bias, add)
    return out


def faster(M: int, N: int, K: int, dtype: torch.dtype) -> bool:
    """Whether tiles multiply sooner than torch."""
    if dtype == torch.bfloat16 and K > MOST_HALF_DEPTH:
        return False
    return M >= LEAST_ROWS and K >= LEAST_DEPTH and LEAST_WORK.get(dtype, M * N * K + 1) <= M * N * K


def on_tiles(a_MK: Tensor, b_KN: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> bool:
    """mm() on AMX tiles; False, and nothing done, where it can't be."""
    product = _amx()
    if product is None or not a_MK.is_cpu:
        return False
    (M, K), (a_row, a_column) = a_MK.shape, a_MK.stride()
    N, (b_row, b_column) = b_KN.shape[1], b_KN.stride()
    half, out_half = a_MK.dtype == torch.bfloat16, out.dtype == torch.bfloat16
    a_along, b_along = a_column == 1 or K == 1, not (b_column == 1 or N == 1)
    ours = (
        min(M, N, K) > 0
        and b_KN.shape[0] == K
        and a_MK.dtype == b_KN.dtype
        and a_MK.dtype in LEAST_WORK
        and (out.dtype == torch.float32 or out_half and half)
        and (a_along or a_row == 1 or M == 1)
        and (not b_along or b_row == 1 or K == 1)
        and out.shape == (M, N)
        and (out.stride(1) == 1 or N == 1)
    )
    if not ours or bias is not None and (bias.shape != (N,) or bias.stride(0) != 1 and N > 1):
        return False
    bias_half = bias is not None and bias.dtype == torch.bfloat16
    if bias is not None and not bias_half and bias.dtype != torch.float32:
        return False
    product(
        (a_MK.data_ptr(), b_KN.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr()),
        (M, N, K, a_row if a_along else a_column, b_column if b_along else b_row, out.stride(0)),
        a_along | b_along << 1 | half << 2 | out_half << 3 | bias_half << 4 | add << 5,
    )
    return True


def by_torch(a_MK: Tensor, b_KN: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """mm() by torch's products."""
    if out.dtype == a_MK.dtype and (bias is None or not add and bias.dtype == out.dtype):
        if add:
            out.addmm_(a_MK, b_KN)
        elif bias is None:
            torch.mm(a_MK, b_KN, out=out)
        else:
            torch.addmm(bias, a_MK, b_KN, out=out)
        return
    made = torch.mm(a_MK, b_KN)
    if add:
        out.add_(made)
    else:
        out.copy_(made)
    if bias is not None:
        out.add_(bias)
