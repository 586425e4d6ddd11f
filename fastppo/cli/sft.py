"""`fastppo sft`: supervised fine-tuning on text, messages, prompts with completions, or the chosen side of pairs.

fastppo sft --model gpt2 --dataset demonstrations.jsonl --output-dir runs/sft --learning-rate 2e-5
"""

from collections.abc import Sequence
from typing import Any

from fastppo.cli.stage_options import StageOptions, read_stage

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
    from fastppo.cli.pairs import as_dataset, check_columns, demonstration, rows_of
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

    data = read(options.dataset, "--dataset")
    held_out = read(options.eval_dataset, "--eval-dataset") if options.eval_dataset else None
    with told_errors("fastppo sft"):
        return SFTTrainer(
            options.model, config, train_dataset=data, eval_dataset=held_out, peft_config=adapter(options, "CAUSAL_LM")
        )


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from fastppo.cli.stage import first_and_last

    found = {"steps": max((row["step"] for row in rows), default=0)}
    for name in ("loss", "eval_loss"):
        if both := first_and_last(rows, name, 1):
            found |= {f"{name}_first": both[0], f"{name}_last": both[1]}
    return found


def stage() -> Any:
    from fastppo.cli.stage import Stage

    return Stage("sft", build, PANELS, COLUMNS, results)


def run(argv: Sequence[str]) -> int:
    from fastppo import SFTConfig
    from fastppo.cli.stage import run_stage

    given = read_stage(argv, StageOptions, SFTConfig, "fastppo sft", __doc__)
    return run_stage(stage(), given, SFTConfig)[0]
