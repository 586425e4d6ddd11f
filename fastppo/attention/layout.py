"""How the tokens of one forward pass are laid out, and the context variable that carries it to the attention layers.

Suffixes: N packed tokens, B sequences, H heads, D head dimension.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

_LAYOUT: ContextVar[Any] = ContextVar("fastppo_attention_layout", default=None)

# a bucket of sequences is padded to its longest; a sequence shorter than this share of it opens the next bucket
MIN_FILL = 0.75
# below this length a call costs more than the padding it saves
SHORT = 48


class Bucket(NamedTuple):
    """Sequences padded together to [b, t].

    tokens: int64, packed indices of the bucket's tokens.   slots: where each of them sits in the flat [b * t].
    gather: int64 [b * t], packed index for each slot; a padding slot repeats its sequence's first token.
    start: packed index of the first token when the bucket is a plain view of the packed tokens, else None.
    """

    b: int
    t: int
    tokens: torch.Tensor
    slots: torch.Tensor
    gather: torch.Tensor
    start: int | None


@dataclass(frozen=True, eq=False)
class Packed:
    """B sequences, one after the other, in one row of N tokens; each token sees itself and those before it.

    cu_seqlens: int32 [B + 1], 0 and the running sums of the lengths.   max_seqlen: the longest.
    lengths: the same lengths as Python ints; taken from cu_seqlens (a host sync on a GPU) when not given.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self):
        if not self.lengths:
            object.__setattr__(self, "lengths", self.cu_seqlens.diff().tolist())
        if any(n < 1 for n in self.lengths):
            raise ValueError(f"packed: every sequence needs at least one token; got lengths {self.lengths}")
        if max(self.lengths) > self.max_seqlen:
            raise ValueError(f"packed: max_seqlen is {self.max_seqlen} but a sequence has {max(self.lengths)} tokens")

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """[1, N] int64: 0, 1, ... within each sequence. Pass them to the model."""
        device = self.cu_seqlens.device
        starts_N = torch.repeat_interleave(
            self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long(), output_size=sum(self.lengths)
        )
        return (torch.arange(sum(self.lengths), device=device) - starts_N)[None]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The sequences grouped by length, longest first, so that little of a padded batch is padding."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        for i in order:
            longest = self.lengths[groups[-1][0]] if groups else 0
            if groups and (self.lengths[i] >= MIN_FILL * longest or longest <= SHORT):
                groups[-1].append(i)
            else:
                groups.append([i])
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        return [self._bucket(sorted(group), starts) for group in groups]

    def _bucket(self, group: list[int], starts: list[int]) -> Bucket:
        device = self.cu_seqlens.device
        b, t = len(group), max(self.lengths[i] for i in group)
        start_b1 = torch.tensor([[starts[i]] for i in group])
        length_b1 = torch.tensor([[self.lengths[i]] for i in group])
        t_1t = torch.arange(t)[None]
        real_bt = t_1t < length_b1
        gather_bt = torch.where(real_bt, start_b1 + t_1t, start_b1)
        view = bool(real_bt.all()) and group[-1] - group[0] == b - 1
        return Bucket(
            b,
            t,
            tokens=gather_bt[real_bt].to(device),
            slots=real_bt.flatten().nonzero()[:, 0].to(device),
            gather=gather_bt.flatten().to(device),
            start=starts[group[0]] if view else None,
        )


def current():
    """The layout of the running forward pass, or None."""
    return _LAYOUT.get()


@contextlib.contextmanager
def using(layout) -> Iterator[Any]:
    """Set the layout that attention layers see inside the block."""
    token = _LAYOUT.set(layout)
    try:
        yield layout
    finally:
        _LAYOUT.reset(token)
