"""Optimise: Experience -> updated weights + one dict of statistics per mini-batch.

    for each epoch: rows in random order -> groups of gradient_accumulation_steps mini-batches -> one optimizer step each
    loss = mean over a mini-batch's tokens, mean over the mini-batches of a group

The padded mini-batch is here; the packed one is packed_update.py. Suffixes: B sequences, T predicted positions.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from fastppo import distributed, zero
from fastppo.distributed import full_tensor
from fastppo.kernels._backend import extension
from fastppo.kernels.logprob import logprob
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, ppo_loss
from fastppo.score import NonFinite

# PPOStats.means() -> TRL's names below ppo/
_NAMES = {
    "policy_loss": "loss/policy",
    "value_loss": "loss/value",
    "entropy": "policy/entropy",
    "approx_kl": "policy/approxkl",
    "policy_kl": "policy/policykl",
    "policy_clipped": "policy/clipfrac",
    "advantage": "policy/advantages_mean",
    "return": "returns/mean",
    "return_var": "returns/var",
    "value": "val/vpred",
    "value_error": "val/error",
    "value_clipped": "val/clipfrac",
    "old_value": "val/mean",
    "old_value_var": "val/var",
}


def loss_options(config) -> PPOLossOptions:
    return PPOLossOptions(config.cliprange, config.cliprange_value, config.vf_coef)


def groups(config, count: int | None = None) -> Iterator[list[list[int]]]:
    """One epoch: the rows in random order, in groups (one optimizer step) of mini-batches.

    count: rows there are, where a process has fewer than config.batch_size: some mini-batches are smaller, or empty.
    """
    order = np.random.permutation(config.batch_size).tolist()
    count = config.batch_size if count is None else count
    for start in range(0, config.batch_size, config.backward_batch_size):
        group = order[start : start + config.backward_batch_size]
        parts = [group[i : i + config.mini_batch_size] for i in range(0, len(group), config.mini_batch_size)]
        yield [[row for row in part if row < count] for part in parts]


def optimise(
    config,
    learn: Callable[[list[list[int]]], list[dict]],
    early_stop: Callable[[float], bool],
    count: int | None = None,
    foresee: Callable[[list[list[list[int]]]], None] | None = None,
) -> list[dict]:
    """Run the epochs; learn(group) makes one optimizer step and returns the statistics of its mini-batches.

    foresee: gets the groups of all epochs before the first begins.
    """
    stats, epochs = [], []
    for _ in range(config.ppo_epochs):
        epochs.append((list(groups(config, count)), np.random.get_state()))
    if foresee is not None:
        foresee([group for epoch, _ in epochs for group in epoch])
    for epoch, drawn in epochs:
        for group in epoch:
            stats += learn(group)
        if early_stop(float(stats[-1]["policy/policykl"])):
            np.random.set_state(drawn)  # as if the epochs that are left out had not been drawn
            break
    return stats


def minibatch_stats(means: dict[str, float], config, advantages_BT, ratio_BT) -> dict[str, torch.Tensor]:
    """TRL's statistics of a mini-batch from PPOStats.means(). Above ratio_threshold the losses read 0: nothing is learnt from it."""
    if means["ratio"] > config.ratio_threshold:
        means = means | {"policy_loss": 0.0, "value_loss": 0.0}
    stats = {name: torch.tensor(means[ours]) for ours, name in _NAMES.items()}
    stats["loss/total"] = stats["loss/policy"] + config.vf_coef * stats["loss/value"]
    return stats | {"policy/advantages": advantages_BT, "policy/ratio": ratio_BT.detach()}


def padded_loss(
    config, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns, normalizer=None, share=None
):
    """(policy loss, vf_coef * value loss, statistics); both losses are means over the mask and differentiable.

    normalizer: what the sums over the mask are divided by; default its count.   share: PPOStats of this process to
    those of all processes.
    """
    options, share = loss_options(config), share or (lambda stats: stats)
    mask = mask.bool()
    batch = PPOBatch(*(x.detach().float().contiguous() for x in (old_logprobs, values, advantages, returns)), mask)
    with torch.no_grad():
        entropy = logprob(logits, torch.zeros_like(mask, dtype=torch.long)).entropy_N
        ratio = (logprobs - old_logprobs).exp()
    logprobs, vpreds = logprobs.float(), vpreds.float()
    frozen = logprobs.detach()
    policy = ppo_loss(
        logprobs, vpreds.detach(), batch, replace(options, vf_coef=0.0), entropy_N=entropy, normalizer=normalizer
    )
    # advantages of zero leave the value loss alone, so that callers can differentiate the two apart
    no_advantages = batch._replace(advantages_N=torch.zeros_like(batch.advantages_N))
    value = ppo_loss(frozen, vpreds, no_advantages, options, normalizer=normalizer)
    means = share(policy.stats).means()
    stats = minibatch_stats(means, config, advantages, ratio)
    mean_ratio = means["ratio"]
    if not mean_ratio > config.ratio_threshold:
        return policy.loss, value.loss, stats
    warn_ratio(mean_ratio, config.ratio_threshold)
    # NaN-free zeros with a graph: backward runs and changes nothing
    zero = torch.zeros_like(logprobs)
    return (logprobs * zero).sum(), (vpreds * zero).sum(), stats


