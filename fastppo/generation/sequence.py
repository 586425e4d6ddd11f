"""One response on its way: prompt, tokens so far, and the pages that hold their keys and values."""

import itertools
from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """One response, or, until its prompt is computed, all responses to the same prompt.

    rows: which responses of the rollout this is.   limits: the most new tokens of each.   seeds: of each.
    tokens: prompt and what was generated.   num_computed: how many of them have keys and values in pages.
    block_table: its pages, in order.
    """

    prompt_length: int
    tokens: list[int]
    rows: list[int]
    limits: list[int]
    seeds: list[int]
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    registered_blocks: int = 0  # how many leading pages others may share
    finish_reason: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def row(self) -> int:
        return self.rows[0]

    @property
    def seed(self) -> int:
        return self.seeds[0]

    @property
    def limit(self) -> int:
        return self.limits[0]

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def most_tokens(self) -> int:
        """Tokens whose keys and values may have to be held; the last one sampled never needs any."""
        return self.prompt_length + max(self.limits) - 1

    def split(self, most: int) -> list["Sequence"]:
        """The same prompt for at most `most` responses each."""
        parts = []
        for start in range(0, len(self.rows), most):
            rows, limits, seeds = (x[start : start + most] for x in (self.rows, self.limits, self.seeds))
            parts.append(Sequence(self.prompt_length, list(self.tokens), rows, limits, seeds))
        return parts

    def children(self) -> list["Sequence"]:
        """One sequence per response, still without pages."""
        return self.split(1)


def group_equal_prompts(prompts: list[list[int]], limits: list[int], seeds: list[int]) -> list[Sequence]:
    """One Sequence per different prompt, in order of first appearance, with every response that it starts."""
    groups: dict[tuple[int, ...], Sequence] = {}
    for row, tokens, limit, seed in zip(itertools.count(), prompts, limits, seeds, strict=False):
        group = groups.setdefault(tuple(tokens), Sequence(len(tokens), list(tokens), [], [], []))
        group.rows.append(row)
        group.limits.append(limit)
        group.seeds.append(seed)
    return list(groups.values())
