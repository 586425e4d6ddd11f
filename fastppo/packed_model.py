"""Hidden states of a packed batch, through our attention where the model goes and padded where it does not.

Suffixes: B sequences, T tokens of the longest, N tokens of all sequences, D hidden.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fastppo import attention
from fastppo.packing import PackedBatch

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def forward_as(module: nn.Module, function: Callable) -> Iterator[None]:
    """`module.forward` is `function` inside the block, so that DDP's and FSDP's hooks around forward still run."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class PackedModel:
    """A transformers model (perhaps inside PEFT) whose body takes packed batches."""

    def __init__(self, model: nn.Module):
        config = getattr(model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            raise ValueError(
                f"{type(config).__name__}: adapters that learn a prompt are not supported; use LoRA, DoRA or (IA)3"
            )
        self.model = model
        self.inner = attention.unwrap(model)
        self.why_padded = attention.unsupported(model)
        if self.why_padded:
            logger.warning("batches are padded, not packed: %s", self.why_padded)

    @property
    def body(self) -> nn.Module:
        """The backbone: embeddings and layers, no head."""
        return getattr(self.inner, self.inner.base_model_prefix)

    def attention(self) -> Any:
        """Context in which forward and backward passes of this model must run."""
        return contextlib.nullcontext() if self.why_padded else attention.install(self.model)

    def hidden(self, tokens_BT: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """[N, D], the last layer's normalised states at the tokens of `batch`."""
        if self.why_padded:
            mask_BT = batch.kept_BT.long()
            return self.body(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)[0][batch.kept_BT]
        with attention.packed(batch.cu_seqlens, batch.max_seqlen):
            outputs = self.body(input_ids=batch.tokens_1N, position_ids=batch.positions_1N, use_cache=False)
        return outputs[0][0]

    def call(self, wrapped: nn.Module, function: Callable) -> Any:
        """`function()` as the forward pass of `wrapped`, the model as accelerate wrapped it."""
        with forward_as(self.model, function):
            return wrapped()
