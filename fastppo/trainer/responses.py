"""PPOTrainer.generate: prompts in, responses out, and what the sampler knew about them kept for step()."""

import torch

from fastppo.update import eval_mode


class RolloutCache:
    """Log-probs and values taken while sampling, found again by the tokens; emptied when the weights change."""

    def __init__(self):
        self._known: dict[tuple[bytes, bytes], tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def _key(query: torch.Tensor, response: torch.Tensor) -> tuple[bytes, bytes]:
        return query.cpu().long().numpy().tobytes(), response.cpu().long().numpy().tobytes()

    def add(self, rollout) -> None:
        if rollout.values_BT is None:
            return
        lengths = rollout.mask_BT.sum(1).tolist()
        for row, (query, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            taken = slice(0, lengths[row])
            self._known[self._key(query, response)] = (rollout.logprobs_BT[row, taken], rollout.values_BT[row, taken])

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
    """Responses in the order of the prompts, `batch_size` at a time; the length is drawn once per such chunk."""
    options = dict(options)
    remove_padding = options.pop("remove_padding", True)
    pad_to_multiple_of = options.pop("pad_to_multiple_of", None)
    batch_size = min(len(query_tensors), batch_size) or 1
    outputs = []
    with eval_mode(model):
        for start in range(0, len(query_tensors), batch_size):
            queries = [q.to(trainer.current_device) for q in query_tensors[start : start + batch_size]]
            if length_sampler is not None:
                options["max_new_tokens"] = length_sampler()
            outputs += padded_generate(
                trainer, model, queries, return_prompt, remove_padding, pad_to_multiple_of, options
            )
    return outputs


def padded_generate(trainer, model, queries, return_prompt, remove_padding, pad_to_multiple_of, options):
    """transformers' generate on one padded chunk."""
    tokenizer, side = trainer.tokenizer, trainer.tokenizer.padding_side
    rows = [{"input_ids": q, "attention_mask": torch.ones_like(q)} for q in queries]
    try:
        tokenizer.padding_side = side if trainer.is_encoder_decoder else "left"
        inputs = tokenizer.pad(rows, padding=True, pad_to_multiple_of=pad_to_multiple_of, return_tensors="pt")
    finally:
        tokenizer.padding_side = side
    inputs = inputs.to(trainer.current_device)
    with torch.no_grad():
        sequences = trainer.accelerator.unwrap_model(model).generate(**inputs, **options)
    outputs = []
    for query, sequence in zip(queries, sequences, strict=True):
        prompt, response = query.new_empty(0), sequence
        if not trainer.is_encoder_decoder:
            prompt, response = query, sequence[inputs["input_ids"].shape[1] :]
        if remove_padding:
            response = cut_after_eos(response, tokenizer.eos_token_id)
        outputs.append(torch.cat([prompt, response]) if return_prompt else response)
    return outputs


def cut_after_eos(response: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """The response up to and with its first end-of-sequence token."""
    ends = (response == eos_token_id).nonzero() if eos_token_id is not None else []
    return response[: int(ends[0]) + 1] if len(ends) else response
