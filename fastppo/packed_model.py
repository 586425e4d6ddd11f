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
from fastppo.activations import fused_gelu
from fastppo.distributed import forward_as
from fastppo.models.head import backbone
from fastppo.packing import PackedBatch

logger = logging.getLogger(__name__)


class PackedModel:
    """A transformers model (perhaps inside PEFT) whose body takes packed batches."""

    def __init__(self, model: nn.Module, why_padded: str | None = None):
        """why_padded: a reason, known to the caller, why the model's sequences can't be packed."""
        config = getattr(model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            raise ValueError(
                f"{type(config).__name__}: adapters that learn a prompt are not supported; use LoRA, DoRA or (IA)3"
            )
        self.model = model
        self.inner = attention.unwrap(model)
        self.why_padded = why_padded or attention.unsupported(model)
        if self.why_padded:
            logger.warning("batches are padded, not packed: %s", self.why_padded)

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Context in which forward and backward passes of this model must run."""
        with contextlib.nullcontext() if self.why_padded else attention.install(self.model), fused_gelu(self.inner):
            yield

    def hidden(self, tokens_BT: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """[N, D], what the head reads at the tokens of `batch`."""
        return self._run(backbone(self.model), tokens_BT, batch)

    def logits(self, tokens_BT: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """[N, V], for models whose head is more than a matrix."""
        return self._run(self.inner, tokens_BT, batch)

    def _run(self, module: nn.Module, tokens_BT: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        if self.why_padded:
            mask_BT = batch.kept_BT.long()
            return module(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)[0][batch.kept_BT]
        with attention.packed(batch.cu_seqlens, batch.max_seqlen):
            return module(input_ids=batch.tokens_1N, position_ids=batch.positions_1N, use_cache=False)[0][0]

    def call(self, wrapped: nn.Module, function: Callable) -> Any:
        """`function()` as the forward pass of `wrapped`, the model as accelerate wrapped it."""
        with forward_as(self.model, function):
            return wrapped()
