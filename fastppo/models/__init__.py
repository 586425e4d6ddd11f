"""Language models with a value head, and the frozen reference."""

from fastppo.models.auto import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
)
from fastppo.models.reference import LAYER_PATTERNS, create_reference_model
from fastppo.models.value_head import ValueHead
from fastppo.models.wrapper import PreTrainedModelWrapper

__all__ = [
    "LAYER_PATTERNS",
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "ValueHead",
    "create_reference_model",
]
