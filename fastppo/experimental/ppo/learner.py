"""Score and learn from responses with a policy and a value function, without padding and without logits.

Suffixes: B sequences, L prompt + response tokens, T response tokens, N packed tokens, R response tokens of all sequences
(row after row), D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastppo.distributed import forward_as
from fastppo.kernels.linear_logprob import linear_logprob
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.logprob import logprob
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, PPOStats, ppo_loss
from fastppo.models.head import checked_output_head, output_head
from fastppo.packed_model import PackedModel
from fastppo.packing import PackedBatch, pack


class Sequences(NamedTuple):
    """Prompt + response of each row, right-padded, and which positions predict a response token."""

    tokens_BL: torch.Tensor
    real_BL: torch.Tensor  # bool, not padding
    predicts_BL: torch.Tensor  # bool, the next token is a response token
    mask_BT: torch.Tensor  # bool, response tokens; as many True per row as in predicts_BL

    def rows(self, index: torch.Tensor) -> "Sequences":
        """The rows `index`, cut to their longest."""
        tokens, real, predicts, mask = (x[index] for x in self)
        length = int(real.sum(1).max())
        return Sequences(tokens[:, :length], real[:, :length], predicts[:, :length], mask)


def sequences(prompts: list[torch.Tensor], responses: list[torch.Tensor], mask_BT: torch.Tensor, pad: int) -> Sequences:
    device = mask_BT.device
    whole = [torch.cat([p.to(device), r.to(device)]) for p, r in zip(prompts, responses, strict=True)]
    tokens_BL = nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=pad)
    place_L = torch.arange(tokens_BL.shape[1], device=device)
    ends_B1 = torch.tensor([[len(x)] for x in whole], device=device)
    starts_B1 = torch.tensor([[len(x)] for x in prompts], device=device)
    predicts_BL = (place_L >= starts_B1 - 1) & (place_L < ends_B1 - 1)
    return Sequences(tokens_BL, place_L < ends_B1, predicts_BL, mask_BT)


class Policy:
    """A language model that gives log-probs of response tokens. `full_logits`: why its head can't be split off, or None."""

    def __init__(self, model: nn.Module):
        self.packed = PackedModel(model)
        head = checked_output_head(model)
        self.full_logits = head if isinstance(head, str) else None

    def states(self, part: Sequences, batch: PackedBatch) -> torch.Tensor:
        """[R, D] hidden states, or [R, V] logits where full_logits says so."""
        run = self.packed.logits if self.full_logits else self.packed.hidden
        return run(part.tokens_BL, batch)[batch.pick(part.predicts_BL)]

    def logprob(self, states: torch.Tensor, targets_R: torch.Tensor, temperature: float) -> Any:
        if self.full_logits:
            return logprob(states, targets_R, temperature=temperature)
        return linear_logprob(states, output_head(self.packed.model), targets_R, temperature=temperature)

    def loss(
        self, states, values_R, targets_R, data: PPOBatch, options: PPOLossOptions, temperature, normalizer
    ) -> Any:
        """(loss, PPOStats, log-probs [R])."""
        if not self.full_logits:
            head = output_head(self.packed.model)
            both = {"temperature": temperature, "normalizer": normalizer}
            out = linear_ppo_loss(states, values_R, head, targets_R, data, options, **both)
            return out.loss, out.stats, out.logprob_N
        scores = logprob(states, targets_R, temperature=temperature)
        out = ppo_loss(scores.logprob_N, values_R, data, options, entropy_N=scores.entropy_N, normalizer=normalizer)
        return out.loss, out.stats, scores.logprob_N.detach()


class SharedValue:
    """Values from a head on the policy's hidden states."""

    def __init__(self, model: nn.Module, policy: Policy):
        if policy.full_logits:
            raise ValueError(
                f"PPOTrainer: value_model=None puts the value head on the policy's hidden states, but {policy.full_logits}; "
                "pass a value_model"
            )
        self.model = model

    def __call__(self, states: torch.Tensor, part: Sequences, batch: PackedBatch) -> torch.Tensor:
        return self.model.v_head(states)[:, 0].float()


