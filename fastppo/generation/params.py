"""What a caller asked for: transformers' generation arguments, resolved as transformers resolves them.

Sampling itself (temperature, top-k, top-p, min-p, repetition penalty, minimum lengths) runs in our sampler. Other
processors are transformers' own objects, called on sequences of one length at a time so that they never see padding.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fastppo.generation.arguments import check_arguments
from fastppo.kernels.sampling import SamplingOptions

# fields that need transformers' processors, with the values that switch them off (as does None)
_PROCESSOR_FIELDS: dict[str, tuple] = {
    **dict.fromkeys(("sequence_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "top_h"), ()),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits"), (False,)),
    **dict.fromkeys(("no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (0,)),
    "typical_p": (1.0,),
}
# arguments of model.generate that are not GenerationConfig fields
_ARGUMENTS = {"logits_processor", "stopping_criteria", "tokenizer", "generation_config"}
_SLOW_ARGUMENTS = {"prefix_allowed_tokens_fn", "assistant_model", "streamer", "negative_prompt_ids", "custom_generate"}
_SLOW_ARGUMENTS |= {"negative_prompt_attention_mask", "synced_gpus", "assistant_tokenizer"}
# fields that model.generate uses for the form of its result, or for its own cache, and that mean nothing here
_SLOW_FIELDS = {
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "max_time": (None,),
    "dola_layers": (None,),
}


@dataclass(frozen=True)
class GenerationParams:
    """One generate call. config: transformers' resolved GenerationConfig.   slow: why model.generate has to do it."""

    config: Any
    arguments: dict[str, Any]
    sampling: SamplingOptions
    eos: tuple[int, ...]
    pad: int
    slow: str | None = None
    logits_processor: list[Callable] = field(default_factory=list)
    stopping_criteria: list[Callable] = field(default_factory=list)

    @property
    def num_return_sequences(self) -> int:
        return self.config.num_return_sequences or 1

    def max_new_tokens(self, prompt_length: int) -> int:
        """max_new_tokens, or what max_length leaves."""
        if self.config.max_new_tokens is not None:
            return self.config.max_new_tokens
        return self.config.max_length - prompt_length

    def min_new_tokens(self, prompt_length: int) -> int:
        """Tokens before which eos must not come."""
        if self.config.min_new_tokens is not None:
            return self.config.min_new_tokens
        return (self.config.min_length or 0) - prompt_length

    @cached_property
    def needs_processors(self) -> bool:
        return bool(self.logits_processor) or any(map(self._set, _PROCESSOR_FIELDS))

    def _set(self, name: str) -> bool:
        return getattr(self.config, name, None) not in (None, *_PROCESSOR_FIELDS[name])


_AFTER_WARPERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def resolve(model, tokenizer, generation_kwargs: dict[str, Any], logprob_temperature: float) -> GenerationParams:
    """GenerationParams of `model.generate(**generation_kwargs)`: arguments > generation_config > the model's > defaults.

    Raises ValueError for a name that is none of generate's, with the nearest one that is, and for values out of range.
    """
    given = {name: x for name, x in generation_kwargs.items() if x is not None or name not in _SLOW_ARGUMENTS}
    arguments = {name: given.pop(name) for name in list(given) if name in _ARGUMENTS | _SLOW_ARGUMENTS}
    given_config = arguments.pop("generation_config", None)
    _refuse_unknown(model, given)
    config, _ = model._prepare_generation_config(given_config, **given)
    sources = (given.get("max_length"), getattr(given_config, "max_length", None), model.generation_config.max_length)
    if config.max_new_tokens is None and all(x is None for x in sources):
        config.max_new_tokens = 20  # transformers' default, where nobody gave a length
    check_arguments(vars(config))  # a model's own generation_config.json can be as wrong
    tokenizer = arguments.pop("tokenizer", None) or tokenizer
    eos = config.eos_token_id
    eos = torch.as_tensor([] if eos is None else eos).reshape(-1).tolist()
    eos = tuple(x for x in eos if x >= 0)
    return GenerationParams(
        config,
        arguments | ({"tokenizer": tokenizer} if tokenizer is not None else {}),
        _sampling(config, logprob_temperature),
        eos,
        _pad(config, tokenizer, eos),
        _slow(config, arguments),
        list(arguments.get("logits_processor") or ()),
        list(arguments.get("stopping_criteria") or ()),
    )


def _refuse_unknown(model, given: dict[str, Any]) -> None:
    known = set(vars(type(model.generation_config)())) | _ARGUMENTS | _SLOW_ARGUMENTS
    known = {name for name in known if not name.startswith("_")}
    inputs = set(inspect.signature(model.forward).parameters)
    for name in given:
        if name in ("attention_mask", "input_ids", "inputs", "position_ids", "past_key_values"):
            raise ValueError(f"generate: {name} follows from the prompts, which are given as a list without padding")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            where = " (an input of the model, which prompts can't have here)" if name in inputs else ""
            raise ValueError(f"generate: unknown argument {name!r}{where}{hint}")


def _sampling(config, logprob_temperature: float) -> SamplingOptions:
    penalty = 1.0 if config.repetition_penalty is None else config.repetition_penalty
    shared = {"repetition_penalty": penalty, "logprob_temperature": logprob_temperature}
    if not config.do_sample:
        return SamplingOptions(temperature=0.0, **shared)
    return SamplingOptions(
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_k=int(config.top_k or 0),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        min_p=float(config.min_p or 0.0),
        **shared,
    )


def _pad(config, tokenizer, eos: tuple[int, ...]) -> int:
    for token in (config.pad_token_id, getattr(tokenizer, "pad_token_id", None), *eos):
        if token is not None and token >= 0:
            return int(token)
    return 0


def _slow(config, arguments: dict[str, Any]) -> str | None:
    if set_arguments := [name for name in _SLOW_ARGUMENTS if arguments.get(name) is not None]:
        return f"{set_arguments[0]} is given"
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        return f"the generation mode is {getattr(mode, 'value', mode).replace('_', ' ')}"
    for name, off in _SLOW_FIELDS.items():
        if getattr(config, name, None) not in off:
            return f"{name}={getattr(config, name)!r} is given"
    return None
