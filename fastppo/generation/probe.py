"""Run an unknown model on eight tokens, with our attention and with its own, before trusting it with a rollout."""

import torch

from fastppo import attention
from fastppo.attention.layout import Packed, using
from fastppo.attention.paged import LayerSpec, Probe

LENGTHS = (5, 3)


def probe(model) -> list[LayerSpec] | str:
    """What each layer's cache must hold, or in words why `model` (unwrapped, in eval mode) can't use paged attention."""
    if why := attention.unsupported(model):
        return why
    name, device = type(model).__name__, model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(sum(LENGTHS), device=device) * 7919 % vocabulary
    layout = Probe(Packed(torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32), max(LENGTHS)))
    with torch.no_grad():
        try:
            with attention.install(model), using(layout):
                options = dict(position_ids=layout.packed.position_ids, use_cache=False)
                ours = model(input_ids=tokens[None], **options).logits[0]
        except attention.Unsupported as error:
            return str(error)
        own = torch.cat([model(input_ids=x[None], use_cache=False).logits[0] for x in tokens.split(LENGTHS)])
    layers = layout.layers
    if why := _why_not(layers, model.config.get_text_config()):
        return f"{name}: {why}"
    error, spread = (ours - own).float().abs().max().item(), own.float().std().item()
    tolerance = 1e-3 if own.dtype == torch.float32 else 0.3
    if not error <= tolerance * max(spread, 1e-3):
        return (
            f"{name} gives other logits with packed attention than with its own (by {error:.2g}, spread {spread:.2g})"
        )
    return layers


def _why_not(layers: list[LayerSpec], config) -> str | None:
    if not layers:
        return "no layer called the attention interface"
    indices = [spec.layer_idx for spec in layers]
    if None in indices or len(set(indices)) != len(indices):
        return f"its attention layers are numbered {indices}; a cache needs different numbers"
    if any(spec.head_dim != spec.value_dim for spec in layers):
        return "its keys and values have different head dimensions"
    kinds = getattr(config, "layer_types", None) or []
    for spec in layers:
        if spec.window is None and spec.layer_idx < len(kinds) and kinds[spec.layer_idx] == "sliding_attention":
            return f"layer {spec.layer_idx} has a sliding window that it does not tell the attention function"
    return None
