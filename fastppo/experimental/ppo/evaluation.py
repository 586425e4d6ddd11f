"""Looking at the policy while it trains: a table of completions, and mean scores on the evaluation prompts."""

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from fastppo.experimental.ppo import updates
from fastppo.experimental.ppo.functions import print_rich_table

if TYPE_CHECKING:
    from fastppo.experimental.ppo.ppo_trainer import PPOTrainer

TABLE_TEMPERATURE = 0.01  # TRL's: nearly greedy
TABLE_ROWS = 20  # printed; all are logged


def generate_completions(trainer: "PPOTrainer", sampling: bool) -> dict[str, list]:
    """{"query", "model response", "score"}; printed by the main process and handed to wandb where it reports."""
    table: dict[str, list] = defaultdict(list)
    for number, batch in enumerate(trainer.get_eval_dataloader()):
        rollout = trainer.rollout(batch.prompts, trainer.args.seed + number, TABLE_TEMPERATURE)
        scores_B, _ = trainer.judge(rollout, batch.columns)
        tokenizer = trainer.tokenizer
        table["query"] += tokenizer.batch_decode(batch.prompts, skip_special_tokens=True)
        table["model response"] += tokenizer.batch_decode(rollout.responses)
        table["score"] += scores_B.tolist()
        if sampling:
            break
    if trainer.is_world_process_zero():
        print_rich_table({name: column[:TABLE_ROWS] for name, column in table.items()})
        _log_table(trainer, table)
    return dict(table)


def _log_table(trainer: "PPOTrainer", table: dict[str, list]) -> None:
    if "wandb" not in trainer.args.report_to:
        return
    import wandb

    if wandb.run is not None:
        rows = [list(row) for row in zip(*table.values(), strict=True)]
        wandb.log({"completions": wandb.Table(columns=list(table), data=rows)})


def evaluate(trainer: "PPOTrainer", dataloader: Any, prefix: str) -> dict[str, float]:
    """Means over the evaluation prompts, sampled at args.temperature with a fixed seed."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for number, batch in enumerate(dataloader):
        rollout = trainer.rollout(batch.prompts, trainer.args.seed + number)
        scores_B, _ = trainer.judge(rollout, batch.columns)
        experience, _ = updates.prepare(trainer, rollout, scores_B)
        kl_B = experience.kl_BT.sum(1)
        rlhf_B = experience.scores_B + experience.non_score_BT.sum(1)
        columns = (experience.scores_B, kl_B, rlhf_B, rollout.mask_BT.sum(1))
        sums += torch.stack([x.double().sum().cpu() for x in columns])
        count += len(scores_B)
    names = ("objective/scores", "objective/kl", "objective/rlhf_reward", "response_length")
    means = (sums / count).tolist()
    if any(math.isnan(x) for x in means):
        trainer.guard.report("an evaluation metric is NaN")
    return {f"{prefix}_{name}": x for name, x in zip(names, means, strict=True)}
