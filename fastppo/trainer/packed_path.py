"""The packed way through a step: no padding, no [tokens, vocabulary] tensor, old log-probs from the rollout if they agree.

Suffixes: B sequences, T predicted positions.
"""

import logging
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from fastppo import attention, determinism, distributed, flops, packed, update
from fastppo.data import Experience
from fastppo.engine.engine import SCORED_TOKENS
from fastppo.generation.fast_path import give_back
from fastppo.kernels.kl_reward import kl_reward
from fastppo.metrics import Clock
from fastppo.packed_update import Mismatch, PackedLearner, RolloutMismatch, mismatch
from fastppo.trainer.engines import Engines
from fastppo.trainer.padded_path import shape_rewards

logger = logging.getLogger(__name__)

# tokens of a packed pass without gradient through a model's own modules, where the config sets no budget
FORWARD_TOKENS = 8192


class PackedPath:
    """prepare and optimise over packed sequences; [B, T] matrices hold 0 where there is no response token."""

    def __init__(self, trainer, head, reference_head):
        self.trainer = trainer
        self._trust_rollout = True
        self._mismatch: Mismatch | None = None
        self._cost: flops.Cost | None = None
        self._engines = Engines(trainer, head, reference_head)

    # --- prepare ------------------------------------------------------------------------------------------------------

    def prepare(self, queries, responses, scores_B, response_masks, clock: Clock) -> Experience:
        t = self.trainer
        taken = t._rollouts.find(queries, responses)
        own_width = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True)) - 1
        rows, width, found = distributed.table(t.accelerator, [len(queries), own_width, taken is not None]).T
        t._rows = int(rows.sum())
        # as wide as the longest sequence of all processes: statistics have a row for each sequence of all
        left, width = t.tokenizer.padding_side == "left", int(width.max())
        self._sequences = packed.sequences(queries, responses, response_masks, left, width)
        self._mismatch = None
        with clock.stage("forward_pass"), update.eval_mode(t.model, t.ref_model), t.accelerator.autocast():
            ref_logprobs = self._score(self._reference(), with_values=False)[0]
            kl_BT = self._full_kl() if t.config.kl_penalty == "full" else None
            logprobs, values, from_rollout = self._old(taken if bool(found.all()) else None)
        self._parts = ((queries, responses), scores_B, ref_logprobs, kl_BT, clock)
        return self._experience(logprobs, values, from_rollout)

    def _experience(self, logprobs, values, from_rollout: bool) -> Experience:
        t, mask = self.trainer, self._sequences.mask_BT
        sequences, scores_B, ref_logprobs, kl_BT, clock = self._parts
        options = {"kl_coef": t.kl_ctl.value, "kind": t.config.kl_penalty, "full_kl_BT": kl_BT}
        reward = partial(kl_reward, logprobs, ref_logprobs, mask, scores_B, **options)
        tensors = (None, mask, logprobs, ref_logprobs, values)
        return shape_rewards(t, sequences, scores_B, tensors, reward, clock, from_rollout)

    def _policy(self):
        return self.trainer.model, nullcontext

    def _reference(self):
        t = self.trainer
        return self._engines.reference_model, t.optional_peft_ctx

    def _budget(self, engine=None) -> int:
        most = FORWARD_TOKENS if engine is None else SCORED_TOKENS
        return determinism.token_budget(self.trainer.config) or most

    def _score(self, acting, with_values: bool):
        model, context = acting

        def score():
            engine = self._engines.of(model)
            if self.trainer.config.deterministic:
                return determinism.score_tokens(model, self._sequences, with_values, engine)
            return packed.score_tokens(model, self._sequences, self._budget(engine), with_values, engine)

        with context():
            return distributed.whole(self.trainer.accelerator, model, score)

    def _full_kl(self):
        accelerator, policy, reference = self.trainer.accelerator, self._policy(), self._reference()

        def compare():
            return packed.full_kl_tokens(policy, reference, self._sequences, self._budget())

        if policy[0] is reference[0]:
            return distributed.whole(accelerator, policy[0], compare)
        return distributed.whole(accelerator, policy[0], lambda: distributed.whole(accelerator, reference[0], compare))

    def _old(self, taken):
        """(logprobs, values, from_rollout): the rollout's where allowed, else from a pass, which measures the mismatch."""
        allowed = {"rollout": True, "recompute": False, "auto": self._trust_rollout}[self.trainer.config.old_logprobs]
        allowed = allowed and not self.trainer.config.deterministic
        if taken is not None:
            logprobs, values = (self._scatter([row[i] for row in taken]) for i in (0, 1))
            if allowed:
                return logprobs, values, True
        recomputed, values = self._score(self._policy(), with_values=True)
        if taken is not None:
            mask = self._sequences.mask_BT
            found = mismatch((recomputed - logprobs)[mask])
            means = distributed.table(self.trainer.accelerator, [found.mean])
            self._mismatch = found._replace(mean=float(means.mean()))
            self._trust_rollout = self._mismatch.mean <= self.trainer.config.max_mismatch
        return recomputed, values, False

    def _scatter(self, rows: list[torch.Tensor]) -> torch.Tensor:
        matrix_BT = torch.zeros(self._sequences.shape, device=self._sequences.mask_BT.device)
        for row, (first, values) in enumerate(zip(self._sequences.columns, rows, strict=True)):
            matrix_BT[row, first : first + len(values)] = values
        return matrix_BT

    # --- optimise -----------------------------------------------------------------------------------------------------

    def optimise(self, batch: Experience) -> tuple[Experience, list[dict]]:
        """(the Experience that was learnt from, statistics): rollout log-probs that don't agree are recomputed first."""
        t = self.trainer
        automatic = t.config.old_logprobs == "auto" and batch.from_rollout
        learner = self._learner(batch, t.config.max_mismatch if automatic else None)
        shuffle = np.random.get_state()
        with update.eval_mode(t.model):
            try:
                stats = self._run(learner)
            except RolloutMismatch as error:
                np.random.set_state(shuffle)
                logger.warning("step() recomputes old log-probs from here on, the rollout's are off: %s", error)
                self._trust_rollout = False
                with t.accelerator.autocast():
                    logprobs, values = self._score(self._policy(), with_values=True)
                batch = self._experience(logprobs, values, from_rollout=False)
                learner = self._learner(batch, None)
                stats = self._run(learner)
        if batch.from_rollout:
            self._mismatch = learner.mismatch
            self._warn_mismatch()
        return batch, stats

    def _learner(self, batch: Experience, tolerance) -> PackedLearner:
        return PackedLearner(self.trainer, self._sequences, batch, tolerance)

    def _run(self, learner: PackedLearner) -> list[dict]:
        t, rows = self.trainer, len(self._sequences.tokens)
        if engine := self._engines.of(t.model):
            flat = learner.lay_flat(engine[0].spec.neighbours())
            with engine[0].started(engine[1], flat) as learner.engine:
                return update.optimise(t.config, learner.learn, t._early_stop, rows, learner.foresee)
        give_back(attention.unwrap(t.accelerator.unwrap_model(t.model)))
        with attention.install(t.model):
            return update.optimise(t.config, learner.learn, t._early_stop, rows, learner.foresee)

    def _warn_mismatch(self) -> None:
        if self._mismatch.mean > self.trainer.config.max_mismatch:
            logger.warning(
                "rollout and training log-probs differ by %.3g nats on average (max_mismatch %.3g)",
                self._mismatch.mean,
                self.trainer.config.max_mismatch,
            )

    # --- statistics ---------------------------------------------------------------------------------------------------

    def extra_stats(self, batch: Experience, clock: Clock) -> dict[str, float]:
        """fastppo/: MFU of both stages, and the mismatch of rollout and training log-probs where the rollout was ours."""
        t = self.trainer
        cost = self._cost = self._cost or flops.policy_cost(t.accelerator.unwrap_model(t.model))
        responses = [len(r) for r in batch.responses]
        forward = cost.forward(self._sequences.lengths, responses)
        prepare = forward * (1 if batch.from_rollout else 2), clock.seconds["forward_pass"]
        optimise = forward * cost.trained * t.config.ppo_epochs, clock.seconds["optimize_step"]
        stats = flops.utilisation(prepare, optimise, t.current_device, t.accelerator.mixed_precision)
        if self._mismatch is not None:
            stats |= {f"fastppo/mismatch_{name}": value for name, value in self._mismatch._asdict().items()}
        return stats
