"""`fastppo reward`: a reward model from preference pairs (chosen, rejected[, prompt, margin]), or from texts with labels.

fastppo reward --model runs/sft/model --dataset pairs.jsonl --eval-dataset held-out.jsonl --output-dir runs/reward
"""

from collections.abc import Sequence
from typing import Any

from fastppo.cli.stage_options import Figure, Stage

PANELS = (
    ("loss", "Loss", "- log sigmoid(r(chosen) - r(rejected)), 0.69 is chance", "#0b7a75"),
    ("accuracy", "Accuracy", "share of training pairs with chosen above rejected", "#5b5f97"),
    ("margin", "Margin", "r(chosen) - r(rejected)", "#2f6690"),
    ("learning_rate", "Learning rate", "", "#7b8794"),
)
COLUMNS = (
    ("loss", "loss", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("margin", "margin", "{:.2f}"),
    ("eval_accuracy", "held-out accuracy", "{:.1%}"),
)


def build(options: Any, config: Any) -> Any:
    from fastppo import RewardTrainer
    from fastppo.cli.pairs import as_dataset, pairs_of, read_both, rows_of
    from fastppo.cli.stage import adapter, told_errors
    from fastppo.core import set_seed

    def read(source: str, flag: str) -> Any:
        rows = rows_of(source, options.dataset_split, flag)
        return as_dataset(pairs_of(rows, f"{flag}: {source}", seed=config.seed), f"{flag}: {source}")

    data, held_out = read_both(options, read)
    set_seed(config.seed)  # before the score layer, whose weights start at random
    with told_errors():
        return RewardTrainer(
            options.model, config, train_dataset=data, eval_dataset=held_out, peft_config=adapter(options, "SEQ_CLS")
        )


STAGE = Stage(
    "reward",
    "fastppo:RewardConfig",
    build,
    PANELS,
    COLUMNS,
    (Figure("loss", "loss"), *(Figure(name, name, first=False) for name in ("accuracy", "eval_accuracy"))),
)


def run(argv: Sequence[str]) -> int:
    return STAGE.run(argv, __doc__)
