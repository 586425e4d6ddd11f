"""The classic trainer's dataset: columns that the loop needs, shuffled into full batches whose place can be saved."""

from collections.abc import Iterator
from typing import Any

import torch

EXTRA_COLUMNS = ("label", "query", "response")


def signature_columns(model) -> list[str]:
    """Columns worth keeping: the model's forward arguments and what scripts read from a batch."""
    import inspect

    return [*inspect.signature(model.forward).parameters, *EXTRA_COLUMNS]


def remove_unused_columns(dataset, columns: list[str]):
    """`dataset` (a datasets.Dataset) without the columns that are not in `columns`."""
    return dataset.remove_columns([name for name in dataset.column_names if name not in columns])


def check_length(dataset, batch_size: int) -> None:
    """ValueError for a dataset that makes no batch (a loop over the dataloader would do nothing, in silence)."""
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    if rows is None or rows >= batch_size:
        return
    kept = getattr(dataset, "column_names", True)
    why = (
        ""
        if kept
        else ": none of its columns is an input of the model, a label, query or response (remove_unused_columns=False keeps all)"
    )
    raise ValueError(f"dataset has {rows} rows, fewer than batch_size ({batch_size}), so it makes no batch{why}")


class EpochSampler(torch.utils.data.RandomSampler):
    """RandomSampler (the same draws from the same generator) whose order can be made again: seed of the epoch, rows taken."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.seed: int | None = None  # of the epoch that runs
        self.resume_at: tuple[int, int] | None = None  # (seed, rows to skip) for the next epoch

    def __iter__(self) -> Iterator[int]:
        skipped = 0
        if self.resume_at is not None:
            (self.seed, skipped), self.resume_at = self.resume_at, None
        else:
            self.seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator).item())
        order = torch.randperm(len(self.data_source), generator=torch.Generator().manual_seed(self.seed))
        yield from order[skipped:].tolist()


def dataloader(dataset, batch_size: int, collator) -> torch.utils.data.DataLoader:
    """Shuffled batches of exactly `batch_size` rows; a shorter last one is dropped."""
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, collate_fn=collator, sampler=EpochSampler(dataset), drop_last=True
    )


class Batches:
    """The trainer's dataloader (accelerate's, whose attributes it has) that knows how far it is.

    epoch: passes that were finished.   done: batches of the running pass that were handed out.
    """

    def __init__(self, loader, sampler: EpochSampler, batch_size: int, processes: int):
        self._loader, self._sampler, self._rows = loader, sampler, batch_size * processes
        self.epoch = self.done = 0
        self._resumed = False

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        iterator, resumed, self._resumed = iter(self._loader), self._resumed, False
        if not resumed:
            self.done = 0
        else:
            # the pass had begun before: what beginning it draws from the generator was drawn then
            state = torch.get_rng_state()
            first = next(iterator, None)
            torch.set_rng_state(state)
            if first is not None:
                self.done += 1
                yield first
        for batch in iterator:
            self.done += 1
            yield batch
        self.epoch, self.done = self.epoch + 1, 0

    def state(self) -> dict[str, Any] | None:
        """JSON for a checkpoint; None where accelerate put its own sampler in the place of ours."""
        ended = self.done == len(self)
        if self.done and not ended and self._sampler.seed is None:
            return None
        place = {"epoch": self.epoch + ended, "done": 0 if ended else self.done, "seed": self._sampler.seed}
        return place | {"rows": len(self._sampler.data_source), "batch": self._rows}

    def resume(self, state: dict[str, Any]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]
        self._resumed = self.done > 0
        self._sampler.resume_at = (state["seed"], self.done * self._rows) if self.done else None
