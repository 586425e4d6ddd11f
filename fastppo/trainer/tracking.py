"""Trackers: tensorboard, wandb and whatever else accelerate knows."""

import warnings

import torch

from fastppo.metrics import std


def start(accelerator, config) -> None:
    """accelerate's init_trackers; tensorboard takes flat hyper-parameters, the others one dict."""
    settings = config.to_dict()
    if config.log_with == "tensorboard":
        # tensorboard's hparams hold numbers and words only
        settings = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool, torch.Tensor))}
    else:
        settings = {"trl_ppo_trainer_config": settings}
    accelerator.init_trackers(config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs)


def check_columns(batch: dict, columns) -> None:
    missing = [name for name in columns if name not in batch]
    if missing:
        raise ValueError(f"Columns to log {missing} are not present in the batch, which has {list(batch)}")


def game_log(batch: dict, rewards: torch.Tensor, columns, accelerator):
    """A wandb table with one row per sequence: the columns and the reward; None where the batch lacks them."""
    import wandb

    if not all(name in batch for name in columns):
        warnings.warn(
            f"log_stats: no game_log: wandb's table needs {list(columns)} in the batch, which has {list(batch)}",
            UserWarning,
            stacklevel=3,
        )
        return None
    cells = [list(batch[name]) for name in columns]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        cells = [gather_object(column) for column in cells]
    rows = [list(row) for row in zip(*cells, rewards.cpu().tolist(), strict=True)]
    return wandb.Table(columns=[*columns, "reward"], rows=rows)


def reward_stats(rewards: torch.Tensor) -> dict:
    """env/: the rewards as handed in, before scaling and clipping."""
    return {
        "env/reward_mean": rewards.mean().item(),
        "env/reward_std": std(rewards).item(),
        "env/reward_dist": rewards.cpu().numpy(),
    }


def loggable(logs: dict, tracker: str | None) -> dict:
    """What the tracker can take: trackio warns of each array in every step, so it gets the numbers alone."""
    if tracker != "trackio":
        return logs
    return {name: float(value) for name, value in logs.items() if getattr(value, "ndim", 0) == 0}