class SeparateValue:
    """Values from a backbone of their own with a `score` layer."""

    def __init__(self, model: nn.Module):
        self.packed = PackedModel(model)

    def __call__(self, states: torch.Tensor, part: Sequences, batch: PackedBatch) -> torch.Tensor:
        hidden_ND = self.packed.hidden(part.tokens_BL, batch)
        return self.packed.inner.score(hidden_ND[batch.pick(part.predicts_BL)])[:, 0].float()


def targets(part: Sequences, batch: PackedBatch) -> torch.Tensor:
    """[R] response tokens."""
    next_BL = part.tokens_BL.roll(-1, 1)
    return next_BL[part.predicts_BL]


def chunks(data: Sequences, size: int) -> Iterator[tuple[torch.Tensor, Sequences]]:
    """Rows in chunks of `size`, sequences of about the same length together."""
    order = data.real_BL.sum(1).argsort(descending=True, stable=True)
    for index in order.split(size):
        yield index, data.rows(index)


def scatter(out_BT: torch.Tensor, index: torch.Tensor, mask_bT: torch.Tensor, values_R: torch.Tensor) -> None:
    """out_BT[index] = values_R where mask_bT is True."""
    part = torch.zeros_like(mask_bT, dtype=out_BT.dtype)
    part[mask_bT] = values_R.to(out_BT.dtype)
    out_BT[index] = part


@torch.no_grad()
def score_logprobs(policy: Policy, data: Sequences, size: int, temperature: float) -> torch.Tensor:
    """[B, T] log-probs of the response tokens in nats, 0 elsewhere."""
    out_BT = torch.zeros(data.mask_BT.shape, device=data.mask_BT.device)
    with policy.packed.attention():
        for index, part in chunks(data, size):
            batch = pack(part.tokens_BL, part.real_BL)
            states = policy.states(part, batch)
            scatter(out_BT, index, part.mask_BT, policy.logprob(states, targets(part, batch), temperature).logprob_N)
    return out_BT


@torch.no_grad()
def score_values(policy: Policy, value: SharedValue | SeparateValue, data: Sequences, size: int) -> torch.Tensor:
    """[B, T] values of the positions that predict the response tokens, 0 elsewhere."""
    out_BT = torch.zeros(data.mask_BT.shape, device=data.mask_BT.device)
    shared = isinstance(value, SharedValue)
    with (policy if shared else value).packed.attention():
        for index, part in chunks(data, size):
            batch = pack(part.tokens_BL, part.real_BL)
            states = policy.states(part, batch) if shared else None
            scatter(out_BT, index, part.mask_BT, value(states, part, batch))
    return out_BT


class Step(NamedTuple):
    """One micro-batch: its loss, statistics, and mean and count of |new - old log-prob|."""

    loss: torch.Tensor
    stats: PPOStats
    distance: torch.Tensor


def micro_step(
    policy: Policy,
    value: SharedValue | SeparateValue,
    part: Sequences,
    old: PPOBatch,
    options: PPOLossOptions,
    temperature: float,
    normalizer: float,
) -> Step:
    """Loss of some rows; old: [b, T] tensors of these rows."""
    batch = pack(part.tokens_BL, part.real_BL)
    states = policy.states(part, batch)
    values_R = value(states, part, batch)
    data = PPOBatch(*(x[part.mask_BT] for x in old[:4]))
    loss, stats, logprobs_R = policy.loss(
        states, values_R, targets(part, batch), data, options, temperature, normalizer
    )
    return Step(loss, stats, (logprobs_R.detach() - data.old_logprobs_N).abs().sum())


def as_forward(module: nn.Module, wrapped: nn.Module, function: Callable[[], Step]) -> Step:
    """`function()` as the forward pass of `module` inside `wrapped` (DDP), whose hooks then see it."""
    with forward_as(module, function):
        return wrapped()
