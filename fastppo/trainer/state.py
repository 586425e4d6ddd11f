"""A classic trainer's whole state as the parts of a checkpoint, and back: checked first, then put in place.

policy.safetensors     parameters and buffers with the value head; with PEFT what trains only (the base is named)
optimizer.safetensors  the optimizer's tensors
random.safetensors     generators of every process (torch, CUDA, numpy, Python, the dataloader's)
values.json            optimizer and scheduler settings, KL controller, running moments, place in the data, counters
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from fastppo import checkpoint as ckpt
from fastppo.checkpoint import Checkpoint, CheckpointError
from fastppo.trainer.columns import Batches

logger = logging.getLogger(__name__)

KIND = "classic-ppo"
# elements of each frozen tensor that its fingerprint reads
_SAMPLED = 64
_COUNTERS = ("current_step", "_steps_done", "compare_step")
# fields that say where and how a run runs, not what it computes
_FREE_FIELDS = ("steps", "exp_name", "task_name", "model_name", "log_with", "tracker_project_name", "query_dataset")


class Resumed(NamedTuple):
    """step: steps that were done.   path: the checkpoint.   passed_over: why newer ones were not taken.   extra: as saved."""

    step: int
    path: str
    passed_over: list[str]
    extra: Any


# --- what a trainer is made of ----------------------------------------------------------------------------------------


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered (all processes take part), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _model(trainer):
    return trainer.accelerator.unwrap_model(trainer.model)


def saved_tensors(trainer) -> dict[str, torch.Tensor]:
    """The policy's tensors that a checkpoint holds, by name; the very tensors, tied ones once."""
    model = _model(trainer)
    if trainer.is_peft_model:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    persistent = {f"{at}.{name}" if at else name for at, module in model.named_modules() for name in _buffers(module)}
    return dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}


def _buffers(module) -> list[str]:
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and a few elements of each: tells another model, without reading all of one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        flat = _whole(tensor.detach()).flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {some.double().tolist()}".encode())
    return digest.hexdigest()


