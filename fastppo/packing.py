"""Sequences into fixed-size rows (best fit decreasing), and padded batches into one packed sequence.

Suffixes: B sequences, T tokens of the longest, N tokens of all sequences (packed), N1 = [1, N] as models take them.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import torch


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths add up to at most `capacity`.

    Longest first, each into the fullest bin that still has room, so bins come out nearly full in O(n log n)
    (Johnson, 1974: at most 11/9 of the optimum + 1 bin). Equal lengths keep their order.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"best_fit_decreasing: a sequence of {max(lengths)} tokens does not fit {capacity}")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[index], -1))
        if place < len(room):
            free, number = room.pop(place)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(room, (free - lengths[index], number))
    return bins


class PackedBatch(NamedTuple):
    """A padded batch without its padding.

    tokens_1N, positions_1N: int64; positions restart at 0 in every sequence. cu_seqlens: int32 [B + 1].
    max_seqlen: longest sequence. kept_BT: bool, where the N tokens sit in the padded batch.
    """

    tokens_1N: torch.Tensor
    positions_1N: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    kept_BT: torch.Tensor

    def pick(self, values_BT: torch.Tensor) -> torch.Tensor:
        """values_BT at the packed tokens, [N, ...]."""
        return values_BT[self.kept_BT]


def pack(tokens_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> PackedBatch:
    """`tokens_BT` where `mask_BT` (1 or True = a token), sequence after sequence; padding may be on either side."""
    kept_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    if kept_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"pack: mask_BT must have the shape of tokens_BT, {tuple(tokens_BT.shape)}; got {tuple(kept_BT.shape)}"
        )
    lengths_B = kept_BT.sum(1)
    lengths_B = lengths_B[lengths_B > 0]  # an empty sequence has no token to attend to
    cu_seqlens = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)).int()
    positions_BT = kept_BT.cumsum(1) - 1
    longest = int(lengths_B.max()) if lengths_B.numel() else 0
    return PackedBatch(tokens_BT[kept_BT][None], positions_BT[kept_BT][None], cu_seqlens, longest, kept_BT)
