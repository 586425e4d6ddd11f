"""Optimise without padding: micro-batches by token budget, head and loss together, one checked optimizer step per group.

A mini-batch is the unit of the loss (its mean over tokens), a micro-batch the unit of memory: the losses of a
mini-batch's micro-batches are divided by the mini-batch's token count, so that their gradients add up to its own.
Suffixes: B sequences, T predicted positions, R response tokens of a pack.
"""

import logging
from typing import NamedTuple

import torch

from fastppo import determinism, distributed, zero
from fastppo.data import Experience
from fastppo.gradients import FlatGradients
from fastppo.kernels.linear_ppo_loss import linear_ppo_loss
from fastppo.kernels.ppo_loss import STATS, PPOBatch, PPOStats
from fastppo.packed import Pack, Sequences, head_for, hidden_states, pack, plan, value_head
from fastppo.update import apply_step, loss_options, minibatch_stats, warn_ratio

logger = logging.getLogger(__name__)


class RolloutMismatch(RuntimeError):
    """Log-probs from the rollout are too far from the training pass's; nothing was changed yet."""


class Result(NamedTuple):
    """One mini-batch: sums over its tokens, and per token new - old log-prob at flat_R of the batch's [B, T]."""

    sums: PPOStats
    flat_R: torch.Tensor
    log_ratio_R: torch.Tensor


class Mismatch(NamedTuple):
    """|rollout - training log-prob| over tokens: mean and max in nats, share of ratios outside [0.9, 1.1]."""

    mean: float
    max: float
    outside: float


def mismatch(log_ratio_R: torch.Tensor) -> Mismatch:
    if not len(log_ratio_R):
        return Mismatch(0.0, 0.0, 0.0)
    ratio_R, distance_R = log_ratio_R.exp(), log_ratio_R.abs()
    outside_R = (ratio_R < 0.9) | (ratio_R > 1.1)
    return Mismatch(float(distance_R.mean()), float(distance_R.max()), float(outside_R.float().mean()))


