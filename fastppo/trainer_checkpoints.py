"""Checkpoints of the trainers over transformers.Trainer (SFT, reward, late PPO): no pickle, whole or not there, checked.

checkpoint-<step>/ in args.output_dir has transformers' layout, with other files for what it would pickle:
model.safetensors, config.json, ...   the model as from_pretrained reads it (with PEFT the adapter)
trainer_state.json                    transformers' own: step, log, callbacks
optimizer.safetensors                 the optimizer's tensors
random.safetensors                    random generators of every process
resume.json                           settings of optimizer and schedule, what the parameters are called
manifest.json                         size and SHA-256 of each file
The same files however the parameters lie: under FSDP2 with whole tensors, under DeepSpeed with each process's part of the optimizer.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_callback import ExportableState

from fastppo import checkpoint as ckpt
from fastppo import distributed, manifest, sharded_optimizer, zero
from fastppo.disk import (
    CheckpointError,
    check_step,
    read_json,
    set_aside,
    sync_tree,
    told_as_checkpoint_error,
    told_as_garbled,
)
from fastppo.run_folder import RESUME, STATE, later_than, remove_leftovers, remove_old, whole_or_nothing
from fastppo.trainer.state_checks import (
    check_finite,
    check_optimizer,
    check_random,
    check_savable,
    check_state,
    tell_threads,
)
from fastppo.trainer.state_parts import (
    everyones_random_state,
    fingerprint,
    model_fingerprint,
    type_name,
    whole_shape,
)

logger = logging.getLogger(__name__)

_PICKLED_ARGUMENTS = "training_args.bin"


class SafeCheckpoints:
    """What stands before transformers.Trainer among a trainer's bases. `checkpoint_kind` names the trainer in its files."""

    checkpoint_kind = "trainer"

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = super().create_optimizer(*args, **kwargs)
        if self.args.save_strategy != "no" and not self.args.save_only_model and not self.is_deepspeed_enabled:
            check_savable(self.optimizer)
        return made

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """transformers would look for files that DeepSpeed or FSDP has pickled."""
        if resume_from_checkpoint is None or not is_laid_out(self) or not is_ours(Path(resume_from_checkpoint)):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        if trial is None:
            self.store_flos()
            state = whole_state(self, self.model)
            save(self, self.model, lambda folder: self._save(str(folder), state_dict=state))
            return
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with distributed.together(self.accelerator, "writing a checkpoint"):
            if self.args.should_save:
                manifest.write(folder, self.state.global_step)
                sync_tree(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if is_ours(folder):
            check_fits(self, self.model, read(folder))
            if is_laid_out(self):
                load_laid_out(self, self.model, folder)
                return
        elif not (folder / manifest.MANIFEST).exists():
            logger.warning(
                "%s was not written by fastppo: it cannot be checked, and is read as transformers does", folder
            )
        with told_as_garbled(folder) if is_ours(folder) else contextlib.nullcontext():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best and (Path(best) / manifest.MANIFEST).exists():
            manifest.check(Path(best))
        if best and is_laid_out(self) and is_ours(Path(best)):
            load_laid_out(self, self.model, Path(best))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_ours(Path(checkpoint)):
            load_optimizer(self, read(Path(checkpoint)))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_ours(Path(checkpoint)):
            super()._load_scaler(checkpoint)  # load_optimizer has loaded ours

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and is_ours(Path(checkpoint)):
            load_random(self, read(Path(checkpoint)))
        else:
            super()._load_rng_state(checkpoint)


def is_ours(folder: Path) -> bool:
    return (folder / RESUME).is_file()


def is_laid_out(trainer: Any) -> bool:
    """Whether FSDP2 or DeepSpeed owns the parameters' layout, so that weights are loaded after accelerate has made it."""
    return distributed.kind(trainer.accelerator) not in ("single", "ddp")


# --- save -------------------------------------------------------------------------------------------------------------


def save(
    trainer: Any,
    model: torch.nn.Module,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, dict[str, torch.Tensor]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """checkpoint-<step>; every process must call it, and all raise what goes wrong on one.

    model: all that is trained. write_model: writes it into a folder, but for `tensors`: file name -> tensors. more: JSON values.
    """
    args, step = trainer.args, trainer.state.global_step
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    parts, values = collect(trainer, model)
    values |= dict(more or {})
    with distributed.together(trainer.accelerator, "writing a checkpoint"):
        check_finite(model.named_parameters())
        if args.should_save:
            remove_leftovers(args.output_dir)
            with told_as_checkpoint_error(folder), whole_or_nothing(folder) as temporary:
                write_model(temporary)
                for name, group in {**parts, **(tensors or {})}.items():
                    # contiguous copies: safetensors refuses tensors that share storage
                    save_file(
                        {k: x.detach().cpu().contiguous().clone() for k, x in group.items()},
                        temporary / f"{name}.safetensors",
                    )
                (temporary / RESUME).write_text(json.dumps(values), encoding="utf-8")
                write_state(trainer, temporary / STATE)
                manifest.write(temporary, step)
                for path in later_than(args.output_dir, step - 1):
                    set_aside(path)
            remove_old(args.output_dir, args.save_total_limit, trainer.state.best_model_checkpoint)
            if args.push_to_hub:
                trainer._push_from_checkpoint(str(folder))


def whole_state(trainer: Any, model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The model's whole tensors where they are sharded, else None; every process must call it."""
    if distributed.kind(trainer.accelerator) not in distributed.SHARDED:
        return None
    return distributed.whole_tensors(trainer.accelerator, model, model.state_dict)


def collect(trainer: Any, model: torch.nn.Module) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(parts, values) for `read` to give back."""
    random_tensors, random_values = everyones_random_state(trainer.accelerator, *ckpt.rng_state())
    parts, values = {"random": random_tensors}, {"optimizer": None, "scheduler": None, "scaler": None}
    if not trainer.args.save_only_model:
        parts["optimizer"], tree = sharded_optimizer.save(trainer.accelerator, trainer.optimizer)
        parts["scheduler"], values["scheduler"] = ckpt.split_tensors(trainer.lr_scheduler.state_dict())
        values["optimizer"] = {"type": type_name(trainer.optimizer), "tree": tree}
        if (scaler := getattr(trainer.accelerator, "scaler", None)) is not None:
            values["scaler"] = scaler.state_dict()
    values |= {"kind": trainer.checkpoint_kind, "processes": trainer.accelerator.num_processes, "random": random_values}
    return parts, values | {"threads": torch.get_num_threads(), **identity(trainer, model)}


def identity(trainer: Any, model: torch.nn.Module) -> dict[str, Any]:
    """What must be the same when the run goes on: parameters by name, and fingerprints of what no checkpoint holds."""
    accelerator = trainer.accelerator
    sharded = is_laid_out(trainer)
    # FSDP and DeepSpeed may hold parameters in another dtype than they are loaded in, ZeRO-3 in another shape
    dtype = (lambda p: None) if sharded else (lambda p: str(p.dtype))
    table = {name: [dtype(p), list(whole_shape(p))] for name, p in model.named_parameters()}
    frozen = {}
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        frozen["reference"] = model_fingerprint(accelerator, reference)
    if any("lora_" in name for name in table):
        base = ((n, p) for n, p in model.named_parameters() if not p.requires_grad)
        frozen["base"] = None if sharded else fingerprint(base)
    return {"parameters": table, "frozen": frozen}


def write_state(trainer: Any, path: Path) -> None:
    """trainer_state.json, with the state of the callbacks that have one."""
    states: dict[str, list] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    state = trainer.state
    state.stateful_callbacks.update({name: each if len(each) > 1 else each[0] for name, each in states.items()})
    if state.best_global_step:
        best = Path(trainer.args.output_dir) / f"checkpoint-{state.best_global_step}"
        if best.exists() or state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(best)
    state.save_to_json(str(path))


# --- load -------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> ckpt.Checkpoint:
    """Optimizer, schedule and generators of a checkpoint that `run_folder.resolve` has checked."""
    from safetensors import SafetensorError

    values = read_json(folder / RESUME)
    try:
        names = [name for name in ("optimizer", "scheduler", "random") if (folder / f"{name}.safetensors").is_file()]
        parts = {name: {k: x.clone() for k, x in load_file(folder / f"{name}.safetensors").items()} for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return ckpt.Checkpoint(folder, check_step(folder, read_json(folder / manifest.MANIFEST).get("step")), parts, values)


def check_fits(trainer: Any, model: torch.nn.Module, saved: ckpt.Checkpoint) -> None:
    """Raise CheckpointError when the checkpoint is another run's; nothing was changed then."""
    with told_as_garbled(saved.path):
        _check_identity(trainer, identity(trainer, model), saved)
    check_state(saved.path, saved.step)
    tell_threads(saved.values["threads"])


def _check_identity(trainer: Any, now: Mapping[str, Any], saved: ckpt.Checkpoint) -> None:
    values, where = saved.values, saved.path
    if values["kind"] != trainer.checkpoint_kind:
        raise CheckpointError(
            f"{where}: saved by a trainer of kind {values['kind']!r}, this is {trainer.checkpoint_kind!r}"
        )
    then, wanted = values["parameters"], now["parameters"]
    for name in sorted(then.keys() ^ wanted.keys()):
        has = "the saved model lacks" if name in wanted else "this run's model lacks"
        raise CheckpointError(f"{where}: {has} the parameter {name!r}: build the model as the saved run did")
    for name, (dtype, shape) in wanted.items():
        other = then[name][0]
        if then[name][1] != shape or (dtype and other and dtype != other):
            raise CheckpointError(
                f"{where}: the parameter {name!r} was {other} {tuple(then[name][1])}, this run's is {dtype} {tuple(shape)}"
            )
    for name, words in (("base", "the model below the adapters"), ("reference", "the reference model")):
        had, has = values["frozen"].get(name), now["frozen"].get(name)
        if values["frozen"].keys() != now["frozen"].keys() or (had and has and had != has):
            raise CheckpointError(f"{where}: {words} is not the saved run's: start from the same one")
    if not isinstance(values["threads"], int):
        raise TypeError(f"threads: {values['threads']!r}")


def load_laid_out(
    trainer: Any, model: torch.nn.Module, folder: Path, more: Mapping[str, torch.Tensor] | None = None
) -> None:
    """The weights of a checkpoint of ours into parameters that FSDP2 or DeepSpeed has laid out.

    more: tensors of other parameters of what is trained, by the names that they have in trainer.model.
    """
    adapter = folder / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    saved = {name: x for file in files for name, x in load_file(file).items()}
    with zero.writable(trainer.model), torch.no_grad():
        # tensors of a state dict share the parameters' memory
        _write(folder, saved, model.state_dict() | (adapter_state(model) if adapter.is_file() else {}))
        _write(folder, more or {}, dict(trainer.model.named_parameters()))
    zero.refresh_masters(trainer.accelerator)


def _write(folder: Path, saved: Mapping[str, torch.Tensor], current: Mapping[str, torch.Tensor]) -> None:
    for name, x in saved.items():
        if name not in current or whole_shape(current[name]) != x.shape:
            raise CheckpointError(f"{folder}: the tensor {name!r} {tuple(x.shape)} is not one of this run's model")
        current[name].copy_(sharded_optimizer.shard_like(x, current[name]))


def adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by the names that PEFT writes into its file."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_optimizer(trainer: Any, saved: ckpt.Checkpoint) -> None:
    """Optimizer, schedule and gradient scaler as they were saved."""
    values = saved.values
    with told_as_garbled(saved.path):
        if values["optimizer"] is None:
            logger.warning("%s was saved with save_only_model: the optimizer starts anew", saved.path)
            return
        check_optimizer(trainer, saved)
        tensors, tree = saved.parts["optimizer"], values["optimizer"]["tree"]
        sharded_optimizer.load(trainer.accelerator, trainer.optimizer, tensors, tree)
        trainer.lr_scheduler.load_state_dict(ckpt.join_tensors(saved.parts["scheduler"], values["scheduler"]))
        if values["scaler"] is not None and getattr(trainer.accelerator, "scaler", None) is not None:
            trainer.accelerator.scaler.load_state_dict(values["scaler"])


def load_random(trainer: Any, saved: ckpt.Checkpoint) -> None:
    """This process's random generators; with another number of processes they stay as they are, which is said."""
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    if saved.values.get("processes") != processes:
        logger.warning(
            "%s was saved by %s processes, this run has %d: it will not be the run that went on",
            saved.path,
            saved.values.get("processes"),
            processes,
        )
        return
    with told_as_garbled(saved.path):
        own = {name.partition(".")[2]: x for name, x in saved.parts["random"].items() if name.startswith(f"{rank}.")}
        check_random(own, saved.values["random"][rank])
        ckpt.set_rng_state(own, saved.values["random"][rank])
