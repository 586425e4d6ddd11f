"""`fastppo sft`: supervised fine-tuning on text, messages, prompts with completions, or the chosen side of pairs.

fastppo sft --model gpt2 --dataset demonstrations.jsonl --output-dir runs/sft --learning-rate 2e-5
"""

from collections.abc import Sequence
from typing import Any

from fastppo.cli.stage_options import Figure, Stage

PANELS = (
    ("loss", "Loss", "nats per token", "#0b7a75"),
    ("mean_token_accuracy", "Token accuracy", "share of tokens that were the most likely one", "#5b5f97"),
    ("entropy", "Entropy", "nats per token", "#b8860b"),
    ("learning_rate", "Learning rate", "", "#7b8794"),
)
COLUMNS = (
    ("loss", "loss", "{:.3f}"),
    ("mean_token_accuracy", "accuracy", "{:.1%}"),
    ("eval_loss", "held-out loss", "{:.3f}"),
    ("learning_rate", "rate", "{:.2g}"),
)


def build(options: Any, config: Any) -> Any:
    from fastppo import SFTTrainer
    from fastppo.cli.pairs import as_dataset, check_columns, demonstration, read_both, rows_of
    from fastppo.cli.stage import adapter, told_errors

    def read(source: str, flag: str) -> Any:
        rows = rows_of(source, options.dataset_split, flag)
        text = config.dataset_text_field
        check_columns(
            rows, (("messages",), ("prompt", "completion"), (text,), ("input_ids",), ("chosen",)), f"{flag}: {source}"
        )
        known = {"messages", "completion", "input_ids", text}
        if not known & set(rows[0]):
            rows = [demonstration(row) for row in rows]
        return as_dataset(rows, f"{flag}: {source}")

    data, held_out = read_both(options, read)
    with told_errors():
        return SFTTrainer(
            options.model, config, train_dataset=data, eval_dataset=held_out, peft_config=adapter(options, "CAUSAL_LM")
        )


STAGE = Stage(
    "sft",
    "fastppo:SFTConfig",
    build,
    PANELS,
    COLUMNS,
    (Figure("loss", "loss"), Figure("eval_loss", "eval_loss")),
)


def run(argv: Sequence[str]) -> int:
    return STAGE.run(argv, __doc__)
