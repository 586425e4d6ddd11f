"""model.generate, for what the paged generator does not do: other architectures, beams, assisted generation, ...

The result is the same Rollout; log-probs, entropies and values come from one more forward pass.
Suffixes: B sequences, P padded prompt, T response tokens, V vocabulary.
"""

import torch

from fastppo.data import Rollout
from fastppo.generation.params import GenerationParams

_PASSES_AT_ONCE = 8  # sequences per scoring pass: their [T, V] logits are held at once


def generate(
    model, wrapper, prompts: list[torch.Tensor], params: GenerationParams, limits: list[int] | None, seed: int
) -> Rollout:
    """Roll out with `model.generate`; `wrapper` (the caller's model) gives values when it has a v_head."""
    tokens_BT = _responses(model, prompts, params, seed)
    prompts = [prompt for prompt in prompts for _ in range(params.num_return_sequences)]
    lengths, reasons = _lengths(tokens_BT, params, limits)
    mask_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths[:, None]
    mask_BT = mask_BT[:, : int(lengths.max())]
    tokens_BT = tokens_BT[:, : mask_BT.shape[1]].masked_fill(~mask_BT, params.pad)
    scores = [
        _score(model, wrapper, prompts[i : i + _PASSES_AT_ONCE], tokens_BT[i : i + _PASSES_AT_ONCE], params, mask_BT)
        for i in range(0, len(prompts), _PASSES_AT_ONCE)
    ]
    logprobs, entropies, values = (
        None if any(x is None for x in column) else torch.cat(column).masked_fill(~mask_BT, 0.0)
        for column in zip(*scores, strict=True)
    )
    return Rollout(prompts, tokens_BT, mask_BT, logprobs, logprobs, values, entropies, reasons)


def _pad_left(sequences: list[torch.Tensor], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(sequences):
        ids[i, longest - len(tokens) :] = tokens.to(device)
        mask[i, longest - len(tokens) :] = 1
    return ids, mask


def _responses(model, prompts, params: GenerationParams, seed: int) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    ids_BP, mask_BP = _pad_left(prompts, params.pad, device)
    config = params.config
    config.pad_token_id = params.pad
    if config.eos_token_id is None:
        config.eos_token_id = -1  # for None transformers takes the model's own
    if config.max_new_tokens is not None:
        config.max_length = None  # else transformers warns that both are set
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():  # model.generate draws from the global generators
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids_BP, attention_mask=mask_BP, generation_config=config, **_own_arguments(params)
        )
    out = out if isinstance(out, torch.Tensor) else out.sequences
    start = 1 if model.config.is_encoder_decoder else ids_BP.shape[1]
    return out[:, start:]


def _own_arguments(params: GenerationParams) -> dict:
    return {name: x for name, x in params.arguments.items() if x is not None}


def _lengths(tokens_BT, params: GenerationParams, limits) -> tuple[torch.Tensor, list[str]]:
    """Response lengths, by the first end-of-sequence token (or trailing padding) and the limits."""
    lengths, reasons = [], []
    eos = torch.tensor(params.eos, device=tokens_BT.device, dtype=torch.int64)
    for i, row in enumerate(tokens_BT):
        limit = len(row) if limits is None else min(limits[i], len(row))
        ends = torch.isin(row[:limit], eos).nonzero()
        if len(ends):
            lengths.append(int(ends[0]) + 1)
            reasons.append("eos")
            continue
        kept = (row[:limit] != params.pad).nonzero()
        stopped = limit == len(row) and len(kept) and int(kept[-1]) + 1 < limit
        lengths.append(int(kept[-1]) + 1 if stopped else limit)
        reasons.append("stop" if stopped else "length")
    return torch.tensor(lengths, device=tokens_BT.device), reasons


def _score(model, wrapper, prompts, tokens_BT, params: GenerationParams, mask_BT):
    """Log-probs, entropies and (or None) values of the responses, [B, T] each."""
    device, T = tokens_BT.device, tokens_BT.shape[1]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            ids, mask = _pad_left(prompts, params.pad, device)
            start = model.config.decoder_start_token_id
            decoder = torch.cat([torch.full_like(tokens_BT[:, :1], start), tokens_BT[:, :-1]], dim=1)
            inputs = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder)
        else:
            whole = [torch.cat([p.to(device), row]) for p, row in zip(prompts, tokens_BT, strict=True)]
            ids, mask = _pad_left(whole, params.pad, device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs = dict(input_ids=ids[:, :-1], attention_mask=mask[:, :-1])
            if "position_ids" in _parameters(model):
                inputs["position_ids"] = positions[:, :-1]
        hidden, logits = _hidden_and_logits(model, wrapper, inputs, T)
        logp = torch.log_softmax(logits[:, -T:].float() / params.sampling.logprob_temperature, dim=-1)
        entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
        values = None
        if hidden is not None:
            values = wrapper.v_head(hidden[:, -T:]).float().reshape(len(prompts), -1)
        return logp.gather(-1, tokens_BT[..., None])[..., 0], entropy, values


def _hidden_and_logits(model, wrapper, inputs, T):
    v_head = getattr(wrapper, "v_head", None)
    out = model(**inputs, output_hidden_states=v_head is not None)
    if v_head is None:
        return None, out.logits
    states = out.decoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states
    return states[-1], out.logits


def _parameters(model):
    import inspect

    return inspect.signature(model.forward).parameters
