"""A language model as backbone + head, so that log-probabilities need no logits tensor.

logits = softcap * tanh(logit_scale * (hidden W^T + b) / softcap), hidden from `backbone(model)`, the rest in a `Head`.
Where a model's head is something else, `output_head` returns the reason as a string: take the full logits there.
Suffixes: N tokens, V vocabulary, D hidden.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from fastppo.attention import unwrap

if TYPE_CHECKING:
    from fastppo.kernels.linear_logprob import Head

# config names that multiply the logits; logits_scaling divides them (Granite), except where DIVISOR_MULTIPLIES says so
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISOR_MULTIPLIES = ("hyperclovax",)
# largest logit error relative to the largest logit, per dtype: both sides round the same product
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def backbone(model: nn.Module) -> nn.Module:
    """The module whose output's last_hidden_state the head reads. ValueError where there is none."""
    inner = unwrap(model)
    base = getattr(inner, "base_model", inner)
    if base is inner:
        raise ValueError(f"backbone: {type(inner).__name__} has no submodule called base_model_prefix")
    return base


def output_head(model: nn.Module) -> "Head | str":
    """The head of `model` (its live parameters), or why the full-logits path must be taken."""
    from fastppo.kernels.linear_logprob import Head

    inner = unwrap(model)
    if reason := _not_splittable(model, inner):
        return reason
    layer = inner.get_output_embeddings()
    if _plain_class(layer) is not nn.Linear:
        return f"the output embedding of {type(inner).__name__} is {_describe(layer)}, not a plain nn.Linear"
    config = inner.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, _logit_scale(config), float(cap) if cap else None)


@torch.no_grad()
def checked_output_head(model: nn.Module) -> "Head | str":
    """output_head, after one forward over a few tokens has shown that head(backbone(x)) gives the model's logits."""
    from fastppo.kernels.linear_logprob import Head, head_logits

    head = output_head(model)
    if not isinstance(head, Head):
        return head
    inner = unwrap(model)
    device = inner.get_input_embeddings().weight.device
    tokens = torch.arange(1, 9, device=device)[None] % head.weight_VD.shape[0]
    training = [module for module in inner.modules() if module.training]
    inner.eval()
    try:
        wanted = inner(input_ids=tokens, use_cache=False).logits.float()
        hidden = backbone(inner)(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for module in training:
            module.training = True
    if hidden.shape[-1] != head.weight_VD.shape[1]:
        return f"the backbone of {type(inner).__name__} gives {hidden.shape[-1]} numbers, its head reads {head.weight_VD.shape[1]}"
    got = head_logits(hidden.to(head.weight_VD.device), head).to(wanted.device).float()
    tolerance = TOLERANCES[head.weight_VD.dtype] * wanted.abs().max().item()
    error = (got - wanted).abs().max().item()
    if not error <= tolerance:
        return f"the logits of {type(inner).__name__} differ from head(backbone(x)) by up to {error:.2g} (allowed {tolerance:.2g})"
    return head


def _plain_class(layer: nn.Module) -> type:
    """The layer's class; FSDP2 makes a subclass called FSDP... of it where it shards a layer by itself."""
    found = type(layer)
    return found.__bases__[-1] if found.__name__ == f"FSDP{found.__bases__[-1].__name__}" else found


def _not_splittable(model: nn.Module, inner: nn.Module) -> str | None:
    if getattr(inner.config, "is_encoder_decoder", False):
        return f"{type(inner).__name__} is an encoder-decoder model"
    peft_model = getattr(model, "pretrained_model", model)
    if peft_model is not inner and peft_model.active_peft_config.is_prompt_learning:
        return f"{peft_model.active_peft_config.peft_type.value} puts virtual tokens in front of the backbone's input"
    if getattr(inner, "base_model", inner) is inner:
        return f"{type(inner).__name__} has no backbone module apart from its head"
    return None


def _logit_scale(config) -> float:
    for name in MULTIPLIERS:
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    return scaling if config.model_type in DIVISOR_MULTIPLIES else 1.0 / scaling


def _describe(layer: nn.Module | None) -> str:
    if layer is None:
        return "missing"
    name = type(layer).__name__
    if hasattr(layer, "modules_to_save"):
        return f"trained through modules_to_save ({name})"
    if hasattr(layer, "base_layer"):
        return f"under an adapter of its own ({type(layer).__module__}.{name})"
    return f"a {type(layer).__module__}.{name}"
