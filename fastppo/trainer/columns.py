"""The classic trainer's dataset: columns that the loop needs, shuffled into full batches."""

import torch

EXTRA_COLUMNS = ("label", "query", "response")


def signature_columns(model) -> list[str]:
    """Columns worth keeping: the model's forward arguments and what scripts read from a batch."""
    import inspect

    return [*inspect.signature(model.forward).parameters, *EXTRA_COLUMNS]


def remove_unused_columns(dataset, columns: list[str]):
    """`dataset` (a datasets.Dataset) without the columns that are not in `columns`."""
    return dataset.remove_columns([name for name in dataset.column_names if name not in columns])


def dataloader(dataset, batch_size: int, collator) -> torch.utils.data.DataLoader:
    """Shuffled batches of exactly `batch_size` rows; a shorter last one is dropped."""
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, collate_fn=collator, shuffle=True, drop_last=True
    )
