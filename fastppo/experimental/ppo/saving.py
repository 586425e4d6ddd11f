"""What the late trainer writes and reads back: the policy alone, and checkpoints to go on from."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from fastppo import distributed, trainer_checkpoints, zero
from fastppo.disk import CheckpointError, told_as_garbled
from fastppo.experimental.ppo.state import OnlineTrainerState
from fastppo.trainer_checkpoints import RESUME, STATE

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

VALUE = "value"


def policy_state(trainer: "PPOTrainer") -> dict | None:
    """The policy's whole tensors where they are sharded; every process must call it."""
    # before train() nothing is laid out yet
    if not distributed.fsdp_units(trainer._wrapper) and not zero.engine_of(trainer.accelerator):
        return None
    return distributed.whole_tensors(trainer.accelerator, trainer._wrapper, trainer.policy_model.state_dict)


def save_checkpoint(trainer: "PPOTrainer") -> None:
    """`checkpoint-<step>` in args.output_dir, whole or not there; every process must call it."""
    value, state = value_tensors(trainer), policy_state(trainer)

    def write_policy(folder: Path) -> None:
        trainer._write_model(str(folder), True, state)
        trainer.create_model_card(folder=folder)

    more = {"micro_rows": trainer.micro_rows}
    trainer_checkpoints.save(trainer, trainer._wrapper, write_policy, {VALUE: value}, more)


def value_tensors(trainer: "PPOTrainer") -> dict[str, torch.Tensor]:
    """Parameters of the value function by name, whole; every process must call it."""
    policy = {id(x) for x in trainer.policy_model.parameters()}
    value = {name: x for name, x in trainer._wrapper.named_parameters(remove_duplicate=True) if id(x) not in policy}
    return distributed.whole_tensors(trainer.accelerator, trainer._wrapper, lambda: value)


def load_weights(trainer: "PPOTrainer", folder: Path) -> None:
    """Put the weights back as they were saved, unless accelerate will lay them out in another way: then load_resume does it."""
    for name in (f"{VALUE}.safetensors", RESUME, STATE):
        if not (folder / name).is_file():
            raise CheckpointError(f"PPOTrainer.train: {folder} is no checkpoint of a run: it has no {name}")
    if distributed.fsdp_units(trainer._wrapper):
        raise ValueError("PPOTrainer.train: its parameters are sharded already; resume with a new trainer")
    trainer_checkpoints.check_fits(trainer, trainer._wrapper, trainer_checkpoints.read(folder))
    if trainer_checkpoints.is_laid_out(trainer):
        return
    before, trainer.model = trainer.model, trainer.policy_model  # transformers asks it about missing keys
    try:
        with told_as_garbled(folder):
            super(trainer_checkpoints.SafeCheckpoints, trainer)._load_from_checkpoint(str(folder), trainer.policy_model)
    finally:
        trainer.model = before
    parameters = dict(trainer._wrapper.named_parameters())
    with torch.no_grad(), told_as_garbled(folder):
        for name, saved in load_file(folder / f"{VALUE}.safetensors").items():
            parameters[name].copy_(saved)


def load_resume(trainer: "PPOTrainer", folder: Path) -> None:
    """Put optimizer, schedule and state back as `save_checkpoint` found them."""
    saved = trainer_checkpoints.read(folder)
    if trainer_checkpoints.is_laid_out(trainer):
        value = load_file(folder / f"{VALUE}.safetensors")
        trainer_checkpoints.load_laid_out(trainer, trainer.policy_model, folder, value)
    trainer_checkpoints.load_optimizer(trainer, saved)
    before = trainer.state
    with told_as_garbled(folder):
        trainer.micro_rows = int(saved.values["micro_rows"])
        trainer.state = OnlineTrainerState.load_from_json(str(folder / STATE))
    for name in ("is_local_process_zero", "is_world_process_zero", "max_steps"):
        setattr(trainer.state, name, getattr(before, name))
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)


def load_random(trainer: "PPOTrainer", folder: Path) -> None:
    """Put the random generators back; what is drawn after it is what the saved run drew."""
    trainer_checkpoints.load_random(trainer, trainer_checkpoints.read(folder))
