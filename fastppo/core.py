"""trl.core's names: small tensor helpers that PPO scripts import.

Suffixes: B sequences, T tokens, V vocabulary. A mask is 1 or True where a value counts.
"""

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastppo.wanted import is_whole, want

WANDB_PADDING = -1


def set_seed(seed: int) -> None:
    """Seed random, numpy and torch (all devices); a whole number from 0 to 2**32 - 1, which is what numpy takes."""
    want(is_whole(seed, 0) and seed < 2**32, "set_seed", "seed", "a whole number from 0 to 2**32 - 1", seed)
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class LengthSampler:
    """Calling it draws a length from range(min_value, max_value), uniformly, from numpy's global generator."""

    def __init__(self, min_value: int, max_value: int):
        for name, value in (("min_value", min_value), ("max_value", max_value)):
            want(is_whole(value, 0), "LengthSampler", name, "a whole number of at least 0", value)
        if min_value >= max_value:
            raise ValueError(f"LengthSampler: range({min_value}, {max_value}) is empty; max_value is exclusive")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """log_softmax over the last axis: of each label [...], or of the whole vocabulary [..., V] with gather=False."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, labels[..., None]).squeeze(-1) if gather else logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """-sum(p * log p) over the last axis, in nats; a logit of -inf adds nothing."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Logits outside the top k, then outside the nucleus of mass top_p, become filter_value.

    top_k <= 0 and top_p outside [0, 1) switch each off. At least min_tokens_to_keep stay. The nucleus is the smallest
    set of most likely tokens whose mass reaches top_p (Holtzman et al., "The Curious Case of Neural Text Degeneration").
    """
    if top_k > 0:
        k = min(max(top_k, min_tokens_to_keep), logits.size(-1))
        kth = logits.topk(k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, filter_value)
    if 0 <= top_p < 1:
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probs = sorted_logits.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p
        outside[..., :min_tokens_to_keep] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), filter_value)
    return logits


def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Sample txt_len tokens after each of B queries [B, Tq] (no padding); end-of-sequence does not stop. [B, txt_len]."""
    from fastppo import attention

    if attention.unsupported(model) is None and not _has_virtual_tokens(model):
        return _respond_paged(model, queries, txt_len, top_k, top_p)
    return _respond_by_recomputing(model, queries, txt_len, top_k, top_p)


def _respond_paged(model: nn.Module, queries: Tensor, txt_len: int, top_k: int, top_p: float) -> Tensor:
    from fastppo.generation import Generator

    # the model's own generation settings do not count here; -1 is no token, so nothing ends a response early
    plain = {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_length": 0, "eos_token_id": -1}
    rollout = Generator(model).generate(
        list(queries), max_new_tokens=txt_len, do_sample=True, top_k=max(int(top_k), 0), top_p=top_p, **plain
    )
    return rollout.tokens_BT


@torch.no_grad()
def _respond_by_recomputing(model: nn.Module, queries: Tensor, txt_len: int, top_k: int, top_p: float) -> Tensor:
    """For models that answer (logits, ...) and nothing more: one forward pass over everything per token."""
    tokens_BT = queries
    for _ in range(txt_len):
        logits_BV = model(tokens_BT)[0][:, -1]
        probs_BV = top_k_top_p_filtering(logits_BV, top_k=top_k, top_p=top_p).softmax(-1)
        tokens_BT = torch.cat([tokens_BT, torch.multinomial(probs_BV, 1)], dim=-1)
    return tokens_BT[:, -txt_len:]


def _has_virtual_tokens(model: nn.Module) -> bool:
    """Prompt or prefix tuning: PEFT's own forward puts tokens in front, which the bare transformers model knows nothing of."""
    config = getattr(getattr(model, "pretrained_model", model), "active_peft_config", None)
    return config is not None and config.is_prompt_learning


# --- masked statistics ------------------------------------------------------------------------------------------------


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """sum(values * mask) / sum(mask), over everything or one axis; nan where nothing counts.

    ValueError where mask is smaller than values: the sum over it would count values more than once.
    """
    if values.shape != mask.shape and torch.broadcast_shapes(values.shape, mask.shape) != mask.shape:
        raise ValueError(
            f"masked_mean: mask must have the shape of values {tuple(values.shape)}; got {tuple(mask.shape)}"
        )
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(axis) / mask.sum(axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the values that count, with n - 1 in the denominator if unbiased (then nan for one value)."""
    count = mask.sum()
    if count == 0:
        raise ValueError(
            "masked_var: mask counts no value, which happens when every response of a mini-batch of 1 is masked out. "
            "Increase mini_batch_size or gradient_accumulation_steps."
        )
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * count / (count - 1) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over the values that count; shift_mean=False puts the mean back."""
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / std over all values; shift_mean=False puts the mean back."""
    whitened = (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)
    return whitened if shift_mean else whitened + values.mean()


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """clamp to bounds that may be tensors or numbers."""
    if isinstance(tensor_min, Tensor) == isinstance(tensor_max, Tensor):
        return torch.clamp(x, tensor_min, tensor_max)
    return torch.clamp(torch.clamp(x, max=tensor_max), min=tensor_min)


# --- dictionaries of statistics ---------------------------------------------------------------------------------------


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}"""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}{sep}{inner}": leaf for inner, leaf in flatten_dict(value, sep).items()})
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One tensor [len(stats_dicts), longest] per key of the first; shorter ones are filled with WANDB_PADDING."""
    want(isinstance(stats_dicts, (list, tuple)) and stats_dicts, "stack_dicts", "stats_dicts", "a list", stats_dicts)
    return {
        key: nn.utils.rnn.pad_sequence(
            [stats[key].flatten() for stats in stats_dicts], batch_first=True, padding_value=WANDB_PADDING
        )
        for key in stats_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors become numpy arrays (bfloat16 as float32), numbers Python floats, the rest stays."""
    return {key: _to_np(value) for key, value in stats_dict.items()}


def _to_np(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return float(value) if isinstance(value, (int, float, np.number)) else value


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and arrays of shape () or (1,) become Python numbers, which is what tensorboard takes."""
    return {
        key: value.item() if isinstance(value, (Tensor, np.ndarray)) and tuple(value.shape) in ((), (1,)) else value
        for key, value in stats.items()
    }


# --- random numbers and memory ----------------------------------------------------------------------------------------


def randn_tensor(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal numbers on `device`, drawn where the generator lives; a list has one generator per row."""
    device, layout = torch.device(device or "cpu"), layout or torch.strided
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(
                f"randn_tensor: one generator per row wanted: {shape[0]} rows, {len(generator)} generators"
            )
        row = (1, *shape[1:])
        return torch.cat([randn_tensor(row, one, device, dtype, layout) for one in generator])
    source = device if generator is None else generator.device
    if source.type == "cuda" and device.type != "cuda":
        raise ValueError(f"randn_tensor: cannot draw a {device} tensor from a generator on {source}")
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype, layout=layout).to(device)


class PPODecorators:
    """empty_device_cache(): a context (or decorator) that frees cached device memory on leaving, when switched on."""

    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        yield
        if cls.optimize_device_cache and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