def warn_ratio(mean_ratio: float, threshold: float) -> None:
    warnings.warn(
        f"The average ratio of batch ({mean_ratio:.2f}) exceeds threshold {threshold:.2f}. Skipping batch.",
        stacklevel=3,
    )


class Applied(NamedTuple):
    """done: False where the guard declined and the weights are as before. grad_norm: before clipping."""

    done: bool
    grad_norm: float


def apply_step(trainer, group, agreed: bool = False) -> Applied:
    """Clip the gradients, check them, step the optimizer.

    group: (rows of each mini-batch, PPOStats.means() of each) for the guard's words.
    agreed: these and the gradients are those of all processes, so that all find the same without asking.
    """
    accelerator, config = trainer.accelerator, trainer.config
    accelerator.gradient_state._set_sync_gradients(True)
    zeroed = distributed.kind(accelerator).startswith("zero")
    if zeroed:
        norm, scaled = zero.gradient_norm(accelerator), zero.scales_loss(accelerator)
    else:
        accelerator.unscale_gradients(trainer.optimizer)
        norm, scaled = clip(trainer.model_params, config.max_grad_norm), accelerator.scaler is not None
    fine, watched = False, [] if scaled else list(_watched(group, norm))
    try:
        # fp16's loss scaler expects infinite gradients now and then, and skips those steps itself
        fine = all(trainer._guard.allows(what, value, rows, trainer._steps_done) for what, value, rows in watched)
        if trainer.is_distributed and not agreed:
            everywhere = accelerator.gather(torch.tensor([float(fine)], device=trainer.current_device))
            fine = bool(everywhere.all())
        if fine:
            zero.step(accelerator) if zeroed else trainer.optimizer.step()
    finally:  # also where the guard stops: the next step's gradients would be added to these
        if zeroed and not fine:
            zero.discard(accelerator)
        trainer.optimizer.zero_grad()
    return Applied(fine, norm)


def _watched(group, norm: float):
    rows, means = group
    for minibatch, mean in zip(rows, means, strict=True):
        yield "loss", mean["policy_loss"] + mean["value_loss"], minibatch
    yield "gradient norm", norm, sum(rows, [])


def clip(parameters, max_norm: float | None) -> float:
    """Scale gradients down to max_norm (None: don't); returns their norm before that."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(grads)
    if max_norm is not None and bool(torch.isfinite(norm)):
        if any(hasattr(grad, "full_tensor") for grad in grads):  # FSDP2: each holds its shard
            for grad in grads:
                grad.mul_(min(1.0, max_norm / (float(norm) + 1e-6)))
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """Norm of all gradients together: on a CPU in one call, over processes that hold shards with them."""
    ours = all(type(g) is torch.Tensor and g.device.type == "cpu" and g.dtype == torch.float32 for g in grads)
    if not ours or isinstance(extension(), str) or not all(g.is_contiguous() for g in grads):
        return full_tensor(torch.nn.utils.get_total_norm(grads))
    squares = extension().train_sum_of_squares([g.data_ptr() for g in grads], [g.numel() for g in grads])
    return torch.tensor(squares**0.5, dtype=torch.float32)


class Guard:
    """Keeps NaN and infinity from the weights: 'stop' raises NonFinite, 'skip' warns and leaves the weights alone."""

    def __init__(self, action: str):
        self.action = action
        self.skipped = 0

    def allows(self, what: str, value: float, rows=None, step: int | None = None) -> bool:
        """True when `value` is finite; else warn and return False ('skip') or raise ('stop')."""
        if np.isfinite(value):
            return True
        batch = "" if rows is None else f" in mini-batch rows {list(rows)}"
        self.report(f"{what} is {value}{batch}" + ("" if step is None else f" of step {step}"))
        return False

    def report(self, message: str) -> None:
        message = f"PPOTrainer.step: {message}; the weights are as before it"
        if self.action == "stop":
            raise NonFinite(f"{message}. on_nonfinite='skip' goes on with the next batch")
        self.skipped += 1
        warnings.warn(message, RuntimeWarning, stacklevel=4)


@contextmanager
def eval_mode(*models) -> Iterator[None]:
    """Dropout off inside; gradient checkpointing, which layers only do while training, stays on."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    for model in models:
        if model is not None:
            model.eval()
    for module, _ in modes:
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # this module only: dropout sits in its children, which stay in eval mode
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
