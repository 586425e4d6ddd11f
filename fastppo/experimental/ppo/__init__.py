"""PPOConfig and PPOTrainer as in TRL 1.12.0's trl.experimental.ppo: a Trainer that generates, scores and learns."""

from fastppo.experimental.ppo.ppo_config import PPOConfig
from fastppo.experimental.ppo.ppo_trainer import PPOTrainer
from fastppo.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
)

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
]
