"""PPOTrainer.generate: prompts in, responses out, and what the sampler knew about them kept for step()."""

from typing import NamedTuple

import torch

from fastppo import distributed
from fastppo.generation.arguments import check_arguments
from fastppo.update import eval_mode
from fastppo.wanted import is_whole, want


class Shape(NamedTuple):
    """The form of what generate returns."""

    return_prompt: bool
    remove_padding: bool
    pad_to_multiple_of: int | None


class RolloutCache:
    """Log-probs and values taken while sampling, found again by the tokens; emptied when the weights change."""

    def __init__(self):
        self._known: dict[tuple[bytes, bytes], tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def _key(query: torch.Tensor, response: torch.Tensor) -> tuple[bytes, bytes]:
        return query.cpu().long().numpy().tobytes(), response.cpu().long().numpy().tobytes()

    def add(self, query, response, logprobs_T: torch.Tensor, values_T: torch.Tensor) -> None:
        """response may be the beginning of what was sampled."""
        taken = len(response)
        self._known[self._key(query, response)] = (logprobs_T[:taken], values_T[:taken])

    def find(self, queries, responses):
        """[(logprobs, values)] per row, or None unless every row was sampled here since the last update."""
        if not self._known:
            return None
        found = [self._known.get(self._key(q, r)) for q, r in zip(queries, responses, strict=True)]
        return None if any(x is None for x in found) else found

    def clear(self) -> None:
        self._known.clear()


def classic(trainer, model, query_tensor, length_sampler, batch_size, return_prompt, generation_kwargs):
    """What PPOTrainer.generate returns for one model: [1, T] for a 1-D prompt, a list for a list."""
    if isinstance(query_tensor, list):
        return batched(trainer, model, query_tensor, length_sampler, batch_size, return_prompt, generation_kwargs)
    if not isinstance(query_tensor, torch.Tensor) or query_tensor.dim() != 1:
        raise ValueError(
            "query_tensor must be a tensor of shape (`seq_len`) or a list of tensors of shape (`seq_len`); got "
            f"{tuple(query_tensor.shape) if isinstance(query_tensor, torch.Tensor) else type(query_tensor)}"
        )
    options = {"remove_padding": False} | generation_kwargs
    return batched(trainer, model, [query_tensor], length_sampler, 1, return_prompt, options)[0][None]


def batched(trainer, model, query_tensors, length_sampler, batch_size, return_prompt, options) -> list[torch.Tensor]:
    """Responses in the order of the prompts; a length is drawn once per `batch_size` prompts."""
    options = dict(options)
    shape = Shape(return_prompt, options.pop("remove_padding", True), options.pop("pad_to_multiple_of", None))
    queries = [q.to(trainer.current_device) for q in query_tensors]
    batch_size = min(len(queries), batch_size) or 1
    starts = range(0, len(queries), batch_size)
    chunks = [queries[start : start + batch_size] for start in starts]
    if length_sampler is not None:
        options["max_new_tokens"] = [_drawn(length_sampler()) for _ in starts]
    elif "max_new_tokens" in options:
        given = options["max_new_tokens"]
        each = given if isinstance(given, list) and len(given) == len(starts) else [given]
        wanted = f"a whole number of at least 1, or a list with one for each batch of prompts ({len(starts)} here)"
        want(all(is_whole(x, 1) for x in each), "generate", "max_new_tokens", wanted, given)
    if not trainer.is_encoder_decoder:
        return sampled(trainer, model, chunks, shape, options)
    check_arguments(options)
    outputs, lengths = [], options.pop("max_new_tokens", None)
    with eval_mode(model):
        for i, chunk in enumerate(chunks):
            length = lengths[i] if isinstance(lengths, list) else lengths
            extra = {} if length is None else {"max_new_tokens": length}
            outputs += encoder_decoder(trainer, model, chunk, shape, options | extra)
    return outputs


def _drawn(length) -> int:
    want(is_whole(length, 1), "PPOTrainer.generate", "length_sampler()", "a whole number of at least 1", length)
    return int(length)


def sampled(trainer, model, chunks, shape: Shape, options) -> list[torch.Tensor]:
    """One continuous batch through fastppo.Generator; log-probs and values of the policy are kept for step()."""
    lengths = options.pop("max_new_tokens", None)
    if isinstance(lengths, list):
        lengths = [length for length, chunk in zip(lengths, chunks, strict=True) for _ in chunk]
    if lengths is not None:
        options["max_new_tokens"] = lengths
    queries = [query for chunk in chunks for query in chunk]
    # the same numbers are drawn for a prompt, whatever the process that has it
    first = trainer.accelerator.process_index * trainer.config.batch_size
    generator = trainer._generator(model)
    rollout = distributed.whole(
        trainer.accelerator, model, lambda: generator.generate(queries, first_prompt=first, **options)
    )
    repeats = len(rollout.prompts) // max(1, len(queries))
    is_policy = model is trainer.model and rollout.values_BT is not None
    outputs = []
    for row, (query, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        response = response.to(query.device)
        if shape.remove_padding:
            response = cut_after_eos(response, trainer.tokenizer.eos_token_id)
        if is_policy:
            trainer._rollouts.add(query, response, rollout.logprobs_BT[row], rollout.values_BT[row])
        outputs.append(response)
    trainer._generated.tokens += sum(map(len, outputs))
    if not shape.remove_padding:
        outputs = padded_chunks(outputs, [len(chunk) * repeats for chunk in chunks], trainer.tokenizer.pad_token_id)
    if shape.return_prompt:
        outputs = [torch.cat([query, x]) for query, x in zip(rollout.prompts, outputs, strict=True)]
    return outputs


def padded_chunks(responses, sizes: list[int], pad: int | None) -> list[torch.Tensor]:
    """Every response padded on the right to the longest of its chunk."""
    outputs, start = [], 0
    for size in sizes:
        chunk = responses[start : start + size]
        outputs += list(torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_value=pad or 0))
        start += size
    return outputs


def encoder_decoder(trainer, model, queries, shape: Shape, options) -> list[torch.Tensor]:
    """transformers' generate on one padded chunk; a response starts with the decoder's start token."""
    rows = [{"input_ids": q, "attention_mask": torch.ones_like(q)} for q in queries]
    pad = {"padding": True, "pad_to_multiple_of": shape.pad_to_multiple_of, "return_tensors": "pt"}
    inputs = trainer.tokenizer.pad(rows, **pad).to(trainer.current_device)
    with torch.no_grad():
        inner = distributed.bare(model)
        sequences = distributed.whole(trainer.accelerator, model, lambda: inner.generate(**inputs, **options))
    if not shape.remove_padding:
        return list(sequences)
    return [cut_after_eos(sequence, trainer.tokenizer.eos_token_id) for sequence in sequences]


def cut_after_eos(response: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """The response up to and with its first end-of-sequence token."""
    ends = (response == eos_token_id).nonzero() if eos_token_id is not None else []
    return response[: int(ends[0]) + 1] if len(ends) else response
