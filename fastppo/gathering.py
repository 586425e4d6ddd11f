"""A batch's tensors, and lists of sequences, of all processes: however many there are, in two exchanges."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.distributed import everyones, table

if TYPE_CHECKING:
    from accelerate import Accelerator


def gather(accelerator: "Accelerator", tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor of all processes, one after the other along dimension 0, in which they may differ; the same on all."""
    if accelerator.num_processes == 1:
        return dict(tensors)
    lengths_PK = table(accelerator, [len(x) for x in tensors.values()]).long()
    row_bytes_K = torch.tensor([x.shape[1:].numel() * x.element_size() for x in tensors.values()])
    bytes_PK = lengths_PK * row_bytes_K
    own = torch.cat([x.detach().flatten().view(torch.uint8) for x in tensors.values()])
    padded = own.new_zeros(int(bytes_PK.sum(1).max()))
    padded[: len(own)] = own
    received_P = everyones(accelerator, padded)
    parts_PK = [row[: sum(sizes)].split(sizes) for row, sizes in zip(received_P, bytes_PK.tolist(), strict=True)]
    return {
        name: torch.cat(parts_P).view(x.dtype).view(-1, *x.shape[1:])
        for (name, x), parts_P in zip(tensors.items(), zip(*parts_PK, strict=True), strict=True)
    }


def flat_lists(lists: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Lists of 1-D tensors, none of them empty, as tensors for gather()."""
    flat = {}
    for name, items in lists.items():
        flat[f"{name} items"] = torch.cat(list(items))
        flat[f"{name} lengths"] = torch.tensor([len(x) for x in items], device=flat[f"{name} items"].device)
    return flat


def list_of(gathered: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """What flat_lists made of the list `name`, on the CPU."""
    return list(gathered[f"{name} items"].cpu().split(gathered[f"{name} lengths"].tolist()))
