"""The model's forward pass for one token as a list of row operations, read off its own ATen graph.

For one token every tensor of the graph is a row: views and transposes of size-one dimensions change nothing, the rest are
elementwise operations, norms, products with constant matrices, and attention. That list, run for many rows at once, is
csrc/cpu/decode_program.cpp. Nothing here knows an architecture; what is not understood raises Untraceable, and the model
runs as it is.
"""

import functools
from collections.abc import Callable

import torch
from torch import fx

from fastppo.attention import install, using
from fastppo.generation.lowering import Lowering
from fastppo.generation.row_program import Program, Untraceable


class _Layout:
    """Makes each layer's attention one node of the graph."""

    def attend(self, module, q_NHD, k_NKD, v_NKD, *, scale, window, softcap):
        run = _attention_op()
        return run(q_NHD, k_NKD, v_NKD, module.layer_idx, float(scale), window or 0, float(softcap or 0.0))


@functools.cache
def _attention_op() -> Callable:
    library = torch.library.Library("fastppo", "FRAGMENT")
    library.define(
        "row_attention(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, float cap) -> Tensor"
    )
    library.impl("row_attention", lambda q, *_: torch.empty_like(q), "CompositeExplicitAutograd")
    _attention_op.library = library  # or the registration ends with it
    return torch.ops.fastppo.row_attention


def trace(model) -> Program:
    """The Program of `model` (a transformers causal LM in eval mode). Raises Untraceable with the reason."""
    from torch.fx.experimental.proxy_tensor import make_fx

    refuse_state(model)
    device = model.get_input_embeddings().weight.device
    seen: list[torch.Tensor] = []

    def step(tokens, positions):
        seen.clear()
        embeds = model.get_input_embeddings()(tokens[None])
        with using(_Layout()):
            out = model(inputs_embeds=embeds, position_ids=positions[None], use_cache=False)
        return out.logits, seen[0]

    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    example = torch.tensor([3], device=device), torch.tensor([5], device=device)
    try:
        with install(model), torch.no_grad():
            graph = make_fx(step)(*example)
            graph.graph.eliminate_dead_code()
            shapes = _Shapes(graph)
            shapes.run(*example)
    except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
        raise Untraceable(f"its graph can't be traced: {str(error).splitlines()[0][:200]}") from error
    finally:
        hook.remove()
    return Lowering(graph, shapes.values).program()


def refuse_state(model) -> None:
    """Raise Untraceable when a program could never stand for the model."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {x.get("rope_type", x.get("type")) for x in (rope, *rope.values()) if isinstance(x, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise Untraceable("its rotary frequencies depend on the length of the sequence")
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if "make_inputs_require_grads" not in getattr(hook, "__qualname__", ""):  # means nothing without gradients
                raise Untraceable(f"{type(module).__name__} has forward hooks, which must run")


class _Shapes(fx.Interpreter):
    """Runs the graph once and keeps the shape of each value."""

    def __init__(self, graph):
        super().__init__(graph)
        self.values: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node):
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            self.values[node] = tuple(result.shape)
        return result
