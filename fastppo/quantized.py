"""bitsandbytes' 4- and 8-bit layers, as training needs them.

Our kernels never read such weights: packed integers are no matrix. The engine, the decode program and the fused heads take
plain nn.Linear layers only, and leave the others to their own forward.
"""

import logging
from typing import Any

from torch import nn


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def prepare_for_adapter(model: nn.Module, **kbit_kwargs: Any) -> nn.Module:
    """`model` as an adapter's base: a quantised one goes through peft.prepare_model_for_kbit_training first.

    Gradient checkpointing, which that switches on, is the kind that works whatever the inputs' gradients, unless asked.
    """
    if not is_quantized(model):
        return model
    from peft import prepare_model_for_kbit_training

    if kbit_kwargs.get("gradient_checkpointing_kwargs") is None:
        kbit_kwargs["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return keep_differentiable(prepare_model_for_kbit_training(model, **kbit_kwargs))


def keep_differentiable(*models: nn.Module | None) -> nn.Module | None:
    """Keep 4-bit layers in the form that has a backward pass; returns the first model.

    On a CPU with AVX512-BF16 bitsandbytes repacks a layer at its first forward pass in eval mode, once and for all, for a
    product without a backward pass: gradients then go through the residual stream alone, in silence. PPO samples and
    scores in eval mode before each update.
    """
    quantized = [m for model in models if model is not None for m in model.modules() if _is_bitsandbytes(m)]
    for module in quantized:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            _unpack(module)
    if quantized:
        _say_casts_once()
    return models[0]


def _unpack(module: nn.Module) -> None:
    """Undo the repacking of an earlier eval pass; the blocks' scales keep the bfloat16 that it rounded them to."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.state_dict()  # unpacks in place, but (0.50) leaves the scales [blocks of a row, rows] where they aren't quantised
        state = module.weight.quant_state
        if state.absmax.dim() == 2:
            state.absmax = state.absmax.T.reshape(-1).float()


def _is_bitsandbytes(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)


class _Once(logging.Filter):
    """Lets each message of a logger through once."""

    def __init__(self):
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in self._seen
        self._seen.add(message)
        return fresh


def _say_casts_once() -> None:
    """bitsandbytes says for every 8-bit product that it casts float32 to float16: thousands of lines for one step."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(f, _Once) for f in logger.filters):
        logger.addFilter(_Once())
