"""TRL's way through a step, method by method; for models that can't be packed and subclasses that override a stage.

Suffixes: B sequences, T predicted positions.
"""

from functools import partial

import torch

from fastppo import distributed, update
from fastppo.data import Experience
from fastppo.metrics import Clock
from fastppo.score import check_finite


def shape_rewards(trainer, sequences, scores_B, tensors, reward, clock: Clock, from_rollout=False) -> Experience:
    """The Experience, through `reward` and the trainer's compute_advantages.

    sequences: (queries, responses).   tensors: (inputs, mask, logprobs, ref_logprobs, values).
    reward: () -> (rewards, non_score_rewards, kls).
    """
    inputs, mask, logprobs, ref_logprobs, values = tensors
    with torch.no_grad():
        with clock.stage("compute_rewards"):
            rewards, non_score, kls = reward()
        with clock.stage("compute_advantages"):
            values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    with distributed.together(trainer.accelerator, "the check of every log-prob and return"):
        for name, x in (("log-prob", logprobs), ("reference log-prob", ref_logprobs), ("return", returns)):
            check_finite(name, torch.where(mask, x, 0.0))
    return Experience(
        queries=sequences[0],
        responses=sequences[1],
        inputs=inputs,
        mask_BT=mask,
        scores_B=scores_B,
        logprobs_BT=logprobs.float(),
        ref_logprobs_BT=ref_logprobs.float(),
        values_BT=values.float(),
        rewards_BT=rewards,
        non_score_BT=non_score,
        kl_BT=kls,
        advantages_BT=advantages,
        returns_BT=returns,
        from_rollout=from_rollout,
    )


class PaddedPath:
    """TRL's way: [B, T] batches through batched_forward_pass, compute_rewards, compute_advantages, train_minibatch."""

    def __init__(self, trainer):
        self.trainer = trainer

    def prepare(self, queries, responses, scores_B, response_masks, clock: Clock) -> Experience:
        t = self.trainer
        rows = distributed.table(t.accelerator, [len(queries)])[:, 0].int().tolist()
        if min(rows) < t.config.batch_size:
            raise ValueError(
                f"PPOTrainer.step: the processes have {rows} sequences; padded batches need {t.config.batch_size} on each"
            )
        t._rows = sum(rows)
        inputs = self._inputs(queries, responses)
        full = t.config.kl_penalty == "full"
        batch = (queries, responses, inputs)
        options = {"return_logits": full, "response_masks": response_masks}
        with clock.stage("forward_pass"), torch.no_grad():
            logprobs, logits, values, masks = t.batched_forward_pass(t.model, *batch, **options)
            with t.optional_peft_ctx():
                reference = t.model if t.ref_model is None else t.ref_model
                ref_logprobs, ref_logits, _, _ = t.batched_forward_pass(reference, *batch, **options)
        compared = (logits, ref_logits) if full else (logprobs, ref_logprobs)
        masks = masks.bool()
        tensors = (inputs, masks, logprobs, ref_logprobs, values)
        reward = partial(t.compute_rewards, scores_B, *compared, masks)
        return shape_rewards(t, (queries, responses), scores_B, tensors, reward, clock)

    def _inputs(self, queries, responses) -> dict[str, torch.Tensor]:
        t = self.trainer
        inputs = t.prepare_model_inputs(queries, responses)
        if not t.is_distributed:
            return inputs
        left = t.tokenizer.padding_side == "left"
        return {
            name: t.accelerator.pad_across_processes(
                x, dim=1, pad_index=0 if name.endswith("mask") else t.tokenizer.pad_token_id, pad_first=left
            )
            for name, x in inputs.items()
        }

    def optimise(self, batch: Experience) -> tuple[Experience, list[dict]]:
        return batch, update.optimise(
            self.trainer.config,
            lambda group: [self._minibatch(batch, rows) for rows in group],
            self.trainer._early_stop,
        )

    def _minibatch(self, batch: Experience, rows: list[int]) -> dict:
        t = self.trainer
        queries, responses = [batch.queries[r] for r in rows], [batch.responses[r] for r in rows]
        inputs = {name: x[rows] for name, x in batch.inputs.items()}
        t._minibatch_rows = rows
        with t.accelerator.accumulate(t.model):
            logprobs, logits, vpreds, _ = t.batched_forward_pass(
                t.model, queries, responses, inputs, return_logits=True
            )
            return t.train_minibatch(
                batch.logprobs_BT[rows],
                batch.values_BT[rows],
                logprobs,
                logits,
                vpreds,
                batch.mask_BT[rows],
                batch.advantages_BT[rows],
                batch.returns_BT[rows],
            )

    @staticmethod
    def apply(trainer, loss: torch.Tensor) -> None:
        """What train_minibatch does with its loss; inside accelerator.accumulate."""
        distributed.backward(trainer.accelerator, loss, last=trainer.accelerator.sync_gradients)
        if trainer.accelerator.sync_gradients:
            means = {"policy_loss": float(loss.detach()), "value_loss": 0.0}
            update.apply_step(trainer, ([getattr(trainer, "_minibatch_rows", [])], [means]))

    def extra_stats(self, batch: Experience, clock: Clock) -> dict[str, float]:
        return {}
