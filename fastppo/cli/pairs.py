"""Rows for the stages of the pipeline: preference pairs as they are, or made of texts with labels; their prompts."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastppo.chat import is_conversation
from fastppo.cli.errors import UserError
from fastppo.cli.prompts import load_rows
from fastppo.disk import make_folder, write_whole

Row = Mapping[str, Any]


def rows_of(source: str, split: str, flag: str) -> list[dict[str, Any]]:
    """load_rows, whose errors then name `flag`."""
    try:
        return load_rows(source, split)
    except UserError as error:
        raise UserError(str(error).replace("--dataset:", f"{flag}:", 1)) from error


def read_both(options: Any, read: Callable[[str, str], Any]) -> tuple[Any, Any]:
    """read(source, flag) of --dataset, and of --eval-dataset or None."""
    data = read(options.dataset, "--dataset")
    return data, read(options.eval_dataset, "--eval-dataset") if options.eval_dataset else None


def as_dataset(rows: Sequence[Row], where: str) -> Any:
    """A datasets.Dataset. Raises UserError where a column's values are of different kinds."""
    import pyarrow
    from datasets import Dataset

    try:
        return Dataset.from_list(list(rows))
    except (pyarrow.ArrowException, TypeError) as error:
        raise UserError(f"{where}: a column holds values of different kinds: {error}") from error


def check_columns(rows: Sequence[Row], wanted: Sequence[Sequence[str]], where: str) -> None:
    """Every row has all columns of one of `wanted`. Raises UserError naming what there is."""
    options = " or ".join(" + ".join(names) for names in wanted)
    fitting = [names for names in wanted if all(name in rows[0] for name in names)]
    if not fitting:
        raise UserError(f"{where} needs the columns {options}; it has {', '.join(rows[0])}")
    for number, row in enumerate(rows, 1):
        if not all(row.get(name) is not None for name in fitting[0]):
            missing = next(name for name in fitting[0] if row.get(name) is None)
            raise UserError(f"{where}: row {number} has no {missing!r}, which the first row has")


def pairs_of(rows: Sequence[Row], where: str, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """{"chosen", "rejected"[, "prompt", "margin"]} per row; texts with labels are paired at random, the larger label
    preferred. At most `count` pairs."""
    check_columns(rows, (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("text", "label")), where)
    if "label" not in rows[0] or "chosen" in rows[0]:
        check_sides(rows[:count], where)
        return [dict(row) for row in rows][:count]
    labels = two_labels(rows, where)
    sides = [[row["text"] for row in rows if row["label"] == label] for label in labels]
    draw = random.Random(seed)
    for side in sides:
        draw.shuffle(side)
    pairs = [{"chosen": chosen, "rejected": rejected} for rejected, chosen in zip(*sides, strict=False)]
    return pairs[:count]


def check_sides(rows: Sequence[Row], where: str) -> None:
    """Prompt and sides are text or messages. Raises UserError naming the row."""
    for number, row in enumerate(rows, 1):
        for name in ("prompt", "chosen", "rejected"):
            value = row.get(name)
            absent = value is None and (name == "prompt" or name not in rows[0])  # rows may be tokenised already
            if not (absent or isinstance(value, str) or is_conversation(value)):
                raise UserError(
                    f"{where}: row {number}: {name!r} must be text, or messages with 'role' and 'content'; got {value!r:.80}"
                )


def two_labels(rows: Sequence[Row], where: str) -> list[Any]:
    """The two values of column 'label', the preferred one last. Raises UserError."""
    wrong = [row for row in rows if not isinstance(row["text"], str)]
    if wrong:
        raise UserError(f"{where}: column 'text' must hold text; got {wrong[0]['text']!r:.80}")
    try:
        labels = sorted({row["label"] for row in rows})
    except TypeError as error:
        raise UserError(f"{where}: column 'label' must hold numbers or text: {error}") from error
    if len(labels) != 2:
        raise UserError(
            f"{where}: column 'label' must have two values, the larger one preferred; got {labels[:8]!r:.200}"
        )
    return labels


def demonstration(row: Row) -> dict[str, Any]:
    """What SFT learns of a pair: the chosen side."""
    if row.get("prompt"):
        return {"prompt": row["prompt"], "completion": row["chosen"]}
    return {"messages" if is_conversation(row["chosen"]) else "text": row["chosen"]}


def prompt_of(row: Row, words: int) -> dict[str, Any]:
    """What PPO answers: the pair's prompt, its conversation without the last turn, or the first words of its text."""
    if row.get("prompt"):
        return {"prompt": row["prompt"]}
    if is_conversation(row["chosen"]):
        return {"prompt": row["chosen"][:-1]}
    return {"prompt": " ".join(row["chosen"].split()[:words])}


def write_rows(path: Path, rows: Sequence[Row], convert: Callable[[Row], Row]) -> None:
    lines = [json.dumps(convert(row), ensure_ascii=False, default=str) for row in rows]
    make_folder(path.parent)
    write_whole(path, "\n".join(lines) + "\n")  # a pipeline that was killed here finds all rows or no file
