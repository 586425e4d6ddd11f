"""The classic PPO trainer: the API of TRL 0.11.4's PPOTrainer over fastppo's stages.

    generate -> (your scores) -> step: score -> prepare -> optimise -> statistics -> log_stats

Suffixes: B sequences, T predicted positions.
"""

import logging
from contextlib import nullcontext
from functools import partial

import torch

from fastppo import determinism, distributed, experience, gathering, metrics, update
from fastppo.core import PPODecorators, convert_to_scalar, set_seed, stack_dicts, stats_to_np
from fastppo.rollout import decode_options
from fastppo.score import NonFinite, check_finite, restore, shape_scores, snapshot
from fastppo.trainer import checks, responses, setup, tracking
from fastppo.trainer.base import BaseTrainer
from fastppo.trainer.padded_path import PaddedPath
from fastppo.trainer.paths import choose_path

logger = logging.getLogger(__name__)


class PPOTrainer(BaseTrainer):
    """Proximal policy optimisation of a language model with a value head.

    config: PPOConfig.   model: a value-head model.   ref_model: the same, frozen; None: a copy of `model`, or with PEFT
    `model` without its adapters.   tokenizer: pads queries and responses.   dataset, data_collator: for `.dataloader`.
    optimizer: default Adam.   num_shared_layers: layers that the copied reference shares with the model.
    lr_scheduler: stepped once per step().   training_data_collator: pads training batches (then always padded).
    Raises ValueError for an argument of the wrong type, a reference that is the model itself, and an optimizer or scheduler of
    something else.
    """

    def __init__(
        self,
        config=None,
        model=None,
        ref_model=None,
        tokenizer=None,
        dataset=None,
        optimizer=None,
        data_collator=None,
        num_shared_layers=None,
        lr_scheduler=None,
        training_data_collator=None,
    ):
        checks.check_init(config, model, ref_model, tokenizer, dataset, num_shared_layers)
        checks.check_optimizer(model, optimizer, lr_scheduler)
        checks.check_collators(data_collator=data_collator, training_data_collator=training_data_collator)
        set_seed(config.seed)
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.dataset, self._signature_columns = dataset, None
        self.is_encoder_decoder = bool(getattr(model, "is_encoder_decoder", False))
        self.is_peft_model = bool(getattr(model, "is_peft_model", False))
        self.is_using_text_environment = getattr(config, "use_text_environment", False)
        self.accelerator = setup.accelerator(config)
        setup.fill_config(self)
        tracking.start(self.accelerator, config)
        setup.enable_gradient_checkpointing(config, model)
        self.ref_model = setup.reference(model, ref_model, num_shared_layers)
        self.optional_peft_ctx = model.pretrained_model.disable_adapter if self.is_peft_model else nullcontext
        self.model_params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        if optimizer is None:
            self.optimizer = setup.default_optimizer(self.model_params, config.learning_rate)
        self.lr_scheduler = lr_scheduler
        self.kl_ctl = setup.kl_controller(config)
        self.data_collator = training_data_collator or setup.default_collator(tokenizer)
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        setup.prepare_with_accelerate(self)
        self.model_params = [p for p in self.model.parameters() if p.requires_grad]  # FSDP2 has replaced them
        setup.prepare_hub(self)
        PPODecorators.optimize_device_cache = config.optimize_device_cache
        self.running = setup.running_moments(self.accelerator)
        self.current_step, self._steps_done = 0, 0
        self._guard = update.Guard(config.on_nonfinite)
        self._rollouts, self._generators = responses.RolloutCache(), {}
        self._generated = metrics.Generated()  # since the last step()
        self._path = choose_path(self, default_collator=training_data_collator is None)
        self._rows = config.batch_size  # sequences of this step over all processes; the path counts them

    # --- generate -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor,
        length_sampler=None,
        batch_size=4,
        return_prompt=True,
        generate_ref_response=False,
        **generation_kwargs,
    ):
        """Responses of the policy, dropout off.

        query_tensor: one 1-D prompt -> tensor [1, T]; a list of them -> list of 1-D tensors, each cut after its
        end-of-sequence token. batch_size: most sequences at a time. return_prompt: whether the prompt comes first
        (always left out for an encoder-decoder). generate_ref_response: also the reference's -> (responses, ref_responses).
        generation_kwargs: as for transformers' generate.
        """
        flags = {"return_prompt": return_prompt, "generate_ref_response": generate_ref_response}
        checks.check_generate(query_tensor, length_sampler, batch_size, **flags)
        models = [self.model] + [self.ref_model or self.model] * bool(generate_ref_response)
        results = []
        for model in models:
            context = self.optional_peft_ctx if results else nullcontext
            with context(), self._generated.timed(self.current_device):
                results.append(
                    responses.classic(
                        self, model, query_tensor, length_sampler, batch_size, return_prompt, generation_kwargs
                    )
                )
        return tuple(results) if generate_ref_response else results[0]

    def _generate_batched(
        self,
        model,
        query_tensors,
        length_sampler=None,
        batch_size=4,
        return_prompt=True,
        pad_to_multiple_of=None,
        remove_padding=True,
        **generation_kwargs,
    ):
        options = generation_kwargs | {"pad_to_multiple_of": pad_to_multiple_of, "remove_padding": remove_padding}
        return responses.batched(self, model, query_tensors, length_sampler, batch_size, return_prompt, options)

    def _generator(self, model):
        """The fastppo.Generator over `model`'s own parameters, made once."""
        from fastppo.generation import Generator

        if id(model) not in self._generators:
            precision = "no" if self.config.deterministic else self.accelerator.mixed_precision
            options = decode_options(precision) | determinism.generator_options(self.config)
            self._generators[id(model)] = Generator(self.accelerator.unwrap_model(model), self.tokenizer, **options)
        return self._generators[id(model)]

    # --- step ---------------------------------------------------------------------------------------------------------

    def _step_safety_checker(self, batch_size, queries, responses, scores, masks=None):
        return checks.check_step(batch_size, self.current_device, queries, responses, scores, masks)

    @PPODecorators.empty_device_cache()
    def step(self, queries, responses, scores, response_masks=None):
        """One PPO update from a batch of config.batch_size sequences; returns its statistics.

        queries, responses: lists of 1-D token tensors.   scores: list of one-element tensors.
        response_masks: list of tensors like responses, 1 where a token counts; default all.
        With several processes one may have fewer sequences (at least one); whitening, losses and statistics are those of
        one process with all sequences.
        Raises ValueError for what it can't use and NonFinite for NaN or infinity (config.on_nonfinite).
        """
        clock = metrics.Clock(self.current_device)
        with distributed.together(self.accelerator, "the check of step()'s arguments"):
            checked = self._step_safety_checker(self._size(queries), queries, responses, scores, response_masks)
            queries, responses, scores, response_masks = checked
            if not self.is_encoder_decoder:
                checks.check_lengths(self.accelerator.unwrap_model(self.model), queries, responses)
        moments = snapshot(self.running)
        try:
            scores_B = torch.stack(scores)
            with distributed.together(self.accelerator, "the check of every score"):
                check_finite("score", scores_B)
            scores_B = shape_scores(scores_B, self.config, self.running)
            batch = self._path.prepare(queries, responses, scores_B, response_masks, clock)
        except NonFinite as error:
            restore(self.running, moments)
            return self._abandon(str(error))
        self._push_if_best(scores_B)
        try:
            with clock.stage("optimize_step"), determinism.algorithms(self.config):
                batch, train_stats = self._path.optimise(batch)
        except NonFinite:
            restore(self.running, moments)
            self._leave_batch()
            raise
        with clock.stage("calc_stats"):
            stats = self._statistics(batch, train_stats)
        self.kl_ctl.update(stats["objective/kl"], self._rows)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        stats |= metrics.throughput(batch, clock, self.config.ppo_epochs, self.current_device)
        stats |= self._generated.stats()
        self._leave_batch()
        stats |= self._path.extra_stats(batch, clock) | clock.timing()
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def _size(self, queries) -> int:
        """Sequences wanted from this process: config.batch_size; beside others it may have fewer."""
        size = self.config.batch_size
        return len(queries) if self.is_distributed and isinstance(queries, list) and 0 < len(queries) < size else size

    def _abandon(self, why: str) -> dict:
        """A batch that can't be learnt from: stop, or skip it and say so in the statistics."""
        self._guard.report(f"{why} (step {self._steps_done})")
        self._leave_batch()
        return {"fastppo/skipped": 1.0, "objective/kl_coef": self.kl_ctl.value}

    def _leave_batch(self) -> None:
        self._rollouts.clear()
        self._generated = metrics.Generated()
        self._steps_done += 1

    def _push_if_best(self, scores_B) -> None:
        if not hasattr(self, "highest_reward"):
            return
        if self.compare_step % self.config.compare_steps == 0:
            total, count = distributed.table(self.accelerator, [float(scores_B.sum()), len(scores_B)]).sum(0)
            if total / count > self.highest_reward:
                self.highest_reward = (total / count).float()
                self.push_to_hub(**self.push_to_hub_kwargs)
        self.compare_step += 1

    def _statistics(self, batch, train_stats: list[dict]) -> dict:
        """Of the sequences of all processes; the mini-batches' own are so already, but for their per-token arrays."""
        stacked = metrics.flat_train_stats(stack_dicts(train_stats))
        flat = {name: stacked[name][0] for name in ("policy/advantages", "policy/ratio")}
        tensors = {
            "scores": batch.scores_B,
            "logprobs": batch.logprobs_BT,
            "ref_logprobs": batch.ref_logprobs_BT,
            "non_score_reward": batch.non_score_BT,
            "masks": batch.mask_BT,
            "kls": batch.kl_BT,
        }
        lists = {"queries": batch.queries, "responses": batch.responses}
        if self.is_distributed:
            everyones = gathering.gather(self.accelerator, flat | tensors | gathering.flat_lists(lists))
            stacked |= {name: everyones[name][None] for name in flat}
            tensors = {name: everyones[name] for name in tensors}
            lists = {name: gathering.list_of(everyones, name) for name in lists}
        stats = stats_to_np(self.record_step_stats(kl_coef=self.kl_ctl.value, train_stats=stacked, **tensors, **lists))
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        return stats

    # --- the stages, padded, for callers and subclasses ---------------------------------------------------------------

    def prepare_model_inputs(self, queries, responses):
        """Padded input_ids and attention_mask of query + response (encoder and decoder inputs apart)."""
        checks.check_pairs("PPOTrainer.prepare_model_inputs", queries, responses)
        return experience.collate(queries, responses, self.data_collator, self.is_encoder_decoder, self.current_device)

    @PPODecorators.empty_device_cache()
    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False, response_masks=None):
        """(log-probs, logits or None, values, masks), [B, T] each, in chunks of config.mini_batch_size."""
        checks.check_pairs("PPOTrainer.batched_forward_pass", queries, responses)
        with update.eval_mode(model):
            return experience.padded_forward(
                model,
                model_inputs,
                queries,
                responses,
                chunk=self.config.mini_batch_size,
                response_masks=response_masks,
                return_logits=return_logits,
            )

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        """(rewards, non_score_rewards, kls), [B, T] each. With kl_penalty "full": log-probs [B, T, V]."""
        result = experience.kl_rewards(
            torch.as_tensor(scores, dtype=torch.float32, device=self.current_device),
            logprobs,
            ref_logprobs,
            masks.bool(),
            kl_coef=self.kl_ctl.value,
            kind=self.config.kl_penalty,
        )
        return result.rewards_BT, result.non_score_BT, result.kl_BT

    def _kl_penalty(self, logprob, ref_logprob):
        return experience.kl_penalty(logprob, ref_logprob, self.config.kl_penalty)

    def compute_advantages(self, values, rewards, mask):
        """(values, advantages, returns), [B, T] each: GAE, whitened advantages."""
        config = self.config
        return experience.advantages_and_returns(
            values,
            rewards,
            mask.bool(),
            gamma=config.gamma,
            lam=config.lam,
            whiten_rewards=config.whiten_rewards,
            total=partial(distributed.total, self.accelerator) if self.is_distributed else None,
        )

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        """(policy loss, vf_coef * value loss, flat statistics)."""
        together = {}
        if self.is_distributed:
            (share,) = distributed.shares(self.accelerator, [int(mask.sum())], [1])
            together["normalizer"] = share.normalizer
            together["share"] = lambda stats: distributed.share_stats(self.accelerator, [stats])[0]
        return update.padded_loss(
            self.config, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns, **together
        )

    @PPODecorators.empty_device_cache()
    def train_minibatch(self, old_logprobs, values, logprobs, logits, vpreds, mask, advantages, returns):
        """Backward, and an optimizer step where gradient accumulation is complete; returns the statistics."""
        policy_loss, value_loss, stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        PaddedPath.apply(self, policy_loss + value_loss)
        return stats

    def _early_stop(self, policykl) -> bool:
        """Whether the KL to the old policy, over all processes' tokens, is past 1.5 * target_kl; then gradients are dropped."""
        if not self.config.early_stopping:
            return False
        if float(policykl) <= 1.5 * self.config.target_kl:
            return False
        self.optimizer.zero_grad()
        return True

    # --- statistics ---------------------------------------------------------------------------------------------------

    def record_step_stats(self, kl_coef, **data):
        """Statistics of one step as tensors; data: what step() hands over (see _statistics)."""
        names = ("masks", "kls", "logprobs", "ref_logprobs", "non_score_reward", "scores")
        if missing := [name for name in (*names, "queries", "responses", "train_stats") if name not in data]:
            raise ValueError(f"PPOTrainer.record_step_stats: {', '.join(missing)} must be given")
        stats = metrics.objective_stats(kl_coef, **{name: data[name] for name in names})
        stats |= metrics.length_stats(data["queries"], data["responses"])
        for name, values in data["train_stats"].items():
            stats[f"ppo/{name}"] = torch.mean(values, dim=0)
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
        return stats
