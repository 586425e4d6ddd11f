"""When a sequence ends: eos, its length, stop strings, and the caller's own criteria."""

import torch

from fastppo.generation.params import GenerationParams
from fastppo.generation.sampler import by_length
from fastppo.generation.sequence import Sequence


class Stopping:
    """finish reasons: "eos", "length", "stop"."""

    def __init__(self, params: GenerationParams, device: torch.device):
        self.eos = frozenset(params.eos)
        self._criteria = list(params.stopping_criteria)
        self._device = device
        if params.config.stop_strings:
            from transformers import StopStringCriteria

            if "tokenizer" not in params.arguments:
                raise ValueError(
                    "generate: stop_strings need a tokenizer: Generator(model, tokenizer) or tokenizer=..."
                )
            self._criteria.append(StopStringCriteria(params.arguments["tokenizer"], params.config.stop_strings))

    @property
    def is_plain(self) -> bool:
        """Whether only end-of-sequence tokens and the length stop a sequence."""
        return not self._criteria

    def reason(self, seq: Sequence, new: list[int]) -> str | None:
        """Why `seq` ends with these tokens, the last of which alone may end it."""
        return "eos" if new[-1] in self.eos else "length" if seq.num_new + len(new) >= seq.limit else None

    def __call__(self, seqs: list[Sequence], tokens: list[int], logits_BV: torch.Tensor) -> list[str | None]:
        """The reason for each sequence that ends with its new token, else None."""
        reasons = [self.reason(seq, [token]) for seq, token in zip(seqs, tokens, strict=True)]
        if self._criteria:
            self._ask_criteria(seqs, tokens, logits_BV, reasons)
        return reasons

    def _ask_criteria(self, seqs, tokens, logits_BV, reasons) -> None:
        for rows, _ in by_length(seqs):
            ids = torch.tensor([[*seqs[i].tokens, tokens[i]] for i in rows], device=self._device)
            scores = logits_BV[torch.tensor(rows, device=self._device)]
            for criterion in self._criteria:
                done = torch.as_tensor(criterion(ids, scores)).broadcast_to((len(rows),)).tolist()
                for i, stop in zip(rows, done, strict=True):
                    if stop and reasons[i] != "eos":
                        reasons[i] = "stop"
