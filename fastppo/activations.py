"""GELU in one pass for models that spell it out.

transformers' NewGELUActivation (GPT-2, GPT-J, ...) is 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in eight
elementwise kernels, and more in the backward pass: a fifth of a small GPT-2's training step on a CPU. torch's tanh GELU
is the same function in one.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import nn

_gelu = partial(F.gelu, approximate="tanh")


@contextlib.contextmanager
def fused_gelu(model: nn.Module) -> Iterator[None]:
    """`model` computes its tanh GELUs in one kernel inside the block; subclasses and patched modules are left alone."""
    from transformers.activations import NewGELUActivation

    found = [m for m in model.modules() if type(m) is NewGELUActivation and "forward" not in m.__dict__]
    for module in found:
        module.forward = _gelu
    try:
        yield
    finally:
        for module in found:
            del module.forward