def frozen(trainer) -> dict[str, str]:
    """Fingerprints of what a checkpoint does not hold: the reference, and the base below adapters."""
    found = {}
    if trainer.ref_model is not None:
        found["reference"] = fingerprint(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    if trainer.is_peft_model:
        found["base"] = fingerprint((n, p) for n, p in _model(trainer).named_parameters() if not p.requires_grad)
    return found


def base_name(trainer) -> str:
    return str(getattr(getattr(_model(trainer), "config", None), "_name_or_path", "") or "")


def _running(trainer) -> dict[str, float]:
    return {f.name: float(getattr(trainer.running, f.name)) for f in fields(trainer.running) if f.name != "accelerator"}


def _counters(trainer) -> dict[str, int]:
    return {name: getattr(trainer, name) for name in _COUNTERS if hasattr(trainer, name)}


def _random(trainer) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """(tensors by "<process>.<name>", JSON values per process); all processes take part."""
    tensors, values = ckpt.rng_state()
    generator = getattr(getattr(trainer.dataloader, "_sampler", None), "generator", None)
    if generator is not None:
        tensors["sampler"] = generator.get_state()
    if trainer.accelerator.num_processes == 1:
        return {f"0.{name}": tensor for name, tensor in tensors.items()}, [values]
    from accelerate.utils import gather_object

    mine = {name: (str(t.dtype).removeprefix("torch."), t.tolist()) for name, t in tensors.items()}
    everyone = gather_object([(mine, values)])
    gathered = {
        f"{rank}.{name}": torch.tensor(numbers, dtype=getattr(torch, dtype))
        for rank, (theirs, _) in enumerate(everyone)
        for name, (dtype, numbers) in theirs.items()
    }
    return gathered, [values for _, values in everyone]


# --- save -------------------------------------------------------------------------------------------------------------


def collect(trainer, extra: Any) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(parts, values) for fastppo.checkpoint.save_checkpoint; with many processes all must call it."""
    _refuse_deepspeed(trainer)
    optimizer = trainer.optimizer.state_dict()
    for state in optimizer["state"].values():
        state.update({k: _whole(v) for k, v in state.items() if isinstance(v, torch.Tensor)})
    optimizer_tensors, optimizer_tree = ckpt.split_tensors(optimizer)
    scheduler = None if trainer.lr_scheduler is None else ckpt.split_tensors(trainer.lr_scheduler.state_dict())
    random_tensors, random_values = _random(trainer)
    policy = {name: _whole(tensor.detach()) for name, tensor in saved_tensors(trainer).items()}
    parts = {"policy": policy, "optimizer": optimizer_tensors, "random": random_tensors}
    if scheduler and scheduler[0]:
        parts["scheduler"] = scheduler[0]
    scaler = trainer.accelerator.scaler
    values = {
        "kind": KIND,
        "processes": trainer.accelerator.num_processes,
        "config": _config(trainer),
        "base": base_name(trainer),
        "frozen": frozen(trainer),
        "optimizer": {"type": _type_name(trainer.optimizer), "tree": optimizer_tree},
        "scheduler": None if scheduler is None else scheduler[1],
        "scaler": None if scaler is None else scaler.state_dict(),
        "kl": {"type": type(trainer.kl_ctl).__name__, "value": float(trainer.kl_ctl.value)},
        "running": _running(trainer),
        "counters": _counters(trainer),
        "highest_reward": float(trainer.highest_reward) if hasattr(trainer, "highest_reward") else None,
        "skipped": trainer._guard.skipped,
        "trust_rollout": getattr(trainer._path, "_trust_rollout", None),
        "token_budget": trainer.config.max_tokens_per_micro_batch,
        "data": trainer.dataloader.state() if isinstance(trainer.dataloader, Batches) else None,
        "random": random_values,
        "threads": torch.get_num_threads(),
        "extra": extra,
    }
    return parts, values


def _refuse_deepspeed(trainer) -> None:
    if getattr(trainer.accelerator.state, "deepspeed_plugin", None) is not None:
        raise CheckpointError("under DeepSpeed, save and load with trainer.accelerator.save_state / load_state")


def _type_name(optimizer) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _config(trainer) -> dict[str, Any]:
    """The configuration as JSON; what JSON has no word for is left out."""
    kept = {}
    for name, value in trainer.config.__dict__.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return kept


# --- load -------------------------------------------------------------------------------------------------------------


def apply(trainer, saved: Checkpoint) -> None:
    """Make `trainer` what the saved one was. Raises CheckpointError, the trainer untouched, when it does not fit."""
    _refuse_deepspeed(trainer)
    try:
        _check(trainer, saved)
        optimizer = ckpt.join_tensors(saved.parts["optimizer"], saved.values["optimizer"]["tree"])
        _check_optimizer(trainer, saved, optimizer)
        scheduler = ckpt.join_tensors(saved.parts.get("scheduler", {}), saved.values["scheduler"])
        rank = trainer.accelerator.process_index
        own = {n.partition(".")[2]: t for n, t in saved.parts["random"].items() if n.startswith(f"{rank}.")}
        _tell_changes(trainer, saved)
        _apply(trainer, saved, optimizer, scheduler, own)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{saved.path}: its values.json lacks or garbles what a classic PPO checkpoint has: {error!r}"
        ) from error


def _apply(trainer, saved: Checkpoint, optimizer, scheduler, random_tensors) -> None:
    values = saved.values
    with torch.no_grad():
        for name, tensor in saved_tensors(trainer).items():
            tensor.copy_(_like(tensor, saved.parts["policy"][name]))
    trainer.optimizer.load_state_dict(_sharded(trainer, optimizer))
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict(scheduler)
    if trainer.accelerator.scaler is not None and values["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(values["scaler"])
    trainer.kl_ctl.value = values["kl"]["value"]
    for name, number in values["running"].items():
        setattr(trainer.running, name, number)
    for name, number in values["counters"].items():
        setattr(trainer, name, number)
    if values["highest_reward"] is not None:
        trainer.highest_reward = torch.tensor(values["highest_reward"])
    trainer._guard.skipped = values["skipped"]
    if values["trust_rollout"] is not None and hasattr(trainer._path, "_trust_rollout"):
        trainer._path._trust_rollout = values["trust_rollout"]
    # an out-of-memory error may have lowered it on the way; rounding follows from it
    trainer.config.max_tokens_per_micro_batch = values["token_budget"]
    trainer._rollouts.clear()
    if values["data"] is not None and isinstance(trainer.dataloader, Batches):
        trainer.dataloader.resume(values["data"])
    generator = getattr(getattr(trainer.dataloader, "_sampler", None), "generator", None)
    if generator is not None and "sampler" in random_tensors:
        generator.set_state(random_tensors["sampler"])
    # last: nothing above may draw
    ckpt.set_rng_state(random_tensors, values["random"][trainer.accelerator.process_index])


def _like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`whole` in the layout of `tensor`."""
    if not hasattr(tensor, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


def _sharded(trainer, optimizer: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state with its tensors laid out as the parameters they are about."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for index, state in optimizer["state"].items():
        like = parameters[index]
        state.update({k: _like(like, v) for k, v in state.items() if torch.is_tensor(v) and v.shape == like.shape})
    return optimizer


def _check(trainer, saved: Checkpoint) -> None:
    values, where = saved.values, saved.path
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise CheckpointError(
            f"{where}: not a checkpoint of PPOTrainer.save_checkpoint; it was written by something else"
        )
    if values["processes"] != trainer.accelerator.num_processes:
        raise CheckpointError(
            f"{where}: saved by {values['processes']} processes, this run has {trainer.accelerator.num_processes}: "
            "resume with the same number"
        )
    now = frozen(trainer)
    if values["frozen"].keys() != now.keys():
        raise CheckpointError(
            f"{where}: the saved run had {sorted(values['frozen']) or 'no'} frozen models, this one {sorted(now) or 'none'}: "
            "build model and ref_model as the saved run did"
        )
    for name, words in (("base", "the model below the adapters"), ("reference", "the reference model")):
        if values["frozen"].get(name) != now.get(name):
            raise CheckpointError(
                f"{where}: {words} is not the saved run's ({values['base'] or 'unnamed'}); start from the same one"
            )
    ckpt.check_tensors(f"{where}: policy", saved.parts["policy"], saved_tensors(trainer))
    _check_values(trainer, values, where)


def _check_values(trainer, values: Mapping[str, Any], where) -> None:
    for key, wanted in (("running", _running(trainer)), ("counters", _counters(trainer))):
        found = values[key]
        if found.keys() != wanted.keys() or not all(isinstance(x, (int, float)) for x in found.values()):
            raise CheckpointError(
                f"{where}: values.json: {key!r} must hold numbers named {sorted(wanted)}; got {found}"
            )
    if values["kl"]["type"] != type(trainer.kl_ctl).__name__:
        raise CheckpointError(
            f"{where}: saved with {values['kl']['type']}, this run has {type(trainer.kl_ctl).__name__}: "
            f"set adap_kl_ctrl={values['config']['adap_kl_ctrl']}"
        )
    if (values["scheduler"] is None) != (trainer.lr_scheduler is None):
        had, has = ("no", "one") if values["scheduler"] is None else ("a", "none")
        raise CheckpointError(f"{where}: the saved run had {had} lr_scheduler, this one has {has}: pass it as then")
    data = values["data"]
    if data is None or not isinstance(trainer.dataloader, Batches):
        return
    now = trainer.dataloader.state()
    for key, words in (("rows", "rows in the dataset"), ("batch", "rows in a batch")):
        if data[key] != now[key]:
            raise CheckpointError(
                f"{where}: the saved run had {data[key]} {words}, this one has {now[key]}: the place in the data is lost"
            )


def _check_optimizer(trainer, saved: Checkpoint, optimizer: Mapping[str, Any]) -> None:
    had, has = saved.values["optimizer"]["type"], _type_name(trainer.optimizer)
    if had != has:
        raise CheckpointError(f"{saved.path}: saved with the optimizer {had}, this run has {has}: pass the same kind")
    groups = [[len(g["params"]) for g in x["param_groups"]] for x in (optimizer, trainer.optimizer.state_dict())]
    if groups[0] != groups[1]:
        raise CheckpointError(
            f"{saved.path}: the saved optimizer has groups of {groups[0]} parameters, this run's {groups[1]}: build it alike"
        )
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for index, state in optimizer["state"].items():
        for name, tensor in state.items():
            if torch.is_tensor(tensor) and tensor.dim() and tensor.shape != parameters[index].shape:
                raise CheckpointError(
                    f"{saved.path}: the optimizer's {name!r} of parameter {index} is {tuple(tensor.shape)}, "
                    f"the parameter {tuple(parameters[index].shape)}"
                )


def _tell_changes(trainer, saved: Checkpoint) -> None:
    """A warning for every setting that is not as it was: the run goes on, but not as it would have."""
    now, then = _config(trainer), saved.values["config"]
    names = [n for n in now if n in then and now[n] != then[n] and n not in _FREE_FIELDS]
    if names:
        told = ", ".join(f"{name} {then[name]!r} -> {now[name]!r}" for name in names)
        logger.warning("resuming with changed settings: %s (learning rates come from the checkpoint)", told)
    if saved.values["threads"] != torch.get_num_threads():
        logger.warning(
            "resuming with %d threads, saved with %d: rounding will differ from an uninterrupted run's",
            torch.get_num_threads(),
            saved.values["threads"],
        )


# --- both, on disk ----------------------------------------------------------------------------------------------------


def save(trainer, folder, keep: int, extra: Any):
    """Collect on all processes, write on the main one; an error there is raised on all."""
    from accelerate.utils import broadcast_object_list

    parts, values = collect(trainer, extra)
    outcome = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            outcome[0] = ckpt.save_checkpoint(folder, trainer._steps_done, parts, values, keep=keep)
        except (CheckpointError, ValueError) as error:
            if trainer.accelerator.num_processes == 1:
                raise
            outcome[1] = str(error)
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise CheckpointError(outcome[1])
    return outcome[0]


def load(trainer, path, missing_ok: bool) -> Resumed | None:
    """From a checkpoint's folder, or from the newest whole one in a folder of them."""
    found, passed_over = ckpt.find(path)
    if trainer.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        chosen = [None if found is None else str(found.path)]
        broadcast_object_list(chosen)  # one process may not see yet what another wrote
        if chosen[0] is not None and (found is None or str(found.path) != chosen[0]):
            found = ckpt.load_checkpoint(chosen[0])
    for reason in passed_over:
        logger.warning("checkpoint passed over: %s", reason)
    if found is None:
        if missing_ok and not passed_over:
            return None
        raise CheckpointError("; ".join([f"{path}: no checkpoint that can be loaded", *passed_over]))
    apply(trainer, found)
    return Resumed(trainer._steps_done, str(found.path), passed_over, found.values["extra"])
