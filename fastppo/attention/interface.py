"""The function that transformers calls for attention, and how it gets into a model and out again."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from fastppo.attention.layout import Packed, current, using
from fastppo.attention.varlen import varlen_attention

NAME = "fastppo"
# arguments that layers pass and that change nothing for a causal model without a mask
_IGNORED = {"position_ids", "use_cache", "is_causal", "output_attentions", "cache", "cu_seq_lens_q", "cu_seq_lens_k"}
_IGNORED |= {"max_length_q", "max_length_k", "num_items_in_batch", "output_router_logits", "token_type_ids"}


class Unsupported(NotImplementedError):
    """The model asks attention for something that our layouts don't do."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [1, H, N, D], key and value [1, K, N, D] -> ([1, N, H, D], None)."""
    layout = current()
    if layout is None:
        raise RuntimeError(
            "attention: fastppo's attention was called without a layout. Wrap the call in attention.packed(...), or "
            "restore the model's own attention first. (Gradient checkpointing turned on after install()? Install again.)"
        )
    if unknown := [name for name, x in kwargs.items() if x is not None and name not in _IGNORED]:
        raise Unsupported(f"attention: {type(module).__name__} passes {', '.join(unknown)}, which our kernels lack")
    if attention_mask is not None:
        raise Unsupported(f"attention: {type(module).__name__} got a mask; packed sequences take none")
    q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layout, Packed):
        if query.shape[0] != 1 or query.shape[2] != sum(layout.lengths):
            raise ValueError(
                f"attention: packed input is [1, {sum(layout.lengths)}] by its cu_seqlens; "
                f"the model was given [{query.shape[0]}, {query.shape[2]}]"
            )
        options = dict(scale=scale, window=sliding_window, softcap=softcap, dropout=dropout)
        return varlen_attention(q_NHD, k_NKD, v_NKD, layout, **options)[None], None
    out_NHD = layout.attend(module, q_NHD, k_NKD, v_NKD, scale=scale, window=sliding_window, softcap=softcap)
    return out_NHD[None], None


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside value-head, PEFT and data-parallel wrappers."""
    while True:
        if hasattr(model, "pretrained_model"):
            model = model.pretrained_model
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def unsupported(model: nn.Module) -> str | None:
    """Why `model` can't run with our attention, in words; None when it can."""
    inner = unwrap(model)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if config is None or not getattr(inner, "_supports_attention_backend", False):
        return f"{name} does not go through transformers' attention interface"
    if not inner._can_set_attn_implementation():
        return f"{name} can't change its attention implementation at run time"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    text = config.get_text_config()
    if not getattr(text, "is_causal", True) or getattr(inner, "_is_stateful", False):
        return f"{name} is not a causal model whose only state is keys and values"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{name} has layers of type {', '.join(sorted(kinds))}"
    if getattr(text, "add_cross_attention", False):
        return f"{name} has cross-attention"
    return None


class Installed:
    """A model whose attention is ours until `restore()` or the end of the with block. Nests."""

    def __init__(self, model: nn.Module):
        if why := unsupported(model):
            raise Unsupported(f"attention: {why}")
        inner = unwrap(model)
        _register()
        configs = {id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}
        self._configs = [(config, config._attn_implementation) for config in configs.values()]
        self._checkpoints = []
        try:
            if inner.config._attn_implementation != NAME:
                inner.set_attn_implementation(NAME)
            self._carry_layout_into_checkpoints(inner)
        except BaseException:
            self.restore()
            raise

    def _carry_layout_into_checkpoints(self, model: nn.Module) -> None:
        """Gradient checkpointing runs layers again in the backward pass, outside the layout's with block, and on a
        GPU in a thread that sees no context variable: bind the layout of the first run to the second."""
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is None or not getattr(module, "gradient_checkpointing", False):
                continue
            if getattr(function, "func", None) is not _checkpoint:
                self._checkpoints.append((module, function))
                module._gradient_checkpointing_func = partial(_checkpoint, function)

    def restore(self) -> None:
        for config, implementation in self._configs:
            config._attn_implementation_internal = implementation
        for module, function in self._checkpoints:
            module._gradient_checkpointing_func = function
        self._configs, self._checkpoints = [], []

    def __enter__(self) -> "Installed":
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def _checkpoint(checkpoint, run, *args):
    layout = current()

    def run_in_layout(*args):
        with using(layout):
            return run(*args)

    return checkpoint(run_in_layout, *args)


def _register() -> None:
    from transformers import AttentionInterface

    # not registered with AttentionMaskInterface: then transformers builds no mask at all
    if NAME not in AttentionInterface.valid_keys(AttentionInterface()):
        AttentionInterface.register(NAME, attend)


def install(model: nn.Module) -> Installed:
    """Make `model` (a causal LM, also inside PEFT or value-head wrappers) call our attention; undo with `.restore()`.

    Raises Unsupported, with the reason, for a model that can't (see `unsupported`).
    """
    return Installed(model)


@contextlib.contextmanager
def packed(cu_seqlens: torch.Tensor, max_seqlen: int, lengths: list[int] | None = None) -> Iterator[Packed]:
    """Forward passes inside take [1, N] tokens: sequences one after the other. Differentiable.

    cu_seqlens: int32 [B + 1] on the model's device.   max_seqlen: the longest.   lengths: the same as ints, if known.
    Give the model `position_ids=layout.position_ids` and `use_cache=False`.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"packed: cu_seqlens must be 1-D int32; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    with using(Packed(cu_seqlens, max_seqlen, list(lengths or []))) as layout:
        yield layout
