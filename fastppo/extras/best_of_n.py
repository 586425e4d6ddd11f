"""Sample several answers, keep the best: what PPO has to beat."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastppo.core import set_seed
from fastppo.generation.arguments import check_arguments
from fastppo.models import SUPPORTED_ARCHITECTURES
from fastppo.score import as_scores
from fastppo.wanted import is_ids, is_whole, want


class BestOfNSampler:
    """Draws sample_size continuations per query and returns the n_candidates with the highest scores.

    queries_to_scores: texts (query and continuation) -> one number each.
    length_sampler: () -> max_new_tokens, once per query.
    seed: handed to set_seed at once.
    Raises ValueError for an argument of the wrong type, an n_candidates above sample_size, or an empty query.
    """

    def __init__(
        self,
        model,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], list[float]],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        if seed is not None:
            set_seed(seed)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"BestOfNSampler: tokenizer must be a transformers tokenizer; got {type(tokenizer).__name__}"
            )
        if not isinstance(model, SUPPORTED_ARCHITECTURES):
            names = " or ".join(architecture.__name__ for architecture in SUPPORTED_ARCHITECTURES)
            raise ValueError(f"BestOfNSampler: model must be an {names}; got {type(model).__name__}")
        functions = {"queries_to_scores": queries_to_scores, "length_sampler": length_sampler}
        for name, function in functions.items():
            want(callable(function), "BestOfNSampler", name, "a function", function)
        for name, size in (("sample_size", sample_size), ("n_candidates", n_candidates)):
            want(is_whole(size), "BestOfNSampler", name, "a whole number of at least 1", size)
        check_arguments({"generation_config": generation_config})
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(
                f"BestOfNSampler: n_candidates must be between 1 and sample_size ({sample_size}); got {n_candidates}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.sample_size = sample_size
        self.n_candidates = n_candidates
        self.gen_config = generation_config

    @torch.no_grad()
    def generate(
        self,
        tokenized_query: list[int] | Tensor | list[Tensor] | list[list[int]],
        skip_special_tokens: bool = True,
        device: torch.device | str | None = None,
        **generation_kwargs,
    ) -> list[list[str]]:
        """The best texts of each query, best first: [queries][n_candidates].

        tokenized_query: one query (token ids, or a 1-D tensor) or several (a list of either, or a 2-D tensor).
        """
        check_arguments(generation_kwargs)
        results = []
        for query in _as_queries(tokenized_query):
            length = self.length_sampler()
            want(is_whole(length, 1), "BestOfNSampler", "length_sampler()", "a whole number of at least 1", length)
            tokens = self.model.generate(
                query.repeat((self.sample_size, 1)).to(device),
                max_new_tokens=length,
                generation_config=self.gen_config,
                **generation_kwargs,
            )
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=skip_special_tokens)
            scores = as_scores(self.queries_to_scores(texts), len(texts), "BestOfNSampler: queries_to_scores")
            results.append([texts[index] for index in scores.topk(self.n_candidates).indices.tolist()])
        return results


def _as_queries(tokenized_query) -> list[Tensor]:
    """1-D tensors, whichever way they came."""
    where, wanted = "BestOfNSampler.generate", "token ids: of one query, or a list of those of several"
    if not isinstance(tokenized_query, (Tensor, list, tuple)):
        want(False, where, "tokenized_query", wanted, tokenized_query)
    if not len(tokenized_query):
        raise ValueError("BestOfNSampler.generate: tokenized_query is empty")
    if isinstance(tokenized_query, Tensor):
        queries = list(tokenized_query) if tokenized_query.dim() == 2 else [tokenized_query]
    else:
        queries = [tokenized_query] if isinstance(tokenized_query[0], int) else tokenized_query
    for query in queries:
        good = (
            is_ids(query)
            if isinstance(query, Tensor)
            else isinstance(query, (list, tuple)) and all(map(is_whole, query))
        )
        want(good, where, "tokenized_query", wanted, tokenized_query)
    return [torch.as_tensor(query).reshape(-1) for query in queries]
