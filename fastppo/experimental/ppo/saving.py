"""What the late trainer writes and reads back: the policy alone, and checkpoints to go on from."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from fastppo import distributed, sharded_optimizer
from fastppo.experimental.ppo.state import OnlineTrainerState
from fastppo.run_folder import remove_old, whole_or_nothing

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

VALUE_FILE, RESUME_FILE, STATE_FILE = "value.safetensors", "resume.pt", "trainer_state.json"


def policy_state(trainer: "PPOTrainer") -> dict | None:
    """The policy's whole tensors where they are sharded; every process must call it."""
    return distributed.state_dict(trainer.policy_model) if distributed.fsdp_units(trainer._wrapper) else None


def save_checkpoint(trainer: "PPOTrainer") -> None:
    """`checkpoint-<step>` in args.output_dir, whole or not there; every process must call it."""
    args, folder = trainer.args, Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    resume, state = collect_resume(trainer), policy_state(trainer)
    if args.should_save:
        with whole_or_nothing(folder) as temporary:
            trainer._write_model(str(temporary), True, state)
            trainer.create_model_card(folder=temporary)
            save_resume(trainer, temporary, resume)
        remove_old(args.output_dir, args.save_total_limit)
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(folder))
    trainer.accelerator.wait_for_everyone()


class Resume(NamedTuple):
    """What a policy's folder lacks, with whole tensors. value: parameters of the value function by name."""

    value: dict[str, torch.Tensor]
    optimizer: dict


def collect_resume(trainer: "PPOTrainer") -> Resume:
    """Every process takes part: sharded tensors are gathered."""
    policy = {id(x) for x in trainer.policy_model.parameters()}
    value = {name: x for name, x in trainer._wrapper.named_parameters(remove_duplicate=True) if id(x) not in policy}
    value = {name: distributed.full_tensor(x.detach()).cpu().contiguous() for name, x in value.items()}
    return Resume(value, sharded_optimizer.save(trainer.optimizer))


def save_resume(trainer: "PPOTrainer", folder: Path, resume: Resume) -> None:
    """What a policy's folder lacks: value function, optimizer, schedule, state. Written by one process."""
    save_file(resume.value, folder / VALUE_FILE)
    states = {"optimizer": resume.optimizer, "lr_scheduler": trainer.lr_scheduler.state_dict()}
    torch.save(states | {"micro_rows": trainer.micro_rows}, folder / RESUME_FILE)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        name = type(callback).__name__
        if name in trainer.state.stateful_callbacks:
            trainer.state.stateful_callbacks[name] = callback.state()
    trainer.state.save_to_json(str(folder / STATE_FILE))


def load_weights(trainer: "PPOTrainer", folder: Path) -> None:
    """Put the weights back as they were saved, before accelerate lays them out."""
    for name in (VALUE_FILE, RESUME_FILE, STATE_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"PPOTrainer.train: {folder} is no checkpoint of a run: it has no {name}")
    if distributed.fsdp_units(trainer._wrapper):
        raise ValueError("PPOTrainer.train: its parameters are sharded already; resume with a new trainer")
    # transformers asks trainer.model about missing keys, and looks for FSDP's own files; here parameters are whole
    before = trainer.model, trainer.is_fsdp_enabled
    trainer.model, trainer.is_fsdp_enabled = trainer.policy_model, False
    try:
        trainer._load_from_checkpoint(str(folder), trainer.policy_model)
    finally:
        trainer.model, trainer.is_fsdp_enabled = before
    parameters = dict(trainer._wrapper.named_parameters())
    with torch.no_grad():
        for name, saved in load_file(folder / VALUE_FILE).items():
            parameters[name].copy_(saved)


def load_resume(trainer: "PPOTrainer", folder: Path) -> None:
    """Put optimizer, schedule and state back as `save_resume` found them."""
    states = torch.load(folder / RESUME_FILE, map_location="cpu", weights_only=True)
    sharded_optimizer.load(trainer.optimizer, states["optimizer"])
    trainer.lr_scheduler.load_state_dict(states["lr_scheduler"])
    trainer.micro_rows = states["micro_rows"]
    before = trainer.state
    trainer.state = OnlineTrainerState.load_from_json(str(folder / STATE_FILE))
    for name in ("is_local_process_zero", "is_world_process_zero", "max_steps"):
        setattr(trainer.state, name, getattr(before, name))
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
