"""What the tests of the rooms over logits share: the error rule, awkward logits and awkward memory."""

import os

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_as_exact_as_torch(name: str, ours, plain, truth, tiny: float = 1e-6, floor: float = 2e-7) -> None:
    """error <= 2 * the error of plain PyTorch in the same dtype + tiny * the largest magnitude in the truth + floor.

    The floor is rounding near 1, which decides where the truth is exactly 0 (one token with all the probability).
    NaN and infinities must stand in the same places.
    """
    ours, plain, truth = (x.detach().double().cpu() for x in (ours, plain, truth))
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: finite where the truth is not, or the reverse"
    if not finite.any():
        return
    ours, plain, truth = (x[finite] for x in (ours, plain, truth))
    error, plain_error = (ours - truth).abs().max().item(), (plain - truth).abs().max().item()
    allowed = 2 * plain_error + tiny * truth.abs().max().item() + floor
    assert error <= allowed, f"{name}: error {error:.3e}, plain torch in the same dtype makes {plain_error:.3e}"


def tiny_of(dtype: torch.dtype) -> float:
    """Slack for one more rounding to `dtype` than plain torch makes; Triton's interpreter cuts bits off instead."""
    if dtype == torch.float32:
        return 1e-6
    return torch.finfo(dtype).eps * (1.0 if os.environ.get("TRITON_INTERPRET") == "1" else 0.5)


def far_apart(values_NV: torch.Tensor, step: int = 2**30) -> torch.Tensor:
    """The same three rows, `step` elements apart: the last begins past 2^31 elements. Untouched pages cost nothing."""
    (N, V), kind = values_NV.shape, values_NV.dtype
    try:
        storage = torch.empty((N - 1) * step + V, dtype=kind, device=values_NV.device)
    except RuntimeError as error:
        pytest.skip(f"{(N - 1) * step * kind.itemsize >> 30} GB of address space: {error}")
    assert (N - 1) * step >= 2**31
    return storage.as_strided((N, V), (step, 1)).copy_(values_NV)


def off_by_8_bytes(x: torch.Tensor) -> torch.Tensor:
    """The same int64 numbers at an address that no 16-byte load may use: labels[1:] of a tensor of labels."""
    view = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    assert view.data_ptr() % 16 == 8
    return view


def strided(x_ND: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, laid out in another way."""
    if layout == "columns first":
        return x_ND.t().contiguous().t()
    if layout == "every other column":
        return x_ND.repeat_interleave(2, 1)[:, ::2]
    return torch.cat([x_ND, x_ND], 1)[:, : x_ND.shape[1]] if layout == "wider rows" else x_ND


def as_laid_out(x: torch.Tensor, *dtypes: torch.dtype) -> torch.Tensor:
    """A fresh copy converted to one dtype after the other, with x's own strides: clone and to would close the gaps."""
    made = x.detach()
    for dtype in dtypes:
        made = made.to(dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=made.dtype, device=x.device).copy_(made)


# name -> what to do to random logits [N, V]
TRAPS = {
    "plain": lambda z_NV: z_NV,
    "all negative": lambda z_NV: z_NV - 1000.0,  # a maximum that starts at 0 underflows
    "huge": lambda z_NV: z_NV.clamp(-6, 6) * 1e4,  # within float16
    "equal": lambda z_NV: torch.zeros_like(z_NV),
    "bans": lambda z_NV: z_NV.masked_fill(torch.arange(z_NV.shape[-1]) % 3 == 2, -torch.inf),  # 0 * -inf is NaN
    "one left": lambda z_NV: z_NV.masked_fill(torch.arange(z_NV.shape[-1]) > 0, -torch.inf),
    "late": lambda z_NV: z_NV.masked_fill(torch.arange(z_NV.shape[-1]) < z_NV.shape[-1] - 1, -torch.inf),
}

# name -> (bias [V] that brings the trap into a head's logits, a token that it leaves possible)
BIAS_TRAPS = {
    "all negative": (lambda V: torch.full((V,), -100.0), 4),  # e^-100 is below float32's normal numbers
    **{
        name: (lambda V, trap=TRAPS[name]: trap(torch.zeros(V)), at)
        for name, at in (("bans", 3), ("one left", 0), ("late", -1))
    },
}
