"""PPOTrainer of the late API: a transformers.Trainer whose steps are rollout, score, prepare, optimise.

    prompts -> Rollout -> scores -> Experience -> optimizer steps -> one dict of metrics per update

Suffixes: B sequences, T response tokens.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, set_seed

from fastppo import determinism, distributed, metrics
from fastppo.attention import unwrap
from fastppo.chat import set_special_tokens
from fastppo.data import Rollout
from fastppo.experimental.ppo import evaluation, functions, learner, saving, updates
from fastppo.experimental.ppo.functions import *  # noqa: F403  scripts import TRL's functions from this module
from fastppo.experimental.ppo.models import PolicyAndValueWrapper, disable_dropout, with_value_head
from fastppo.experimental.ppo.ppo_config import PPOConfig
from fastppo.experimental.ppo.prompts import PromptBatch, PromptCollator, prepare_prompts, prompt_stream
from fastppo.experimental.ppo.rewards import Rewards
from fastppo.experimental.ppo.state import OnlineTrainerState
from fastppo.generation import Generator
from fastppo.model_card import write_model_card
from fastppo.models import create_reference_model
from fastppo.quantized import keep_differentiable
from fastppo.rollout import decode_options
from fastppo.run_folder import resolve
from fastppo.score import NonFinite
from fastppo.supervised import BaseTrainer, add_adapter, check_trainer
from fastppo.update import Guard
from fastppo.wanted import want

__all__ = [*functions.__all__, "OnlineTrainerState", "PPOTrainer", "PolicyAndValueWrapper"]


class PPOTrainer(BaseTrainer):
    """Proximal policy optimisation of a causal language model.

    model: the policy; with peft_config an adapter is put on it and, when ref_model is None, the model without adapter is
    the reference. ref_model=None otherwise: a frozen copy. reward_model: a sequence classifier, a function
    (prompts, completions, **columns) -> numbers, an endpoint's URL, or a list of these, with weights in
    args.reward_weights or as (reward, weight). value_model: a sequence classifier; None: a value head on the policy's
    own hidden states. train_dataset: rows with input_ids, or prompt, messages, query or text (tokenised here); other
    columns go to reward functions.
    Raises ValueError for models, datasets and options that do not fit; train() raises NonFinite for a NaN or infinite
    score, loss or gradient (args.on_nonfinite) and CheckpointError for a checkpoint that cannot be used.
    """

    checkpoint_kind = "late-ppo"
    _tag_names = ("fastppo", "ppo")
    _name = "PPO"

    def __init__(
        self,
        args: PPOConfig,
        processing_class: Any,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: Any,
        train_dataset: Any,
        value_model: nn.Module | None = None,
        data_collator: Callable | None = None,
        eval_dataset: Any = None,
        optimizers: tuple = (None, None),
        callbacks: list | None = None,
        peft_config: Any = None,
    ):
        if ref_model is model:
            raise ValueError(
                "PPOTrainer: `model` and `ref_model` cannot be the same object: the reference must not train. Pass a copy, or "
                "None for a copy (with peft_config: the model without its adapter)"
            )
        want(isinstance(args, PPOConfig), "PPOTrainer", "args", "a PPOConfig of fastppo.experimental.ppo", args)
        models = {"model": model, "ref_model": ref_model, "value_model": value_model, "peft_config": peft_config}
        others = {"data_collator": data_collator, "optimizers": optimizers, "callbacks": callbacks}
        check_trainer("PPOTrainer", **models, **others, processing_class=processing_class)
        good = isinstance(model, nn.Module) and hasattr(unwrap(model), "generation_config")
        want(good, "PPOTrainer", "model", "a language model (AutoModelForCausalLM.from_pretrained loads one)", model)
        if isinstance(eval_dataset, dict):
            raise ValueError("PPOTrainer: eval_dataset must be one dataset; got a dict")
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        set_special_tokens(tokenizer)
        if args.stop_token == "eos" and tokenizer.eos_token_id is None:
            raise ValueError("PPOTrainer: stop_token='eos', but the tokenizer has no end-of-sequence token")
        args.world_size = args.distributed_state.num_processes
        train_dataset = prepare_prompts(train_dataset, tokenizer, args)
        args.set_batch_sizes(len(train_dataset))
        self.stop_token_id = tokenizer.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        set_seed(args.seed)  # a new adapter is drawn
        self.policy_model = add_adapter(model, peft_config, args)
        self.is_peft_model = hasattr(self.policy_model, "peft_config")
        self.model_adapter_name, self.ref_adapter_name = args.model_adapter_name, args.ref_adapter_name
        self.ref_model = create_reference_model(model) if ref_model is None and not self.is_peft_model else ref_model
        self.value_model = value_model
        # sequences of a scoring pass
        self.scored_rows = 1 if args.deterministic else args.local_rollout_forward_batch_size
        self._rewards = Rewards(reward_model, args.reward_weights, self.scored_rows)
        self.reward_model = reward_model
        keep_differentiable(self.policy_model, self.ref_model, value_model, *self._rewards.models)
        disable_dropout(self.policy_model, self.ref_model, value_model, *self._rewards.models)
        if value_model is None:
            wrapper = with_value_head(self.policy_model)
        else:
            wrapper = PolicyAndValueWrapper(self.policy_model, value_model)
        super().__init__(
            model=wrapper,
            args=args,
            data_collator=PromptCollator(data_collator, tokenizer.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=prepare_prompts(eval_dataset, tokenizer, args, "eval_dataset"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.tokenizer = tokenizer
        self._set_up()

    def _set_up(self) -> None:
        """What needs the accelerator: devices, the stages' views of the models, state."""
        args = self.args
        self._rewards.prepare(self.accelerator)
        if args.gradient_checkpointing:
            for model in (self.policy_model, self.value_model):
                if model is not None:
                    model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.policy = self._scored(self.policy_model)
        if args.deterministic:
            determinism.check(distributed.kind(self.accelerator), self.policy.packed.why_padded)
            self.accelerator.gradient_accumulation_steps = 1  # a division that rounds
        self.reference = None if self.ref_model is None else self._scored(self.ref_model)
        self.ref_model = distributed.prepare_frozen(self.accelerator, self.ref_model)
        shared = self.value_model is None
        self.value = learner.SharedValue(self.model, self.policy) if shared else learner.SeparateValue(self.value_model)
        self._wrapper = self.model
        options = decode_options("no" if args.deterministic else self.accelerator.mixed_precision)
        options["batch_invariant"] = args.deterministic
        self.generator = Generator(self.model if shared else self.policy_model, self.tokenizer, **options)
        self.fused = self.costs = None  # the models on the engine, and their FLOPs: made with the first update
        self.guard = Guard(args.on_nonfinite)
        self.micro_rows = 1 if args.deterministic else args.per_device_train_batch_size
        self.train_dataset_len = len(self.train_dataset)
        self.local_dataloader_batch_size = args.local_batch_size
        samples = args.num_sample_generations
        self.sample_generations_freq = max(1, args.num_total_batches // samples) if samples else 0
        stateful = [x for x in [*self.callback_handler.callbacks, self.control] if isinstance(x, ExportableState)]
        self.state = OnlineTrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=stateful,
        )
        self.stream = prompt_stream(args, len(self.train_dataset), self.accelerator.process_index)
        loading = {"collate_fn": self.data_collator, "num_workers": args.dataloader_num_workers}
        self.dataloader = DataLoader(self.train_dataset, batch_sampler=self.stream, **loading)

    def _scored(self, model: nn.Module) -> learner.Policy:
        return distributed.whole(self.accelerator, model, lambda: learner.Policy(model))

    # --- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of args.local_batch_size prompts, one for each update."""
        return self.dataloader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("PPOTrainer: no eval_dataset was given")
        return DataLoader(dataset, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)

    # --- stages -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[None]:
        """The policy's model acts as the reference inside: its adapters off, or args.ref_adapter_name in their place."""
        model = self.policy_model
        swapped = self.is_peft_model and self.ref_adapter_name
        off = model.disable_adapter() if self.is_peft_model and not swapped else contextlib.nullcontext()
        with off:
            if swapped:
                model.set_adapter(self.ref_adapter_name)
            try:
                yield
            finally:
                if swapped:
                    model.set_adapter(self.model_adapter_name or "default")

    def rollout(self, prompts: list[torch.Tensor], seed: int, temperature: float | None = None) -> Rollout:
        """Responses of the policy, at args.temperature unless told otherwise."""
        return updates.rollout(self, prompts, seed, temperature)

    @property
    def _score_temperature(self) -> float:
        return self.args.temperature if self.args.temperature > 0 else 1.0

    def judge(self, rollout: Rollout, columns: dict[str, list]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(scores [B] with missing_eos_penalty, scores of each reward by name), on the CPU."""
        return updates.judge(self, rollout, columns)

    def update(self, batch: PromptBatch) -> dict[str, float]:
        """One update: the metrics that TRL logs, and each reward's mean when there are several."""
        args, number = self.args, self.state.global_step
        clock = metrics.Clock(self.accelerator.device)
        with clock.stage("generate"), distributed.together(self.accelerator, "the rollout"):
            rollout = self.rollout(batch.prompts, args.seed * 1_000_003 + number)
        try:
            with distributed.together(self.accelerator, "the reward"):
                scores_B, named = self.judge(rollout, batch.columns)
            with clock.stage("forward_pass"):
                experience, data = updates.prepare(self, rollout, scores_B)
        except NonFinite as error:
            self.guard.report(f"{error} (update {number + 1})")
            return {}
        with clock.stage("optimize_step"):
            learnt = updates.optimise(self, experience, data, number)
        logs = updates.metrics(self, rollout, experience, named, learnt)
        logs["fastppo/generate_tokens_per_s"] = float(rollout.mask_BT.sum()) / clock.seconds["generate"]
        logs |= metrics.throughput(experience, clock, args.num_ppo_epochs, self.accelerator.device)
        return logs | updates.utilisation(self, experience, data, clock)

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **_: Any) -> TrainOutput:
        """Train for args.num_total_batches updates.

        resume_from_checkpoint: a checkpoint's folder; True: the newest; "auto": the newest if there is any.
        """
        args = self.args
        set_seed(args.seed)
        self._start_state()
        self.create_optimizer()
        self.create_scheduler(num_training_steps=args.num_total_batches, optimizer=self.optimizer)
        checkpoint, self.passed_over = resolve(args.output_dir, resume_from_checkpoint, self.accelerator)
        if checkpoint:
            saving.load_weights(self, Path(checkpoint))
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.policy.gather_head(self.accelerator, self.model)
        if checkpoint:
            saving.load_resume(self, Path(checkpoint))
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = self.dataloader
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        started, episodes = time.time(), self.state.episode
        self.stream.first = self.state.global_step
        self.model.train()
        batches = iter(self.dataloader)  # draws a seed
        if checkpoint:
            saving.load_random(self, Path(checkpoint))
        for batch in distributed.read_together(self.accelerator, batches, "reading the next prompts"):
            self.control = self.callback_handler.on_step_begin(args, self.state, self.control)
            logs = self.update(batch)
            self.state.global_step += 1
            self.state.episode += args.batch_size
            self.state.epoch = self.state.episode / self.train_dataset_len
            speed = (self.state.episode - episodes) / (time.time() - started)
            extra = {"lr": self.lr_scheduler.get_last_lr()[0], "episode": self.state.episode}
            self.log({"eps": int(speed), **logs, **extra})
            self.lr_scheduler.step()
            self._after_update()
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {"train_runtime": time.time() - started})

    def _start_state(self) -> None:
        args, state = self.args, self.state
        state.global_step = state.episode = 0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = max(1, round(args.total_episodes / self.train_dataset_len))
        state.train_batch_size = args.per_device_train_batch_size
        state.compute_steps(args, state.max_steps)

    def _after_update(self) -> None:
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.control.should_evaluate and self.eval_dataset is not None:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        every = self.sample_generations_freq
        if every and (self.state.global_step - 1) % every == 0 and self.eval_dataset is not None:
            self.generate_completions(sampling=True)

    def generate_completions(self, sampling: bool = False) -> dict[str, list]:
        """Answers to the evaluation prompts, nearly greedy, with scores: printed and logged as a table.

        sampling: the first batch only.
        """
        return evaluation.generate_completions(self, sampling)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Mean score, KL and length of sampled responses to the evaluation prompts."""
        metrics = evaluation.evaluate(self, self.get_eval_dataloader(eval_dataset), metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy alone (with PEFT its adapter alone), and the tokenizer. Every process must call it."""
        self._write_model(output_dir, _internal_call, saving.policy_state(self))

    def _write_model(self, output_dir: str | None, _internal_call: bool, state: dict | None) -> None:
        """state: the policy's whole tensors where they are sharded."""
        whole, self.model = self.model, self.policy_model
        try:
            if state is None:
                super().save_model(output_dir, _internal_call)
            elif self.args.should_save:
                self._save(output_dir, state_dict=state)
        finally:
            self.model = whole

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        saving.save_checkpoint(self)

    def create_model_card(
        self, model_name: Any = None, dataset_name: Any = None, tags: Any = None, folder: Any = None, **_: Any
    ) -> None:
        if self.is_world_process_zero():
            names = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
            write_model_card(folder or self.args.output_dir, "ppo", model=self.policy_model, **names)
