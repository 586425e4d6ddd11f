"""Whether a checkpoint fits a classic trainer: everything is checked before anything is changed."""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastppo import checkpoint as ckpt
from fastppo import zero
from fastppo.checkpoint import Checkpoint
from fastppo.disk import CheckpointError, read_json
from fastppo.run_folder import STATE
from fastppo.trainer.columns import Batches
from fastppo.trainer.state_parts import (
    config_values,
    counters,
    frozen,
    running,
    saved_tensors,
    trained,
    type_name,
    whole_shape,
)

logger = logging.getLogger("fastppo.trainer.state")

KIND = "classic-ppo"
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
# fields that say where and how a run runs, not what it computes
_FREE_FIELDS = (
    "steps",
    "exp_name",
    "task_name",
    "model_name",
    "log_with",
    "tracker_project_name",
    "query_dataset",
    "total_ppo_epochs",
)


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_whole(x, least: int = 0) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x < 2**63


def _is_count(x) -> bool:
    return x is None or _is_whole(x)


# trainer_state.json of transformers: what a run that goes on computes with
_STATE = {
    "global_step": ("a count", _is_whole),
    "episode": ("a count", _is_whole),
    "max_steps": ("a count", _is_whole),
    "num_train_epochs": ("a count", _is_whole),
    "train_batch_size": ("a count or null", _is_count),
    "best_global_step": ("a count or null", _is_count),
    "epoch": ("a number or null", lambda x: x is None or _is_number(x) and math.isfinite(x)),
    "total_flos": ("a number", lambda x: _is_number(x) and math.isfinite(x)),
    "num_input_tokens_seen": ("a number", _is_number),
    "best_metric": ("a number or null", lambda x: x is None or _is_number(x)),
    "best_model_checkpoint": ("text or null", lambda x: x is None or isinstance(x, str)),
    "stateful_callbacks": ("an object", lambda x: isinstance(x, dict)),
    "log_history": ("a list of objects", lambda x: isinstance(x, list) and all(isinstance(row, dict) for row in x)),
}
_SCALARS = {
    "config": ("an object", lambda x: isinstance(x, dict)),
    "base": ("text", lambda x: isinstance(x, str)),
    "highest_reward": ("a number or null", lambda x: x is None or _is_number(x)),
    "skipped": ("a count", _is_whole),
    "trust_rollout": ("true, false or null", lambda x: x is None or isinstance(x, bool)),
    "token_budget": ("a count or null", lambda x: x is None or _is_whole(x, 1)),
    "threads": ("a count", lambda x: _is_whole(x, 1)),
    "scaler": ("an object or null", lambda x: x is None or isinstance(x, dict)),
    "random": ("a list", lambda x: isinstance(x, list)),
}


def check_savable(optimizer: torch.optim.Optimizer) -> None:
    """Raise CheckpointError now, or after the first step, which makes the state, where a checkpoint could not hold it."""

    def check(state: Mapping[str, Any]) -> None:
        try:
            ckpt.split_tensors(state)
        except CheckpointError as error:
            raise CheckpointError(
                f"{type_name(optimizer)}: its {error}. Choose another optimizer, or train without its state in the checkpoints: "
                "save_only_model=True (--save-only-model)."
            ) from error

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if waiting:
            waiting.pop()
            check(optimizer.state_dict())

    check({"param_groups": optimizer.state_dict()["param_groups"]})
    waiting = [
        True,
        True,
    ]  # twice: torch may call it after super().step() already, before a subclass made its own state
    optimizer.register_step_post_hook(after_step)


