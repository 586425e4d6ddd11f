"""The generate stage: prompts -> Rollout, with the policy's own parameters."""

import torch

from fastppo.data import Rollout
from fastppo.generation import Generator


def rollout(generator: Generator, prompts: list[torch.Tensor], **generation_kwargs) -> Rollout:
    """Sample responses to `prompts` (1-D int64 tensors); the arguments are those of Generator.generate."""
    return generator.generate(prompts, **generation_kwargs)
