"""Types and ranges of generate's arguments, looked at before transformers does (where a wrong one fails late or not at all)."""

import operator
from typing import Any

import torch

from fastppo.wanted import are_callables, check, is_flag, is_number, is_whole


def _each(holds):
    """Whether a value, or every one of a list of them, holds."""

    def one_or_all(x: Any) -> bool:
        return len(x) > 0 and all(map(holds, x)) if _is_list(x) else holds(x)

    return one_or_all


def _is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple)) or isinstance(x, torch.Tensor) and x.dim() == 1


def _is_config(x: Any) -> bool:
    from transformers import GenerationConfig

    return isinstance(x, GenerationConfig)


_AT_LEAST_1 = ("a whole number of at least 1", lambda x: is_whole(x, 1))
_WHOLE, _NUMBER = ("a whole number", is_whole), ("a number", is_number)
_IDS = ("a token id or a list of them (-1: none)", _each(is_whole))
_PROBABILITY = ("a number from 0 to 1", lambda x: is_number(x, 0, 1))
_FUNCTIONS = ("a list of functions (or objects that can be called)", are_callables)
_RULES = {
    "max_new_tokens": ("a whole number of at least 1, or a list with one per prompt", _each(lambda x: is_whole(x, 1))),
    **dict.fromkeys(("max_length", "num_return_sequences", "num_beams"), _AT_LEAST_1),
    **dict.fromkeys(("min_length", "min_new_tokens", "pad_token_id", "bos_token_id"), _WHOLE),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"), _IDS),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "logprob_temperature"), _NUMBER),
    **dict.fromkeys(("typical_p", "epsilon_cutoff", "eta_cutoff"), _PROBABILITY),
    # TRL's scripts write top_k=0.0
    "top_k": ("a whole number", lambda x: is_number(x) and x == int(x)),
    "no_repeat_ngram_size": ("a whole number of at least 0", lambda x: is_whole(x, 0)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ("a list of token ids", _each(is_whole))),
    "do_sample": ("True or False", is_flag),
    **dict.fromkeys(("logits_processor", "stopping_criteria"), _FUNCTIONS),
    "prefix_allowed_tokens_fn": ("a function of (batch index, token ids)", callable),
    "streamer": ("a transformers streamer", lambda x: hasattr(x, "put")),
    "max_time": ("a number of seconds", lambda x: is_number(x, 0)),
    "generation_config": ("a transformers GenerationConfig", _is_config),
    "tokenizer": ("a transformers tokenizer", lambda x: hasattr(x, "decode")),
    "stop_strings": ("a text or a list of texts", _each(lambda x: isinstance(x, str) and x != "")),
    "seed": ("None or a whole number", is_whole),
    "first_prompt": ("a whole number of at least 0", lambda x: is_whole(x, 0)),
}


def check_arguments(given: dict[str, Any]) -> None:
    """ValueError for an argument of generate() that is not of the kind, or in the range, that it has to be."""
    check("generate", given, _RULES)


def limits_of(max_new_tokens: Any) -> list[int] | int | None:
    """max_new_tokens (checked) as one int for all prompts, or as a list with one per prompt."""
    if max_new_tokens is None or not _is_list(max_new_tokens):
        return None if max_new_tokens is None else operator.index(max_new_tokens)
    return [operator.index(x) for x in max_new_tokens]
