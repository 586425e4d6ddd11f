"""Rows of any SFT dataset to batches: tokenise, cut, pack several sequences into a row, pad what is left.

After `prepare_dataset` a row has `input_ids` and `labels` (-100: no loss), and `seq_lengths` when it is packed.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from fastppo.chat import sft_ids
from fastppo.packing import best_fit_decreasing
from fastppo.supervised import keep_rows, pad_rows, tokenise

if TYPE_CHECKING:
    from fastppo.sft import SFTConfig

PACKING_BATCH = 1000  # rows packed together: bounds memory, and bins are nearly full already


class SFTCollator:
    """Rows to right-padded `input_ids`, `attention_mask`, `labels`; a packed row gives each of its sequences a line."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens, labels = [], []
        for row in rows:
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                tokens.append(row["input_ids"][start : start + length])
                labels.append(row["labels"][start : start + length])
                start += length
        return {
            "input_ids": pad_rows(tokens, self.pad_token_id),
            "attention_mask": pad_rows([[1] * len(row) for row in tokens], 0),
            "labels": pad_rows(labels, -100),
        }


def prepare_dataset(
    dataset: Any, tokenizer: Any, args: "SFTConfig", packing: bool, formatting_func: Callable | None = None
) -> Any:
    """Rows with `input_ids` and `labels`, no longer than max_length, packed when asked."""
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return dataset
    with args.main_process_first(desc="tokenising", local=False):
        if formatting_func is not None:
            name = args.dataset_text_field
            dataset = tokenise(dataset, lambda row: {name: formatting_func(row)}, args, "Formatting")
        options = {
            "tokenizer": tokenizer,
            "text_field": args.dataset_text_field,
            "completion_only": args.completion_only_loss,
            "assistant_only": args.assistant_only_loss,
        }
        if args.assistant_only_loss:
            check_generation_marks(dataset, tokenizer)
        dataset = tokenise(dataset, sft_ids, args, "Tokenising", fn_kwargs=options)
        split = packing and args.packing_strategy != "bfd"
        if args.max_length is not None and not split:
            dataset = tokenise(dataset, truncate, args, "Truncating", fn_kwargs={"args": args})
        dataset = keep_rows(dataset, has_label, args, "Dropping rows without a label")
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        return pack_dataset(dataset, args) if packing else dataset


def check_generation_marks(dataset: Any, tokenizer: Any) -> None:
    row = next(iter(dataset))
    conversational = isinstance(row.get("messages") or row.get("prompt"), list)
    if not conversational and "input_ids" not in row:
        raise ValueError(f"SFTConfig: assistant_only_loss needs messages; the dataset has the columns {sorted(row)}")
    if conversational and "generation %}" not in (tokenizer.chat_template or ""):
        raise ValueError(
            "SFTConfig: assistant_only_loss needs {% generation %} ... {% endgeneration %} around assistant turns in the "
            "chat template; this tokenizer's template has none. Use a prompt + completion dataset, or another template"
        )


def truncate(row: dict, args: "SFTConfig") -> dict:
    part = slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
    return {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}


def has_label(row: dict) -> bool:
    """Whether the loss sees any token: the first one is never predicted."""
    return any(label != -100 for label in row["labels"][1:])


def pack_dataset(dataset: Any, args: "SFTConfig") -> Any:
    """Rows of up to max_length tokens with `seq_lengths` (one long stream cut in pieces for "wrapped")."""
    columns = list(next(iter(dataset)))
    options = {"batched": True, "batch_size": PACKING_BATCH, "remove_columns": columns, "fn_kwargs": {"args": args}}
    return tokenise(dataset, pack_rows, args, "Packing", **options)


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def pack_rows(rows: dict[str, list], args: "SFTConfig") -> dict[str, list]:
    size = args.max_length
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    if args.packing_strategy == "wrapped":
        ids, labels = (joined(pair[i] for pair in pairs) for i in (0, 1))
        cuts = range(0, len(ids), size)
        return {"input_ids": [ids[i : i + size] for i in cuts], "labels": [labels[i : i + size] for i in cuts]}
    pieces = [(ids[i : i + size], labels[i : i + size]) for ids, labels in pairs for i in range(0, len(ids), size)]
    bins = best_fit_decreasing([len(ids) for ids, _ in pieces], size)
    return {
        "input_ids": [joined(pieces[i][0] for i in members) for members in bins],
        "labels": [joined(pieces[i][1] for i in members) for members in bins],
        "seq_lengths": [[len(pieces[i][0]) for i in members] for members in bins],
    }
