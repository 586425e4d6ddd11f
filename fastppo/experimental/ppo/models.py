"""Policy and value function in one module: two backbones, or one with a value head beside the language-model head."""

from typing import Any

import torch
from torch import nn

from fastppo.attention import unwrap
from fastppo.models import AutoModelForCausalLMWithValueHead


class PolicyAndValueWrapper(nn.Module):
    """Two full backbones. forward(**inputs) -> (policy's output, values [B, T, 1])."""

    def __init__(self, policy: nn.Module, value_model: nn.Module):
        super().__init__()
        check_scorer(value_model, "value_model")
        self.policy = policy
        self.value_model = value_model
        self.critic_backbone = getattr(value_model, value_model.base_model_prefix)

    @property
    def _no_split_modules(self) -> list[str]:
        """accelerate asks the model for the layers that FSDP2 shards one by one."""
        names = (getattr(unwrap(model), "_no_split_modules", None) for model in (self.policy, self.value_model))
        return sorted({name for found in names for name in found or ()})

    def forward(self, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        hidden = self.critic_backbone(**kwargs).hidden_states[-1]
        return self.policy(**kwargs), self.value_model.score(hidden)


def with_value_head(policy: nn.Module) -> AutoModelForCausalLMWithValueHead:
    """`policy` with a value head that starts at zero, so that the first advantages are the rewards' own."""
    model = AutoModelForCausalLMWithValueHead(policy, summary_dropout_prob=0.0)
    nn.init.zeros_(model.v_head.summary.weight)
    nn.init.zeros_(model.v_head.summary.bias)
    parameter = next(policy.parameters())
    model.v_head.to(parameter.device)
    return model


def check_scorer(model: nn.Module, name: str) -> None:
    """A sequence classifier with one label whose score layer reads its backbone's hidden states."""
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None or not hasattr(model, prefix) or not hasattr(model, "score"):
        raise ValueError(
            f"PPOTrainer: {name} must have a backbone (base_model_prefix) and a `score` layer, as "
            f"AutoModelForSequenceClassification gives for decoder models; got {type(model).__name__}"
        )


def disable_dropout(*modules: nn.Module | None) -> None:
    """Old and new log-probs must come from the same function."""
    for module in modules:
        for part in module.modules() if module is not None else ():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
