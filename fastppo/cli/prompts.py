"""Prompts for `fastppo train`: rows of a JSONL, JSON or Parquet file, or of a dataset on the hub; text or chat messages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastppo.cli.errors import UserError, nearest, one_line
from fastppo.cli.loop import Prompt

# Columns that hold prompts in well-known datasets; the first one that is there is taken when none is named.
COLUMNS = ("prompt", "query", "messages", "question", "instruction", "text")


def load_rows(source: str, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a file (.jsonl, .json, .parquet), a folder that `datasets` saved, or a dataset on the hub."""
    path = Path(source)
    if path.suffix in (".jsonl", ".ndjson", ".json", ".parquet"):
        if not path.is_file():
            raise UserError(f"--dataset: there is no file {source}")
        rows = read_parquet(path) if path.suffix == ".parquet" else read_json(path)
    elif path.is_file():
        raise UserError(f"--dataset: {source} must end in .jsonl, .json or .parquet; got {path.suffix!r}")
    else:
        rows = load_with_datasets(source, split)
    if not rows:
        raise UserError(f"--dataset: {source} is empty: there is nothing to train on")
    return rows


def read_json(path: Path) -> list[dict[str, Any]]:
    """One object per line; a file that starts with [ is one list of objects."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--dataset: cannot read {path}: {error}") from error
    # not splitlines(): that also cuts at what may stand in a JSON string, U+2028 and U+0085 among it
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if text.lstrip().startswith("["):
        lines = [(1, text)]
    rows = []
    for number, line in lines:
        try:
            read = json.loads(line)
            if "\\ud" in line.lower():  # half a character may be written so, and no tokenizer takes it
                json.dumps(read, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            raise UserError(f"--dataset: {path}, line {number + error.lineno - 1}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in ...
            raise UserError(f"--dataset: {path}, line {number}: cannot be read: {one_line(error)}") from error
        rows += read if isinstance(read, list) else [read]
    wrong = [row for row in rows if not isinstance(row, dict)]
    if wrong:
        raise UserError(f'--dataset: {path}: every row must be an object like {{"prompt": ...}}; got {wrong[0]!r:.80}')
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"--dataset: cannot read {path}: {error}") from error


def load_with_datasets(source: str, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        if Path(source).is_dir() and (
            (Path(source) / "state.json").exists() or (Path(source) / "dataset_dict.json").exists()
        ):
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.DatasetDict) and split not in loaded:
                raise UserError(f"--dataset-split: {source} has no split {split!r}.{nearest(split, loaded)}")
            return (loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded).to_list()
        return datasets.load_dataset(source, split=split).to_list()
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
    ) as error:  # not found, no network, no such split, unreadable files: each says which
        raise UserError(
            f"--dataset: {source} is no file here, and could not be loaded as a dataset: {type(error).__name__}: {error}"
        ) from error


def find_column(rows: Sequence[Mapping[str, Any]], asked: str | None, source: str) -> str:
    names = list(rows[0])
    if asked is not None:
        if asked not in names:
            raise UserError(f"--prompt-column: {source} has no column {asked!r}.{nearest(asked, names)}")
        return asked
    found = next((name for name in COLUMNS if name in names), None)
    if found is None:
        raise UserError(
            f"--dataset: {source} has none of the columns {', '.join(COLUMNS)}; it has {', '.join(names)}. "
            "Name the one that holds the prompts with --prompt-column."
        )
    return found


def to_text(value: Any, tokenizer: Any, where: str) -> tuple[str, bool]:
    """(text, is a chat) of one prompt: text as it is; messages through the tokenizer's chat template."""
    if isinstance(value, str) and value.strip():
        return value, False
    is_chat = isinstance(value, (list, tuple)) and value and all(isinstance(m, Mapping) and "role" in m for m in value)
    if not is_chat:
        raise UserError(f"{where}: a prompt must be text, or messages with 'role' and 'content'; got {value!r:.200}")
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the prompts are chat messages, but the model's tokenizer has no chat template")
    messages = list(value[:-1]) if value[-1]["role"] == "assistant" else list(value)  # the answer is the policy's part
    if not messages:
        raise UserError(f"{where}: there is no message before the assistant's: nothing to answer")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), True
    except Exception as error:  # a template may raise anything, and its own words
        raise UserError(f"{where}: the chat template refuses {messages!r:.200}: {one_line(error)}") from error


def make_prompts(
    rows: Sequence[Mapping[str, Any]], column: str, tokenizer: Any, longest: int | None, room: int | None
) -> list[Prompt]:
    """Tokenized prompts, each cut to its first `longest` tokens; `room` is what the model's positions leave for it."""
    prompts = []
    for number, row in enumerate(rows, 1):
        where = f"--dataset: row {number}"
        if column not in row:
            raise UserError(f"{where} has no column {column!r}, which the first row has")
        text, is_chat = to_text(row[column], tokenizer, where)
        tokens = tokenizer(text, add_special_tokens=not is_chat).input_ids
        if not tokens:
            raise UserError(f"{where}: the tokenizer makes no token of {text!r:.80}")
        if longest is not None and len(tokens) > longest:
            tokens = tokens[:longest]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
        if room is not None and len(tokens) > room:
            raise UserError(
                f"{where}: {len(tokens)} prompt tokens and the response do not fit into the model's positions. "
                f"Use --prompt-tokens {max(room, 1)} or a smaller --max-new-tokens."
            )
        columns = {name: value for name, value in row.items() if name != column}
        prompts.append(Prompt(text, torch.tensor(tokens), columns))
    return prompts
