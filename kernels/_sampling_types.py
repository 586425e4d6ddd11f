"""What sampling takes and returns: options, history, a row's sample; numbers that every back end shares."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

TILE = 1024  # the same on every back end: it is part of the map from random numbers to tokens
BAD_NUMBER, NOTHING_LEFT, BAD_HISTORY = -1, -2, -3  # what tokens_B holds in a row that cannot be sampled
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; every default switches its filter off. A wrong value raises ValueError."""

    temperature: float = 1.0  # > 0, divides the logits; 0 is argmax
    top_k: int = 0  # tokens kept, >= 1; 0 keeps all
    top_p: float = 1.0  # probability mass kept, [0, 1]
    min_p: float = 0.0  # least probability kept, relative to the largest, [0, 1]
    repetition_penalty: float = 1.0  # > 0; above 1 makes tokens of the history less likely
    logprob_temperature: float = 1.0  # > 0, of the raw log-prob and entropy

    def __post_init__(self):
        tests = (
            ("temperature", self.temperature == 0 or 1e-8 <= self.temperature < math.inf, "0 or in [1e-8, inf)"),
            ("top_k", self.top_k == int(self.top_k) and self.top_k >= 0, "a whole number >= 0 (0 keeps all)"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "in (0, inf)"),
            ("logprob_temperature", 1e-8 <= self.logprob_temperature < math.inf, "in [1e-8, inf)"),
        )
        for name, ok, want in tests:
            if not ok:
                raise ValueError(f"SamplingOptions: {name} must be {want}; got {getattr(self, name)!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


class History(NamedTuple):
    """The tokens that repetition_penalty looks at."""

    tokens_BL: torch.Tensor  # int64, in [0, V) where the mask is True
    mask_BL: torch.Tensor  # bool, True where a token counts


class Sample(NamedTuple):
    """One token per row. Where check=False let a bad row pass, its token is negative and its numbers are NaN."""

    tokens_B: torch.Tensor  # int64
    sampled_logprob_B: torch.Tensor  # float32, nats, of the distribution sampled from
    logprob_B: torch.Tensor  # float32, nats, of softmax(logits / logprob_temperature)
    entropy_B: torch.Tensor  # float32, nats, of the same
