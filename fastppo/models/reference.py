"""The frozen reference policy."""

import copy

from torch import nn

from fastppo.wanted import is_whole, want

# where decoder layers live, by name; {layer} is the index. Other architectures are found by their list of layers.
LAYER_PATTERNS = [
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
    "decoder.block.{layer}",
]


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None):
    """A frozen copy of `model` in eval mode.

    num_shared_layers: the embeddings and the first num_shared_layers layers are frozen in `model` as well, and the copy
        uses the very same storage for them. None shares nothing.
    pattern: module name of a layer with {layer} for its index, e.g. "transformer.h.{layer}"; None finds it.

    Raises ValueError for a model by name, when no layer num_shared_layers exists, or under DeepSpeed ZeRO-3, whose parameters are sharded away.
    """
    where = "create_reference_model"
    want(isinstance(model, nn.Module), where, "model", "a model (from_pretrained loads one by name)", model)
    good = num_shared_layers is None or is_whole(num_shared_layers, 0)
    want(good, where, "num_shared_layers", "None or a whole number of at least 0", num_shared_layers)
    good = pattern is None or isinstance(pattern, str) and "{layer}" in pattern
    want(good, where, "pattern", "None or the name of a layer with {layer} in it", pattern)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "create_reference_model: DeepSpeed ZeRO-3 has sharded the parameters away, so they cannot be copied. "
            "Load the reference with from_pretrained instead."
        )
    shared = [] if num_shared_layers is None else _parameters_before(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)
    # deepcopy takes what memo already holds instead of copying it: these parameters are shared, not duplicated
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()


def _parameters_before(model: nn.Module, num_shared_layers: int, pattern: str | None) -> list[nn.Parameter]:
    """Parameters ahead of layer num_shared_layers, in the order in which the model registers them."""
    patterns = LAYER_PATTERNS if pattern is None else [pattern]
    names = [name for name, _ in model.named_parameters()]
    for candidate in patterns:
        marker = f".{candidate.format(layer=num_shared_layers)}."
        at = next((index for index, name in enumerate(names) if marker in f".{name}"), None)
        if at is not None:
            return [parameter for _, parameter in list(model.named_parameters())[:at]]
    stacks = _layer_stacks(model)
    for name, length in stacks if pattern is None else []:
        if num_shared_layers < length:
            return _parameters_before(model, num_shared_layers, name + ".{layer}")
    found = ", ".join(f"{name}.{{layer}} ({length} layers)" for name, length in stacks) or "none"
    raise ValueError(
        f"create_reference_model: Layer pattern could not be matched: no layer {num_shared_layers} of "
        f"{pattern or 'any known pattern'} in {type(model).__name__}. Lists of layers that it has: {found}."
    )


def _layer_stacks(model: nn.Module) -> list[tuple[str, int]]:
    """Names and lengths of the lists of layers, the decoder's (registered last) first."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, len(module)) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    return outermost[::-1]
