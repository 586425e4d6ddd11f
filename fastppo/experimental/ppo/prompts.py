"""Prompts for the rollout: any dataset to token ids, and batches of them that a resumed run finds again."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastppo.chat import is_conversation, prompt_ids
from fastppo.supervised import tokenise
from fastppo.wanted import is_ids, want


class PromptBatch(NamedTuple):
    """prompts: 1-D int64 tensors without padding. columns: the dataset's other columns, for reward functions."""

    prompts: list[torch.Tensor]
    columns: dict[str, list]


def prepare_prompts(dataset: Any, tokenizer: Any, args: Any, what: str = "train_dataset") -> Any:
    """`dataset` with `input_ids`: as it is, or tokenised from prompt, messages, query or text."""
    if dataset is None and what == "eval_dataset":
        return None
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"PPOTrainer: {what} must have a length (a map-style dataset); got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"PPOTrainer: {what} is empty")
    row = dataset[0]
    want(isinstance(row, (dict, str)), "PPOTrainer", what, "a dataset of dictionaries (datasets.Dataset)", dataset)
    if "input_ids" in row:
        if isinstance(row["input_ids"], str):
            raise ValueError(
                f"PPOTrainer: {what}: input_ids must be token ids; got text, which belongs in a column `prompt`"
            )
        first = torch.as_tensor(row["input_ids"])
        want(is_ids(first) or not first.numel(), "PPOTrainer", f"{what}[0]['input_ids']", "token ids", first)
        return dataset
    if not hasattr(dataset, "map"):
        raise ValueError(
            f"PPOTrainer: {what} without input_ids must be a datasets.Dataset; got {type(dataset).__name__}"
        )
    with args.main_process_first(desc="tokenising", local=False):
        return tokenise(dataset, row_prompt, args, "Tokenising prompts", fn_kwargs={"tokenizer": tokenizer})


def row_prompt(row: dict, tokenizer: Any) -> dict[str, list[int]]:
    """{"input_ids"}; an assistant's turn at the end of a conversation is left out: it is what the policy writes."""
    for name in ("prompt", "messages"):
        if is_conversation(row.get(name)) and row[name][-1]["role"] == "assistant":
            row = {**row, name: row[name][:-1]}
    return {"input_ids": prompt_ids(row, tokenizer)}


class PromptCollator:
    """Rows to a PromptBatch; `collator`, where given, pads and masks as the caller likes, and its padding is taken off."""

    def __init__(self, collator: Callable | None, pad_token_id: int):
        self.collator, self.pad_token_id = collator, pad_token_id

    def __call__(self, rows: list[dict]) -> PromptBatch:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("input_ids", "attention_mask")}
        if self.collator is None:
            prompts = [
                torch.as_tensor(row["input_ids"])[torch.as_tensor(row["attention_mask"]).bool()]
                if "attention_mask" in row
                else torch.as_tensor(row["input_ids"])
                for row in rows
            ]
            return PromptBatch([prompt.long() for prompt in prompts], columns)
        batch = self.collator(rows)
        tokens = torch.as_tensor(batch["input_ids"])
        mask = batch.get("attention_mask", tokens != self.pad_token_id)
        return PromptBatch([ids[real.bool()].long() for ids, real in zip(tokens, mask, strict=True)], columns)


class PromptStream(torch.utils.data.Sampler):
    """Indices of each update's prompts on this process: epoch after epoch, each in an order drawn from (seed, epoch).

    Update k is a function of k alone, so that a resumed run sees the prompts it would have seen.
    """

    def __init__(self, length: int, batch_size: int, updates: int, seed: int, rank: int = 0, processes: int = 1):
        self.length, self.batch_size, self.updates, self.seed = length, batch_size, updates, seed
        self.rank, self.processes = rank, processes
        self.first = 0  # updates done before

    def __len__(self) -> int:
        return self.updates - self.first

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.processes
        orders: dict[int, list[int]] = {}
        for update in range(self.first, self.updates):
            start = update * self.batch_size + self.rank * share
            indices = []
            for place in range(start, start + share):
                epoch, index = divmod(place, self.length)
                if epoch not in orders:
                    orders = {**{e: o for e, o in orders.items() if e >= epoch - 1}, epoch: self._order(epoch)}
                indices.append(orders[epoch][index])
            yield indices

    def _order(self, epoch: int) -> list[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.length, generator=draw).tolist()


def prompt_stream(args: Any, length: int, rank: int) -> PromptStream:
    """The stream of a dataset of `length` rows that args.data_seed, or args.seed, orders."""
    seed = args.seed if args.data_seed is None else args.data_seed
    return PromptStream(length, args.batch_size, args.num_total_batches, seed, rank, args.world_size)
