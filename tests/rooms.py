"""What the tests of the small rooms share: the error rule, masks worth trying, TRL's recorded numbers."""

import json
import os
from pathlib import Path

import torch
from hypothesis import strategies as st


def assert_as_exact_as_torch(name, ours, plain, truth, factor=2.0, tiny=1e-6):
    """error <= factor * plain torch's error + tiny * (largest magnitude of the truth, at least 1)."""
    error = (ours.double().cpu() - truth.cpu()).abs().max().item() if truth.numel() else 0.0
    plain_error = (plain.double().cpu() - truth.cpu()).abs().max().item() if truth.numel() else 0.0
    allowed = factor * plain_error + tiny * max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
    assert error <= allowed, f"{name}: error {error:.3e}, plain torch in float32 makes {plain_error:.3e}"


MASKS = ("full", "lengths", "holes", "empty rows", "none", "left padded")


def make_mask(kind: str, B: int, T: int, generator: torch.Generator) -> torch.Tensor:
    lengths_B1 = torch.randint(0, T + 1, (B, 1), generator=generator)
    t_T = torch.arange(T)
    return {
        "full": torch.ones(B, T, dtype=torch.bool),
        "lengths": t_T < lengths_B1,
        "holes": torch.rand(B, T, generator=generator) < 0.6,
        "empty rows": (torch.arange(B)[:, None] % 2 == 1) & (t_T < lengths_B1),
        "none": torch.zeros(B, T, dtype=torch.bool),
        "left padded": t_T >= T - lengths_B1,
    }[kind]


# one token; a tail below and across 16 lanes; a block of 1024 less, exactly, and one more
SIZES = [1, 2, 15, 16, 17, 37, 255, 1000, 1024, 1025]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:  # it scans one element at a time; the tests with sizes of their own still cross its blocks
    SIZES = [1, 2, 15, 17, 37, 130]


def examples(n: int) -> int:
    """How many examples hypothesis tries: few in Triton's interpreter, whose kernels take a millisecond a line."""
    return 8 if INTERPRET else n


sizes = st.sampled_from(SIZES)
masks = st.sampled_from(MASKS)


def trl_numbers() -> dict:
    """TRL 0.11.4's compute_rewards, compute_advantages and loss on one random batch, recorded from the package itself."""
    return json.loads((Path(__file__).parent / "fixtures" / "trl_0114_rooms.json").read_text())
