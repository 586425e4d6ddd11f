"""Prepare: sequences + scores -> Experience, on padded batches. The packed path of the same stage is packed.py.

    logprobs, values   policy, no gradient          reward_t = -beta * KL_t (+ score on the last token)
    ref_logprobs       reference, no gradient       advantages, returns: GAE(gamma, lambda), whitened

Suffixes: B sequences, T predicted positions (column t is about token t + 1), V vocabulary.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastppo.core import masked_whiten
from fastppo.kernels.gae import gae
from fastppo.kernels.kl_reward import full_kl, kl_reward
from fastppo.kernels.logprob import logprob
from fastppo.score import NonFinite


class Forward(NamedTuple):
    """What batched_forward_pass returns: all [B, T], logits [B, T, V] or None, masks bool."""

    logprobs: torch.Tensor
    logits: torch.Tensor | None
    values: torch.Tensor
    masks: torch.Tensor


def collate(queries, responses, collator: Callable, is_encoder_decoder: bool, device) -> dict[str, torch.Tensor]:
    """Padded model inputs: query + response per row, or queries for the encoder and responses for the decoder."""

    def pad(sequences):
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences]
        batch = collator(rows).to(device)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    if not is_encoder_decoder:
        return pad([torch.cat([q, r]) for q, r in zip(queries, responses, strict=True)])
    decoder = pad(responses)
    return pad(queries) | {f"decoder_{name}": x for name, x in decoder.items()}


def response_mask(attention_BT1, queries, responses, response_masks, is_encoder_decoder: bool) -> torch.Tensor:
    """bool [B, T]: True at the columns whose next token is a response token (and response_masks is 1, where given).

    An encoder-decoder's response starts with the decoder's start token; its first two tokens don't count, as in TRL.
    """
    mask_BT = torch.zeros_like(attention_BT1[:, 1:], dtype=torch.bool)
    firsts = attention_BT1.argmax(1).tolist()  # padding on the left
    for row, first in enumerate(firsts):
        length = len(responses[row])
        start = first + (1 if is_encoder_decoder else len(queries[row]) - 1)
        count = length - 2 if is_encoder_decoder else length
        counts = True if response_masks is None else response_masks[row][length - count :].to(mask_BT.device).bool()
        mask_BT[row, max(start, 0) : start + count] = counts
    return mask_BT


def padded_forward(
    model, inputs, queries, responses, *, chunk: int, response_masks=None, return_logits: bool = False
) -> Forward:
    """Log-prob and value of every token but the first, `chunk` rows at a time. Differentiable where grad is on."""
    is_encoder_decoder = "decoder_input_ids" in inputs
    prefix = "decoder_" if is_encoder_decoder else ""
    tokens, attention = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    if not is_encoder_decoder:
        inputs = with_positions(model, inputs)
    logprobs, logits_parts, values = [], [], []
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        logits, _, value = model(**{name: x[rows] for name, x in inputs.items()})[:3]
        logits = logits[:, :-1]
        logprobs.append(logprob(logits, tokens[rows, 1:]).logprob_N)
        values.append(value[:, :-1])
        if return_logits:
            logits_parts.append(logits)
    masks = response_mask(attention, queries, responses, response_masks, is_encoder_decoder)
    return Forward(torch.cat(logprobs), torch.cat(logits_parts) if return_logits else None, torch.cat(values), masks)


def with_positions(model, inputs):
    """Adds position_ids where padding on the left would otherwise shift the positions of a row.

    Models that count positions from the first column (GPT-2) would read a left-padded row at positions it never saw.
    """
    attention = inputs["attention_mask"]
    if bool(attention[:, 0].all()) or not accepts(model, "position_ids"):
        return inputs
    return inputs | {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}


def accepts(model, argument: str) -> bool:
    """Whether the transformers model inside `model` has this argument in its forward()."""
    from fastppo.attention import unwrap

    return argument in inspect.signature(unwrap(model).forward).parameters


def kl_rewards(scores_B, logprobs, ref_logprobs, mask_BT, *, kl_coef: float, kind: str):
    """KLReward(rewards_BT, non_score_BT, kl_BT). kind "full" takes logits (or log-probs) [B, T, V] of both models."""
    if kind == "full":
        kl_BT = full_kl(logprobs, ref_logprobs)
        zeros_BT = torch.zeros_like(kl_BT)
        return kl_reward(zeros_BT, zeros_BT, mask_BT, scores_B, kl_coef=kl_coef, kind=kind, full_kl_BT=kl_BT)
    return kl_reward(logprobs, ref_logprobs, mask_BT, scores_B, kl_coef=kl_coef, kind=kind)


def kl_penalty(logprobs, ref_logprobs, kind: str) -> torch.Tensor:
    """The per-token KL estimate of `kind`; any leading shape."""
    if kind == "full":
        return full_kl(logprobs, ref_logprobs)
    flat = [x.reshape(1, -1) for x in (logprobs, ref_logprobs)]
    everywhere = torch.ones_like(flat[0], dtype=torch.bool)
    return kl_reward(*flat, everywhere, flat[0].new_zeros(1), kl_coef=0.0, kind=kind).kl_BT.reshape(logprobs.shape)


def whiten_over_processes(values_BT, mask_BT, total: Callable | None, shift_mean: bool = True) -> torch.Tensor:
    """core.masked_whiten; total: sums a tensor over processes, so that mean and variance are those of all of them.

    Raises NonFinite for one value, which has no variance."""
    if total is None:
        check_count(mask_BT.sum())
        return masked_whiten(values_BT, mask_BT, shift_mean)
    mask_BT = mask_BT.to(values_BT.dtype)
    values_sum, count = total(torch.stack([(values_BT * mask_BT).sum(), mask_BT.sum()]))
    check_count(count)
    mean = values_sum / count
    squares = total((((values_BT - mean) ** 2) * mask_BT).sum())
    whitened_BT = (values_BT - mean) * torch.rsqrt(squares / (count - 1) + 1e-8)
    return whitened_BT if shift_mean else whitened_BT + mean


def check_count(count: torch.Tensor) -> None:
    if count == 1:
        raise NonFinite(
            "one response token in the whole batch: advantages are divided by their standard deviation, which takes two. "
            "Take a larger batch or longer responses"
        )


def advantages_and_returns(
    values_BT, rewards_BT, mask_BT, *, gamma: float, lam: float, whiten_rewards: bool, total: Callable | None = None
):
    """(values, advantages, returns), [B, T] each: values zeroed outside the mask, advantages whitened over it.

    whiten_rewards: rewards are divided by their standard deviation over the mask first, their mean is kept.
    total: sums a tensor over processes; whitening is then over the tokens of all of them.
    """
    values_BT = values_BT * mask_BT
    rewards_BT = rewards_BT * mask_BT
    if whiten_rewards:
        rewards_BT = whiten_over_processes(rewards_BT, mask_BT, total, shift_mean=False)
    result = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, masked="zero")
    return values_BT, whiten_over_processes(result.advantages_BT, mask_BT, total), result.returns_BT