def check_finite(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise CheckpointError for NaN and infinity among trained weights: saving them would push out what can go on."""
    for name, parameter in parameters:
        mine = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
        if mine.dtype in _FLOATS and not mine.isfinite().all():
            raise CheckpointError(
                f"the weight {name!r} holds NaN or infinity: the run has diverged. Go on from an older checkpoint, "
                "with a lower learning rate or max_grad_norm set."
            )


def check_trainer(trainer, saved: Checkpoint) -> None:
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
    wanted = {n: torch.empty(whole_shape(x), dtype=x.dtype, device="meta") for n, x in saved_tensors(trainer).items()}
    ckpt.check_tensors(f"{where}: policy", saved.parts["policy"], wanted)
    try:
        check_finite((name, saved.parts["policy"][name]) for name in trained(trainer))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    _check_values(trainer, values, where)
    if (done := values["counters"]["_steps_done"]) != saved.step:
        raise CheckpointError(f"{where}: the checkpoint of step {saved.step} holds a run of {done} steps")


def _check_values(trainer, values: Mapping[str, Any], where) -> None:
    for key, wanted in (("running", running(trainer)), ("counters", counters(trainer))):
        found = values[key]
        if found.keys() != wanted.keys() or not all(map(_is_number, found.values())):
            raise CheckpointError(
                f"{where}: values.json: {key!r} must hold numbers named {sorted(wanted)}; got {found}"
            )
    for key, (wanted, holds) in _SCALARS.items():
        if not holds(values[key]):
            raise CheckpointError(f"{where}: values.json: {key!r} must be {wanted}; got {values[key]!r:.80}")
    if not _is_number(values["kl"]["value"]) or not math.isfinite(values["kl"]["value"]):
        raise CheckpointError(
            f"{where}: values.json: the KL coefficient must be a number; got {values['kl']['value']!r}"
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
    for key in ("epoch", "done", "seed"):
        if not _is_whole(data[key]) and not (key == "seed" and data["done"] == 0):
            raise CheckpointError(f"{where}: values.json: the data's {key!r} must be a count; got {data[key]!r}")
    for key, words in (("rows", "rows in the dataset"), ("batch", "rows in a batch")):
        if data[key] != now[key]:
            raise CheckpointError(
                f"{where}: the saved run had {data[key]} {words}, this one has {now[key]}: the place in the data is lost"
            )


def check_state(folder: Path, step: int) -> None:
    """Raise CheckpointError unless trainer_state.json is of step `step` and of the types that transformers computes with."""
    state = read_json(folder / STATE)
    for key, (wanted, holds) in _STATE.items():
        if key in state and not holds(state[key]):
            raise CheckpointError(f"{folder / STATE}: {key!r} must be {wanted}; got {state[key]!r:.80}")
    if state.get("global_step") != step:
        raise CheckpointError(
            f"{folder / STATE}: it is of step {state.get('global_step')}, the checkpoint of step {step}"
        )


def check_random(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Raise what set_rng_state raises for such a state, with the generators as they were."""
    before = ckpt.rng_state()
    try:
        ckpt.set_rng_state(tensors, values)
    finally:
        ckpt.set_rng_state(*before)


def _sort(value) -> type:
    """Its type as it comes back from JSON; a whole number may stand for any."""
    return float if _is_number(value) else list if isinstance(value, tuple) else type(value)


# State with a number for each of a parameter's. Factored (Adafactor) and quantised optimizers have others beside it.
_LIKE_PARAMETERS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"}
_LIKE_PARAMETERS |= {"square_avg", "grad_avg", "acc_delta", "sum", "prev"}


def check_optimizer(trainer, saved: Checkpoint) -> None:
    tensors, tree = saved.parts["optimizer"], saved.values["optimizer"]["tree"]
    under_zero = zero.engine_of(trainer.accelerator) is not None
    if zero.is_saved_by_it(tree) != under_zero:
        raise CheckpointError(
            f"{saved.path}: its optimizer was saved {'without' if under_zero else 'under'} DeepSpeed, this run goes on "
            f"{'under' if under_zero else 'without'} it: launch the run as it was"
        )
    if under_zero:
        zero.check_optimizer(trainer.accelerator, tensors, tree)
    else:
        _check_whole_optimizer(trainer, saved, ckpt.join_tensors(tensors, tree))


def _check_whole_optimizer(trainer, saved: Checkpoint, optimizer: Mapping[str, Any]) -> None:
    had, has = saved.values["optimizer"]["type"], type_name(trainer.optimizer)
    if had != has:
        raise CheckpointError(f"{saved.path}: saved with the optimizer {had}, this run has {has}: pass the same kind")
    groups = [[len(g["params"]) for g in x["param_groups"]] for x in (optimizer, trainer.optimizer.state_dict())]
    if groups[0] != groups[1]:
        raise CheckpointError(
            f"{saved.path}: the saved optimizer has groups of {groups[0]} parameters, this run's {groups[1]}: build it alike"
        )
    for then, now in zip(optimizer["param_groups"], trainer.optimizer.state_dict()["param_groups"], strict=True):
        wrong = [n for n in now if n not in then or _sort(then[n]) is not _sort(now[n])]
        if wrong or then["params"] != now["params"]:
            raise CheckpointError(
                f"{saved.path}: the optimizer's setting {(wrong or ['params'])[0]!r} is missing or not what {has} has"
            )
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for index, state in optimizer["state"].items():
        if not _is_whole(index) or index >= len(parameters):
            raise CheckpointError(f"{saved.path}: the saved optimizer has a parameter {index!r}, this run's does not")
        for name, tensor in state.items():
            if torch.is_tensor(tensor) and name in _LIKE_PARAMETERS and tensor.shape != parameters[index].shape:
                raise CheckpointError(
                    f"{saved.path}: the optimizer's {name!r} of parameter {index} is {tuple(tensor.shape)}, "
                    f"the parameter {tuple(parameters[index].shape)}"
                )


def tell_changes(trainer, saved: Checkpoint) -> None:
    """A warning for every setting that is not as it was: the run goes on, but not as it would have."""
    now, then = config_values(trainer), saved.values["config"]
    names = [n for n in now if n in then and now[n] != then[n] and n not in _FREE_FIELDS]
    if names:
        told = ", ".join(f"{name} {then[name]!r} -> {now[name]!r}" for name in names)
        logger.warning("resuming with changed settings: %s (learning rates come from the checkpoint)", told)
    tell_threads(saved.values["threads"])


def tell_threads(then: int) -> None:
    if then != torch.get_num_threads():
        logger.warning(
            "resuming with %d threads, saved with %d: rounding will differ from an uninterrupted run's",
            torch.get_num_threads(),
            then,
        )
