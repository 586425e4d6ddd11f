"""The generate stage: prompts -> Rollout, with the policy's own parameters."""

from typing import Any

import torch

from fastppo.data import Rollout
from fastppo.generation import Generator


def decode_options(mixed_precision: str) -> dict[str, Any]:
    """For a Generator beside training in accelerate's `mixed_precision`: it reads weights in what the training pass computes in.

    With "bf16" that halves what a decode step on a CPU reads; the log-probs of rollout and training stay as close as they
    were, since the training pass rounds the same weights.
    """
    return {"decode_weights": torch.bfloat16} if mixed_precision == "bf16" else {}


def rollout(generator: Generator, prompts: list[torch.Tensor], **generation_kwargs) -> Rollout:
    """Sample responses to `prompts` (1-D int64 tensors); the arguments are those of Generator.generate."""
    return generator.generate(prompts, **generation_kwargs)
