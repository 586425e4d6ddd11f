"""PPOConfig.deterministic: the same seed gives bitwise the same run, whatever the micro-batch budget and the rollout's batching.

A matrix product's rounding follows from its shape: in MKL a row times a matrix differs in the last bits from the same row
among others. So nothing is batched here whose numbers matter later:
- a rollout runs on the C++ decode program, which computes each row by itself and in one order; a model that it does not
  know is decoded one sequence at a time. Each sequence draws from a generator of its own, by its index and position;
- old and reference log-probs and values come from one pass per sequence, through the very products and the head that the
  training pass uses (the engine's, or the model's own modules), and the sampler's own are left: on a CPU new - old is 0 and the ratio before the first update is 1, exactly;
- gradients are added up sequence by sequence, in the order of the mini-batch.
The number of threads must stay what it is: sums over threads are part of the rounding.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastppo import attention
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions
from fastppo.packed import Pack, Sequences, head_for, hidden_states, pack, value_head

# tokens of a micro-batch: below any sequence's, so that each is one of its own
ONE_SEQUENCE = 1


def check(kind: str, why_padded: str | None) -> None:
    """ValueError where it cannot be kept. kind: distributed.kind's; why_padded: as PackedModel's, of the policy."""
    if kind.startswith("zero"):
        raise ValueError(
            "PPOConfig: deterministic=True is for one process, DDP and FSDP2; DeepSpeed reduces as it likes"
        )
    if why_padded:
        raise ValueError(f"PPOConfig: deterministic=True needs packed sequences, which can't be had here: {why_padded}")


def generator_options(config) -> dict[str, Any]:
    """For a Generator: of the same bits whatever its batching, where config.deterministic."""
    return config.generation | {"batch_invariant": True} if config.deterministic else config.generation


def token_budget(config) -> int | None:
    return ONE_SEQUENCE if config.deterministic else config.max_tokens_per_micro_batch


@contextlib.contextmanager
def algorithms(config) -> Iterator[None]:
    """torch's deterministic algorithms inside the block; an operation that has none raises RuntimeError there."""
    if not config.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it finds bugs, at the price of writing all memory twice
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


@torch.no_grad()
def score_each(batch: Sequences, with_values: bool, read: Callable[[Pack], tuple[torch.Tensor, torch.Tensor | None]]):
    """([B, T] log-probs, values or None), 0 where none counts. read(pack) -> both [R], of one sequence each time."""
    logprobs = torch.zeros(batch.shape, device=batch.mask_BT.device)
    values = torch.zeros_like(logprobs) if with_values else None
    for row in range(len(batch.tokens)):
        packed = pack(batch, [row], only_counting=True)
        if len(packed.flat_R) == 0:
            continue
        logprob_R, values_R = read(packed)
        logprobs.view(-1)[packed.flat_R] = logprob_R
        if with_values:
            values.view(-1)[packed.flat_R] = values_R
    return logprobs, values


def score_tokens(model, batch: Sequences, with_values: bool, engine=None):
    """packed.score_tokens with the numbers of the training pass. engine: (Engine, dtype) or None, as that pass has it."""
    if engine is None:
        with attention.install(model):
            return score_each(batch, with_values, partial(_score, model, with_values=with_values))
    with engine[0].started(engine[1]):
        return score_each(batch, with_values, partial(engine[0].score_as_learnt, with_values=with_values))


def _score(model, packed: Pack, with_values: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden_RD = hidden_states(model, packed)
    values_R = value_head(model, hidden_RD) if with_values else None
    head, data = head_for(model, hidden_RD), no_data(packed)
    zeros_R = data.old_values_N if values_R is None else values_R
    output = linear_ppo_loss(hidden_RD, zeros_R, head, packed.targets_R, data, PPOLossOptions(), normalizer=1.0)
    return output.logprob_N, values_R


def no_data(packed: Pack) -> PPOBatch:
    """What the loss of a pack compares with where its log-probs alone are wanted."""
    return PPOBatch(*[torch.zeros(len(packed.flat_R), device=packed.flat_R.device)] * 4)
