"""Checks of prompts and lengths before a rollout begins; every error names the prompt."""

import torch
from torch import nn

from fastppo.generation.params import GenerationParams
from fastppo.wanted import want


def refuse_prompt_learning(model: nn.Module) -> None:
    """Raise ValueError for PEFT adapters that are no part of the transformers model, which alone runs here and in training."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, dict) or getattr(module, "_adapters_disabled", False):
            continue
        active = getattr(module, "active_adapter", None)  # a name of a PeftModel, a list of a model with adapters in it
        config = configs.get(active) if isinstance(active, str) else None
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"generate: the active adapter is {type(config).__name__}: prompt-learning adapters live outside the "
                "model that decodes here and would be ignored; use LoRA or another adapter of the model's layers, or "
                "call the PEFT model's own generate()"
            )


def checked(prompts, model) -> list[torch.Tensor]:
    """The prompts as 1-D int64 tensors within the vocabulary, or ValueError."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if isinstance(prompts, torch.Tensor) or not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError(
            f"generate: prompts must be a non-empty list of 1-D int64 tensors; got {type(prompts).__name__}"
        )
    checked = []
    for i, given in enumerate(prompts):
        try:
            prompt = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):  # texts, None, lists of unequal lengths
            want(False, "generate", f"prompt {i}", "a 1-D integer tensor of token ids (a tokenizer makes them)", given)
        if prompt.dim() != 1 or prompt.is_floating_point() or prompt.dtype == torch.bool or len(prompt) == 0:
            got = f"{prompt.dtype} {tuple(prompt.shape)}"
            raise ValueError(f"generate: prompt {i} must be a 1-D integer tensor with at least one token; got {got}")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
            raise ValueError(
                f"generate: prompt {i} has tokens from {int(prompt.min())} to {int(prompt.max())}; "
                f"the model's vocabulary is 0 .. {vocabulary - 1}"
            )
        checked.append(prompt.long())
    return checked


def new_token_limits(prompts, params: GenerationParams, given: list[int] | None) -> list[int]:
    """The most new tokens of each prompt, at least one, or ValueError."""
    if given is not None and len(given) != len(prompts):
        raise ValueError(f"generate: max_new_tokens has {len(given)} numbers for {len(prompts)} prompts")
    limits = given or [params.max_new_tokens(len(prompt)) for prompt in prompts]
    for i, limit in enumerate(limits):
        if limit < 1:
            raise ValueError(
                f"generate: prompt {i} of {len(prompts[i])} tokens leaves {limit} new tokens; "
                "raise max_new_tokens (or max_length)"
            )
    return limits


def check_positions(model, prompts, limits) -> None:
    """Learned positions end; raise before an index error in the middle of a rollout."""
    table = _position_table(model)
    if table is None:
        return
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) + limit - 1 > table:
            raise ValueError(
                f"generate: prompt {i} of {len(prompt)} tokens and {limit} new ones need {len(prompt) + limit - 1} "
                f"positions; {type(model).__name__} has {table}. Cut the prompt or lower max_new_tokens"
            )


def _position_table(model) -> int | None:
    """How many learned positions the model has; None when positions are computed."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return None
    words = model.get_input_embeddings().weight
    for module in model.modules():
        # OPT's table has two more rows than positions
        if (
            isinstance(module, nn.Embedding)
            and module.weight is not words
            and 0 <= module.num_embeddings - longest <= 2
        ):
            return longest
    return None
