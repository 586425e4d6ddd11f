"""What the classic trainer shares with any trainer: data loading, trackers, saving. PPO itself is ppo_trainer.py."""

import inspect

import torch
from huggingface_hub import PyTorchModelHubMixin

from fastppo import distributed, gathering
from fastppo.trainer import checks, columns, hub, setup, state, tracking
from fastppo.wanted import want


class BaseTrainer(PyTorchModelHubMixin):
    """Needs config, model, tokenizer, accelerator, current_device, current_step and _signature_columns."""

    # --- data ---------------------------------------------------------------------------------------------------------

    def prepare_dataloader(self, dataset, data_collator=None):
        """Shuffled batches of config.batch_size rows; a shorter last batch is dropped."""
        if checks.is_hf_dataset(dataset):
            dataset = self._remove_unused_columns(dataset)
        columns.check_length(dataset, self.config.batch_size)
        return columns.dataloader(dataset, self.config.batch_size, data_collator)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = columns.signature_columns(self.accelerator.unwrap_model(self.model))

    def _remove_unused_columns(self, dataset):
        if not self.config.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        return columns.remove_unused_columns(dataset, self._signature_columns)

    def _filter_kwargs(self, kwargs, target_func):
        """The entries of kwargs that target_func has a parameter for."""
        return {k: v for k, v in kwargs.items() if k in inspect.signature(target_func).parameters}

    # --- statistics ---------------------------------------------------------------------------------------------------

    def gather_stats(self, stats):
        """Tensors of `stats` averaged over processes."""
        return {
            k: self.accelerator.reduce(v.to(self.current_device), reduction="mean")
            if isinstance(v, torch.Tensor)
            else v
            for k, v in stats.items()
        }

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Send the statistics of a step to config.log_with; rewards: the scores as handed to step().

        stats: what step() returned.   batch: a dictionary with the columns_to_log (texts, for wandb's table).
        """
        checks.check_log_stats(stats, batch, rewards, columns_to_log)
        if not isinstance(rewards, torch.Tensor):
            rewards = torch.tensor([float(r) for r in rewards], device=self.current_device)
        # a process may have fewer
        rewards = gathering.gather(self.accelerator, {"rewards": rewards.flatten()})["rewards"].float()
        logs = dict(stats)
        if self.config.log_with == "wandb":
            tracking.check_columns(batch, columns_to_log)
            logs["game_log"] = tracking.game_log(batch, rewards, columns_to_log, self.accelerator)
        if not self.accelerator.is_main_process:
            return
        logs = tracking.loggable(logs | tracking.reward_stats(rewards), self.config.log_with)
        tensorboard = self.config.log_with == "tensorboard"
        self.current_step += tensorboard
        self.accelerator.log(logs, step=self.current_step if tensorboard else None)

    # --- saving -------------------------------------------------------------------------------------------------------

    def create_model_card(self, path: str, model_name: str = "TRL Model") -> None:
        hub.write_card(path, model_name, type(self.accelerator.unwrap_model(self.model)).__name__)

    def save_pretrained(self, save_directory, *, push_to_hub: bool = False, **kwargs) -> str | None:
        """A folder that transformers loads alone: policy, tokenizer, model card; kwargs of huggingface_hub's ModelHubMixin.

        With many processes, all may call it (and must where parameters are sharded: FSDP2, ZeRO-3); the first one writes.
        """
        want(str(save_directory) != "", "save_pretrained", "save_directory", "the name of a folder", save_directory)
        if self.accelerator.is_main_process:
            # not the mixin's own choice, a copy of the PPOConfig: a plugin in accelerator_kwargs can't always be copied
            kwargs["config"] = kwargs.get("config") or {}
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # The mixin would remove the config.json that the first process has written. To upload it saves again.
        for _ in range(1 + push_to_hub):
            self._save_pretrained(None)
        return None

    def push_to_hub(self, repo_id: str, **kwargs) -> str | None:
        """Upload what save_pretrained writes; kwargs of huggingface_hub's ModelHubMixin. Called like save_pretrained."""
        if self.accelerator.is_main_process:
            return super().push_to_hub(repo_id, **kwargs)
        self._save_pretrained(None)
        return None

    def _save_pretrained(self, save_directory) -> None:
        """Model, tokenizer and model card, written by the main process (the others' folder is not used); for the two above.

        Every process must call it where parameters are sharded (FSDP2, ZeRO-3).
        """
        accelerator, model = self.accelerator, self.accelerator.unwrap_model(self.model)
        kind, main = distributed.kind(accelerator), accelerator.is_main_process
        if kind == "fsdp2":
            model.save_pretrained(save_directory)
        elif kind == "zero3":
            distributed.whole(accelerator, model, lambda: model.save_pretrained(save_directory) if main else None)
        elif main:
            model.save_pretrained(save_directory)
        if main:
            self.tokenizer.save_pretrained(save_directory)
            self.create_model_card(save_directory)

    def save_checkpoint(self, folder, *, keep: int = 3, extra=None):
        """Write everything that a run needs to go on into `folder`/step-<steps done>, crash-safe; returns that path.

        Policy, value head (with PEFT: adapters and head, the base by name), optimizer, scheduler, KL controller,
        running moments, random generators, place in the dataloader, step. safetensors and JSON. keep: newest
        checkpoints that stay. extra: anything JSON can hold, for the caller. With many processes, all call it.
        Raises CheckpointError when it cannot be written; older checkpoints are then untouched.
        """
        return state.save(self, folder, keep, extra)

    def load_checkpoint(self, path, *, missing_ok: bool = False):
        """Go on from `path`, a checkpoint or a folder of them (the newest whole one; a warning says why others were not).

        Build the trainer as the saved run did, from the same models; on a CPU the rest of the run is then bitwise what
        it would have been. Returns Resumed(step, path, passed_over, extra), or None where there is no checkpoint
        and missing_ok. Raises CheckpointError, nothing changed, for a checkpoint that is damaged or does not fit.
        """
        return state.load(self, path, missing_ok)

    def _show_tokens(self, tokens, masks):
        """Print the tokens, those that count (mask 1) in another colour."""
        from rich import print as rich_print
        from rich.text import Text

        text = Text()
        for token, counts in zip(tokens, masks, strict=True):
            text.append(
                self.tokenizer.decode(int(token)), style="black on deep_sky_blue1" if counts else "black on white"
            )
            text.append(" ")
        rich_print(text)

    def _prepare_deepspeed(self, model):
        """The reference under the policy's DeepSpeed configuration (ZeRO-3 shards it; else replicated)."""
        return setup.prepare_deepspeed(self.accelerator, model)
