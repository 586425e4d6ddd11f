"""A classic trainer's whole state as the parts of a checkpoint, and back: checked first, then put in place.

policy.safetensors     parameters and buffers with the value head; with PEFT what trains only (the base is named)
optimizer.safetensors  the optimizer's tensors, whole; under DeepSpeed every process's part of them and of the float32 weights
random.safetensors     generators of every process (torch, CUDA, numpy, Python, the dataloader's)
values.json            optimizer and scheduler settings, KL controller, running moments, place in the data, counters
"""

import logging
from typing import Any, NamedTuple

import torch

from fastppo import checkpoint as ckpt
from fastppo import distributed, sharded_optimizer, zero
from fastppo.checkpoint import Checkpoint, CheckpointError
from fastppo.trainer import state_parts
from fastppo.trainer.columns import Batches
from fastppo.trainer.state_checks import KIND, check_finite, check_optimizer, check_random, check_trainer, tell_changes
from fastppo.trainer.state_parts import (
    base_name,
    config_values,
    frozen,
    random_state,
    saved_tensors,
    trained,
    type_name,
    unwrapped,
)

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """step: steps that were done.   path: the checkpoint.   passed_over: why newer ones were not taken.   extra: as saved."""

    step: int
    path: str
    passed_over: list[str]
    extra: Any


# --- save -------------------------------------------------------------------------------------------------------------


def collect(trainer, extra: Any) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(parts, values) for fastppo.checkpoint.save_checkpoint; with many processes all must call it."""
    optimizer_tensors, optimizer_tree = sharded_optimizer.save(trainer.accelerator, trainer.optimizer)
    scheduler = None if trainer.lr_scheduler is None else ckpt.split_tensors(trainer.lr_scheduler.state_dict())
    random_tensors, random_values = random_state(trainer)
    policy = distributed.whole_tensors(trainer.accelerator, trainer.model, lambda: saved_tensors(trainer))
    with distributed.together(trainer.accelerator, "looking at the weights to save"):
        check_finite((name, policy[name]) for name in trained(trainer) if name in policy)
    parts = {"policy": policy, "optimizer": optimizer_tensors, "random": random_tensors}
    if scheduler and scheduler[0]:
        parts["scheduler"] = scheduler[0]
    scaler = trainer.accelerator.scaler
    values = {
        "kind": KIND,
        "processes": trainer.accelerator.num_processes,
        "config": config_values(trainer),
        "base": base_name(trainer),
        "frozen": frozen(trainer),
        "optimizer": {"type": type_name(trainer.optimizer), "tree": optimizer_tree},
        "scheduler": None if scheduler is None else scheduler[1],
        "scaler": None if scaler is None else scaler.state_dict(),
        "kl": {"type": type(trainer.kl_ctl).__name__, "value": float(trainer.kl_ctl.value)},
        "running": state_parts.running(trainer),
        "counters": state_parts.counters(trainer),
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


# --- load -------------------------------------------------------------------------------------------------------------


def apply(trainer, saved: Checkpoint) -> None:
    """Make `trainer` what the saved one was. Raises CheckpointError, the trainer untouched, when it does not fit."""
    try:
        check_trainer(trainer, saved)
        check_optimizer(trainer, saved)
        scheduler = ckpt.join_tensors(saved.parts.get("scheduler", {}), saved.values["scheduler"])
        rank = trainer.accelerator.process_index
        own = {n.partition(".")[2]: t for n, t in saved.parts["random"].items() if n.startswith(f"{rank}.")}
        check_random(own, saved.values["random"][rank])
        tell_changes(trainer, saved)
        _apply(trainer, saved, scheduler, own)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{saved.path}: its values.json lacks or garbles what a classic PPO checkpoint has: {error!r}"
        ) from error


def _apply(trainer, saved: Checkpoint, scheduler, random_tensors) -> None:
    values, accelerator = saved.values, trainer.accelerator
    sharded_optimizer.load(accelerator, trainer.optimizer, saved.parts["optimizer"], values["optimizer"]["tree"])
    with zero.writable(unwrapped(trainer)), torch.no_grad():
        for name, tensor in saved_tensors(trainer).items():
            tensor.copy_(sharded_optimizer.shard_like(saved.parts["policy"][name], tensor))
    if trainer.lr_scheduler is not None:
        trainer.lr_scheduler.load_state_dict(scheduler)
    if accelerator.scaler is not None and values["scaler"] is not None:
        accelerator.scaler.load_state_dict(values["scaler"])
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
    ckpt.set_rng_state(random_tensors, values["random"][accelerator.process_index])


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
    with distributed.together(trainer.accelerator, "looking for a checkpoint"):
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
