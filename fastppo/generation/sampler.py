"""From logits to tokens: our sampler, with transformers' logits processors where the caller asked for some.

Suffixes: B sequences of this step, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from fastppo.generation.params import _AFTER_WARPERS, GenerationParams
from fastppo.generation.sequence import Sequence
from fastppo.kernels.sampling import Sample, SamplingOptions, sample


class Sampler:
    """Samples one token for each sequence; a sequence's tokens depend on its seed and its own logits only."""

    def __init__(self, params: GenerationParams, model, device: torch.device):
        self._params, self._model, self._device = params, model, device
        self._options = params.sampling
        self._whole_list = any(params._set(name) for name in _AFTER_WARPERS) and params.config.do_sample
        self._processors: dict[int, list] = {}
        self._eos = torch.tensor(params.eos, dtype=torch.int64, device=device)
        params.config._eos_token_tensor = self._eos if params.eos else None
        self._longest_minimum = max(params.config.min_new_tokens or 0, params.config.min_length or 0)

    @property
    def options(self) -> SamplingOptions:
        return self._options

    @property
    def is_plain(self) -> bool:
        """Whether a token depends on nothing but the logits, the options and the seed."""
        minimum = self._params.eos and self._longest_minimum
        return not (self._params.needs_processors or minimum or self._options.repetition_penalty != 1.0)

    def __call__(self, logits_BV: torch.Tensor, seqs: list[Sequence], seeds_B, positions_B) -> Sample:
        if not self._params.needs_processors:
            options = {"banned": self._banned(seqs, logits_BV.shape[1]), "history": self._history(seqs)}
            # the loop looks for negative tokens when it reads them: another look here would wait for a GPU once more
            return sample(logits_BV, seeds_B, positions_B, self._options, **options, check=False)
        scores_BV = self._process(logits_BV.float(), seqs)
        # the processors did everything that needs the history; when they did the warpers too, only drawing is left
        left = replace(self._options, repetition_penalty=1.0)
        if self._whole_list:
            left = SamplingOptions(logprob_temperature=left.logprob_temperature)
        drawn = sample(scores_BV, seeds_B, positions_B, left)
        return drawn._replace(**_raw(logits_BV, drawn.tokens_B, self._options.logprob_temperature))

    def _banned(self, seqs: list[Sequence], V: int) -> torch.Tensor | None:
        if not self._params.eos or not self._longest_minimum:
            return None
        early = [seq.num_new < self._params.min_new_tokens(seq.prompt_length) for seq in seqs]
        if not any(early):
            return None
        banned_BV = torch.zeros(len(seqs), V, dtype=torch.bool, device=self._device)
        banned_BV[:, self._eos] = torch.tensor(early, device=self._device)[:, None]
        return banned_BV

    def _history(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self._options.repetition_penalty == 1.0:
            return None
        longest = max(map(len, seqs))
        tokens_BL = torch.tensor([seq.tokens + [0] * (longest - len(seq)) for seq in seqs], device=self._device)
        lengths_B1 = torch.tensor([[len(seq)] for seq in seqs], device=self._device)
        return tokens_BL, torch.arange(longest, device=self._device)[None] < lengths_B1

    def _process(self, logits_BV: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
        scores_BV = torch.empty_like(logits_BV)
        for rows, prompt_length in by_length(seqs):
            ids = torch.tensor([seqs[i].tokens for i in rows], device=self._device)
            rows = torch.tensor(rows, device=self._device)
            scores = logits_BV[rows]
            for processor in self._list(prompt_length):
                scores = processor(ids, scores)
            scores_BV[rows] = scores.float()
        return scores_BV

    def _list(self, prompt_length: int) -> list:
        """transformers' processors for prompts of this length; the last ones only if our sampler can't do them."""
        if prompt_length not in self._processors:
            config, custom = self._params.config, self._params.logits_processor
            kept = {} if self._whole_list else {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
            before = {name: getattr(config, name) for name in (*kept, "max_length")}
            try:
                for name, x in kept.items():
                    setattr(config, name, x)
                config.max_length = prompt_length + self._params.max_new_tokens(prompt_length)
                self._processors[prompt_length] = list(
                    self._model._get_logits_processor(
                        config, input_ids_seq_length=prompt_length, logits_processor=custom, device=self._device
                    )
                )
            finally:
                for name, x in before.items():
                    setattr(config, name, x)
        return self._processors[prompt_length]


def by_length(seqs: list[Sequence]) -> Iterable[tuple[list[int], int]]:
    """(rows, prompt length) of groups of sequences that need no padding to form one batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, seq in enumerate(seqs):
        groups.setdefault((len(seq), seq.prompt_length), []).append(i)
    return [(rows, prompt_length) for (_, prompt_length), rows in groups.items()]


def _raw(logits_BV, tokens_B, temperature: float) -> dict[str, torch.Tensor]:
    logp_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    entropy_B = -(logp_BV.exp() * logp_BV.masked_fill(logp_BV == -torch.inf, 0.0)).sum(-1)
    return {"logprob_B": logp_BV.gather(1, tokens_B[:, None])[:, 0], "entropy_B": entropy_B}