def out_of_memory(error: Exception) -> bool:
    """A GPU's allocator has an error of its own, torch's on a CPU raises a RuntimeError, C++ and numpy a MemoryError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class PackedLearner:
    """learn(group) for update.optimise, over one Experience."""

    def __init__(self, trainer, sequences: Sequences, experience: Experience, tolerance: float | None):
        """tolerance: largest mean mismatch of rollout log-probs; past it the first learn() raises RolloutMismatch."""
        self.trainer, self.sequences, self.experience = trainer, sequences, experience
        self.engine = None  # an Engine that was started; None: the model's own modules and autograd
        # sharded parameters are gathered by hooks around the model's forward, so that all processes run as many passes
        self.kind = distributed.kind(trainer.accelerator)
        self.hooked = self.kind not in ("single", "ddp")
        self._backwards_left = 0  # of this optimizer step: DeepSpeed must be told which is the last
        self._engine_has_gradients = False  # DeepSpeed's
        self.tolerance = tolerance
        self.mismatch: Mismatch | None = None
        self.used: list[bool] = []  # by parameter: whether any process had a gradient of it so far
        self.flat: FlatGradients | None = None
        self._foreseen: list[list[distributed.Share]] = []
        self.grad_norm = float("nan")  # of the newest optimizer step, before clipping

    def learn(self, group: list[list[int]]) -> list[dict]:
        dropped: set[int] = set()
        if self.engine is not None:
            self.engine.refresh()
        if not self._foreseen:
            self.foresee([group])
        shares = self._foreseen.pop(0)
        micros = [self._packs(rows) for rows in group]
        while True:
            self._backwards_left = sum(share.passes for i, share in enumerate(shares) if i not in dropped)
            try:
                results = [
                    self._minibatch(*x, i not in dropped) for i, x in enumerate(zip(micros, shares, strict=True))
                ]
            except (MemoryError, RuntimeError) as error:
                if self.hooked or not out_of_memory(error):
                    raise
                self._forget()
                self._halve_budget(group)
                micros = [self._packs(rows) for rows in group]
                continue
            results = self._gather(results)
            means = [result.sums.means() for result in results]
            ratios = [mean["ratio"] for mean in means]
            over = {i for i, ratio in enumerate(ratios) if ratio > self.trainer.config.ratio_threshold} - dropped
            if not over:
                break
            for i in over:
                warn_ratio(ratios[i], self.trainer.config.ratio_threshold)
            dropped |= over
            self._forget()
        self._check_mismatch(results)
        self._step(group, means)
        return [self._stats(*each) for each in zip(group, results, means, strict=True)]

    def foresee(self, groups: list[list[list[int]]]) -> None:
        """Exchange the numbers of tokens and passes for the groups that learn() will get, once for all of them."""
        minibatches = [rows for group in groups for rows in group]
        tokens = [int(self.sequences.mask_BT[rows].sum()) for rows in minibatches]
        passes = [len(self._packs(rows)) if self.hooked else 0 for rows in minibatches]
        shares = iter(distributed.shares(self.trainer.accelerator, tokens, passes, averaged=self.hooked))
        self._foreseen = [[next(shares) for _ in group] for group in groups]

    def lay_flat(self, neighbours) -> FlatGradients | None:
        """One buffer for all gradients under DDP, which learn() adds up; None elsewhere. neighbours: as FlatGradients'."""
        kinds = {(p.dtype, p.device) for p in self.trainer.model_params}
        if self.kind == "ddp" and len(kinds) == 1:
            self.flat = FlatGradients(self.trainer.model_params, neighbours)
        return self.flat

    def _packs(self, rows: list[int]) -> list[Pack]:
        """The micro-batches of a mini-batch; those without a token that counts are left out."""
        micros = plan(self.sequences.lengths, rows, determinism.token_budget(self.trainer.config)) if rows else []
        packs = [pack(self.sequences, micro, only_counting=True) for micro in micros]
        return [packed for packed in packs if len(packed.flat_R)]

    def _minibatch(self, packs: list[Pack], share: distributed.Share, backward: bool) -> Result:
        parts = []
        for packed in packs:
            parts.append((self._microbatch if self.engine is None else self._fused)(packed, share.normalizer, backward))
        for _ in range(share.passes - len(packs) if self.hooked else 0):
            self._microbatch(self._idle(), share.normalizer, backward, weight=0.0)
        if not parts:
            empty = torch.empty(0, device=self.sequences.mask_BT.device)
            return Result(PPOStats((torch.zeros(len(STATS)),)), empty.long(), empty)
        return Result(
            sum((part.sums for part in parts[1:]), parts[0].sums),
            torch.cat([part.flat_R for part in parts]),
            torch.cat([part.log_ratio_R for part in parts]),
        )

    def _idle(self) -> Pack:
        """One sequence, for a pass that only keeps the other processes company."""
        lengths, prompts = self.sequences.lengths, self.sequences.prompt_lengths
        row = min((r for r, n in enumerate(lengths) if n > prompts[r]), key=lengths.__getitem__)
        return pack(self.sequences, [row], only_counting=False)

    def _microbatch(self, packed: Pack, count: float, backward: bool, weight: float = 1.0) -> Result:
        found: list[Result] = []

        def run() -> torch.Tensor:
            loss, result = self._forward(packed, count)
            found.append(result)
            return loss

        with torch.set_grad_enabled(backward):
            loss = distributed.forward(self.trainer.model, run) if self.hooked else run()
        if backward:
            self._backwards_left -= 1
            # divided by gradient_accumulation_steps; a shorter group (never, by config) would not fit
            loss = loss * weight if weight != 1.0 else loss
            distributed.backward(self.trainer.accelerator, loss, last=self._backwards_left == 0)
            self._engine_has_gradients = self.kind.startswith("zero")
        return found[0]

    def _forward(self, packed: Pack, count: float) -> tuple[torch.Tensor, Result]:
        model, data = self.trainer.model, self._data(packed)
        with self.trainer.accelerator.autocast():
            hidden_RD = hidden_states(model, packed)
            values_R = value_head(model, hidden_RD)
            head = head_for(model, hidden_RD)
        output = linear_ppo_loss(
            hidden_RD,
            values_R,
            head,
            packed.targets_R,
            data,
            loss_options(self.trainer.config),
            normalizer=count,
        )
        return output.loss, Result(output.stats, packed.flat_R, output.logprob_N - data.old_logprobs_N)

    def _fused(self, packed: Pack, count: float, backward: bool) -> Result:
        """_microbatch on the engine."""
        config, data = self.trainer.config, self._data(packed)
        normalizer = float(count * config.gradient_accumulation_steps)
        output = self.engine.learn(packed, data, loss_options(config), normalizer, backward)
        return Result(output.stats, packed.flat_R, output.logprob_R - data.old_logprobs_N)

    def _data(self, packed: Pack) -> PPOBatch:
        """What the loss compares with, at the pack's response tokens."""
        batch = self.experience
        old = (batch.logprobs_BT, batch.values_BT, batch.advantages_BT, batch.returns_BT)
        return PPOBatch(*(x.flatten()[packed.flat_R] for x in old))

    def _stats(self, rows: list[int], result: Result, means: dict[str, float]) -> dict[str, torch.Tensor]:
        """TRL's statistics; its per-token arrays hold ratio 1 where no token counts."""
        ratio_BT = torch.ones(self.sequences.shape, device=result.flat_R.device)
        ratio_BT.view(-1)[result.flat_R] = result.log_ratio_R.exp()
        return minibatch_stats(means, self.trainer.config, self.experience.advantages_BT[rows], ratio_BT[rows])

    # --- once per group -----------------------------------------------------------------------------------------------

    def _gather(self, results: list[Result]) -> list[Result]:
        """Statistics over all processes; beside their exchange gradients are added up. Sets `used`."""
        if self.kind.startswith("zero"):  # the engine keeps gradients, and has reduced them
            found = distributed.share_stats(self.trainer.accelerator, [result.sums for result in results])
            return [result._replace(sums=sums) for result, sums in zip(results, found, strict=True)]
        parameters = list(self.trainer.model_params)
        had = [parameter.grad is not None for parameter in parameters]
        if self.trainer.accelerator.num_processes > 1:
            sums = [result.sums.sums() for result in results]
            own = [part[name] for part in sums for name in STATS] + had
            with distributed.named("the gradients of a mini-batch"):
                read = distributed.begin_table(self.trainer.accelerator, own)
                if self.flat is not None:
                    distributed.add_up(self.flat)
                numbers = read()
            stats = numbers[:, : len(sums) * len(STATS)].view(-1, len(sums), len(STATS))
            results = [r._replace(sums=PPOStats(tuple(stats[:, i]))) for i, r in enumerate(results)]
            had = numbers[:, len(sums) * len(STATS) :].any(0).tolist()
        self.used = [now or before for now, before in zip(had, self.used or [False] * len(had), strict=True)]
        self._complete(parameters)
        return results

    def _complete(self, parameters: list[torch.nn.Parameter]) -> None:
        """A .grad for what is stepped. An unused parameter keeps none, as in torch: weight decay would move it."""
        # where every mini-batch is dropped: TRL's step on zero gradients (Adam still moves by its momentum)
        used = self.used if any(self.used) else [True] * len(parameters)
        for parameter, stepped in zip(parameters, used, strict=True):
            if not stepped:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.kind == "ddp" and self.flat is None:
            # the packed pass calls the module inside DDP, so that DDP's own hooks don't run
            distributed.reduce_gradients([p for p in parameters if p.grad is not None])

    def _check_mismatch(self, results: list[Result]) -> None:
        """In the first group the weights are still the rollout's: new - old is the mismatch of the two passes."""
        if self.mismatch is not None:
            return
        self.mismatch = mismatch(torch.cat([result.log_ratio_R for result in results]))
        tokens = sum(len(result.log_ratio_R) for result in results)
        found = distributed.table(self.trainer.accelerator, [tokens, *self.mismatch])
        weights = found[:, 0] / found[:, 0].sum().clamp(min=1)
        mean, outside = (found[:, [1, 3]] * weights[:, None]).sum(0).tolist()
        self.mismatch = Mismatch(mean, float(found[:, 2].max()), outside)
        if self.tolerance is not None and not self.mismatch.mean <= self.tolerance:
            self._forget()
            raise RolloutMismatch(
                f"mean |log-prob difference| {self.mismatch.mean:.3g} nats, allowed {self.tolerance:.3g}"
            )

    def _step(self, group: list[list[int]], means: list[dict[str, float]]) -> None:
        if self.kind.startswith("zero"):
            had, self._engine_has_gradients = self._engine_has_gradients, False
            if had:  # else every mini-batch was dropped
                self.grad_norm = apply_step(self.trainer, (group, means), agreed=True).grad_norm
            return
        done, self.grad_norm = apply_step(self.trainer, (group, means), agreed=True)
        if not done:
            self._forget()

    def _forget(self) -> None:
        """Drop the group's gradients."""
        if self._engine_has_gradients:
            zero.discard(self.trainer.accelerator)
            self._engine_has_gradients = False
        for parameter in self.trainer.model_params:
            parameter.grad = None

    def _halve_budget(self, group: list[list[int]]) -> None:
        config, lengths = self.trainer.config, self.sequences.lengths
        longest = max(lengths[r] for rows in group for r in rows)
        used = config.max_tokens_per_micro_batch or max(sum(lengths[r] for r in rows) for rows in group)
        if used <= longest:
            raise torch.OutOfMemoryError(
                f"PPOTrainer.step: out of memory on one sequence of {longest} tokens; shorten responses, or turn on "
                "gradient_checkpointing or mixed_precision='bf16'"
            )
        config.max_tokens_per_micro_batch = max(longest, used // 2)
        logger.warning(
            "out of memory: max_tokens_per_micro_batch is %d from here on (was %d); results stay the same",
            config.max_tokens_per_micro_batch,
            used,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
