"""A reward model as a second LoRA adapter on the policy's backbone, plus its score layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastppo.models.checkpoint import finder

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def load_score_module(adapter_id: str, module_names: Sequence[str], hub_kwargs: dict) -> nn.Linear:
    """The frozen score layer that a sequence-classification adapter keeps among its weights."""
    find = finder(adapter_id, hub_kwargs)
    file = next((path for name in ADAPTER_FILES if (path := find(name)) is not None), None)
    if file is None:
        raise FileNotFoundError(f"reward_adapter {adapter_id!r} has neither {' nor '.join(ADAPTER_FILES)}")
    weights = _score_weights(file, module_names)
    if "weight" not in weights:
        raise ValueError(
            f"reward_adapter {adapter_id!r} holds no weight of a module called {' or '.join(module_names)}: train it with "
            "task_type='SEQ_CLS', or with modules_to_save=['score']"
        )
    num_labels, hidden_size = weights["weight"].shape
    score = nn.Linear(hidden_size, num_labels, bias="bias" in weights, dtype=weights["weight"].dtype)
    score.load_state_dict(weights)
    return score.requires_grad_(False)


def _score_weights(file: str, module_names: Sequence[str]) -> dict[str, Tensor]:
    """{"weight": ..., "bias": ...} of the score layer"""
    if Path(file).suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(file)
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    return {
        key.rsplit(".", 1)[-1]: weight
        for key, weight in weights.items()
        if any(name in key.split(".") for name in module_names) and "lora_" not in key
    }


@contextmanager
def policy_untouched(model) -> Iterator[None]:
    """Afterwards the same parameters train, and the same modules are in training mode, as before.

    (PEFT's set_adapter makes the adapter that it activates trainable; up to 0.19 load_adapter freezes the others.)
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def active_adapter(model, adapter_name: str, back_to: str) -> Iterator[None]:
    """`adapter_name` in eval mode inside, `back_to` and everything else as before outside."""
    with policy_untouched(model):
        model.set_adapter(adapter_name)
        model.eval()
        try:
            yield
        finally:
            model.set_adapter(back_to)
