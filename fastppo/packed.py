"""Prepare without padding: one packed forward pass per micro-batch, the head at response positions only.

A pack holds the sequences of some rows one after the other. `at_R` are the positions whose output predicts a response
token, `flat_R` where the result belongs in a [B, T] matrix of predicted positions (column t is about token t + 1).
Suffixes: B sequences, T predicted positions, N packed tokens, R response tokens of the pack, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastppo import attention
from fastppo.distributed import bare
from fastppo.kernels.kl_reward import full_kl
from fastppo.kernels.linear_logprob import Head, head_logits, linear_logprob
from fastppo.models.head import output_head

# positions whose full-vocabulary distributions exist at a time, for kl_penalty="full"
FULL_KL_ROWS = 256


@dataclass(frozen=True)
class Sequences:
    """A batch as packed passes need it; on the model's device."""

    tokens: list[torch.Tensor]  # query + response, 1-D int64 each
    prompt_lengths: list[int]
    lengths: list[int]
    columns: list[int]  # column of each row's first response token
    mask_BT: torch.Tensor  # bool, response tokens that count

    @property
    def shape(self) -> torch.Size:
        return self.mask_BT.shape


class Pack(NamedTuple):
    tokens_1N: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: list[int]
    at_R: torch.Tensor
    targets_R: torch.Tensor
    flat_R: torch.Tensor


def sequences(queries, responses, response_masks, pad_left: bool, width: int | None = None) -> Sequences:
    """width: predicted positions per row; default the longest sequence's."""
    tokens = [torch.cat([q, r]) for q, r in zip(queries, responses, strict=True)]
    lengths = [len(ids) for ids in tokens]
    prompts = [len(q) for q in queries]
    width = width or max(lengths) - 1
    columns = [p - 1 + (width + 1 - n if pad_left else 0) for p, n in zip(prompts, lengths, strict=True)]
    mask_BT = torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, (first, prompt, length) in enumerate(zip(columns, prompts, lengths, strict=True)):
        counts = True if response_masks is None else response_masks[row].bool().cpu()
        mask_BT[row, first : first + length - prompt] = counts
    return Sequences(tokens, prompts, lengths, columns, mask_BT.to(tokens[0].device))


def plan(lengths: Sequence[int], rows: Sequence[int], budget: int | None) -> list[list[int]]:
    """Rows in micro-batches of at most `budget` tokens (one sequence may exceed it), about equally long."""
    if budget is None:
        return [list(rows)]
    count = max(1, -(-sum(lengths[r] for r in rows) // budget))
    while True:
        bins: list[list[int]] = [[] for _ in range(min(count, len(rows)))]
        loads = [0] * len(bins)
        for row in sorted(rows, key=lambda r: -lengths[r]):
            lightest = loads.index(min(loads))
            bins[lightest].append(row)
            loads[lightest] += lengths[row]
        if max(loads) <= budget or len(bins) == len(rows):
            return bins
        count += 1


def pack(batch: Sequences, rows: Sequence[int], only_counting: bool) -> Pack:
    """The rows' tokens and where their response tokens are; only_counting leaves masked response tokens out."""
    device, width = batch.tokens[0].device, batch.shape[1]
    lengths = [batch.lengths[r] for r in rows]
    at, flat, start = [], [], 0
    for row, length in zip(rows, lengths, strict=True):
        prompt, column = batch.prompt_lengths[row], batch.columns[row]
        at.append(torch.arange(start + prompt - 1, start + length - 1))
        flat.append(torch.arange(row * width + column, row * width + column + length - prompt))
        start += length
    at_R, flat_R = torch.cat(at).to(device), torch.cat(flat).to(device)
    if only_counting:
        keep_R = batch.mask_BT.flatten()[flat_R]
        at_R, flat_R = at_R[keep_R], flat_R[keep_R]
    tokens_N = torch.cat([batch.tokens[r] for r in rows])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Pack(tokens_N[None], cu_seqlens, lengths, at_R, tokens_N[at_R + 1], flat_R)


def hidden_states(model, packed: Pack) -> torch.Tensor:
    """[R, D]: what the head reads to predict the response tokens. Attention must be installed."""
    backbone = attention.unwrap(model).base_model
    with attention.packed(packed.cu_seqlens, max(packed.lengths), packed.lengths) as layout:
        output = backbone(input_ids=packed.tokens_1N, position_ids=layout.position_ids, use_cache=False)
    return output.last_hidden_state[0].index_select(0, packed.at_R)


def value_head(model, hidden_RD: torch.Tensor) -> torch.Tensor:
    while not hasattr(model, "v_head"):
        model = model.module
    return model.v_head(hidden_RD)[:, 0].float()


def head_for(model, hidden: torch.Tensor) -> Head:
    """The model's head in the dtype of the hidden states (autocast computes in 16 bits, master weights stay float32).

    Read anew for every pass: FSDP2 swaps a module's parameters for whole ones and back.
    """
    head = output_head(bare(model))
    bias = None if head.bias_V is None else head.bias_V.to(hidden.dtype)
    return head._replace(weight_VD=head.weight_VD.to(hidden.dtype), bias_V=bias)


def packs(batch: Sequences, budget: int | None) -> Iterator[Pack]:
    for rows in plan(batch.lengths, range(len(batch.tokens)), budget):
        yield pack(batch, rows, only_counting=False)


@torch.no_grad()
def score_tokens(model, batch: Sequences, budget: int | None, with_values: bool, engine=None):
    """(logprobs_BT, values_BT or None): float32, 0 where there is no response token. engine: (Engine, dtype) or None."""
    logprobs = torch.zeros(batch.shape, device=batch.mask_BT.device)
    values = torch.zeros_like(logprobs) if with_values else None
    with engine[0].scoring(engine[1]) if engine else attention.install(model):
        for packed in packs(batch, budget):
            if engine:
                logprob_R, values_R = engine[0].score(packed, with_values)
            else:
                hidden_RD = hidden_states(model, packed)
                logprob_R = linear_logprob(hidden_RD, head_for(model, hidden_RD), packed.targets_R).logprob_N
                values_R = value_head(model, hidden_RD) if with_values else None
            logprobs.view(-1)[packed.flat_R] = logprob_R.float()
            if with_values:
                values.view(-1)[packed.flat_R] = values_R
    return logprobs, values


@torch.no_grad()
def full_kl_tokens(policy, reference, batch: Sequences, budget: int | None) -> torch.Tensor:
    """KL(policy || reference) over the whole vocabulary at every response token, [B, T]; few logits at a time.

    policy, reference: (model, context manager factory that makes the model act as that one).
    """
    kl_BT = torch.zeros(batch.shape, device=batch.mask_BT.device)
    for packed in packs(batch, budget):
        hidden, heads = [], []
        for model, acting in (policy, reference):
            with acting(), attention.install(model):
                hidden.append(hidden_states(model, packed))
                heads.append(head_for(model, hidden[-1]))
        for start in range(0, len(packed.flat_R), FULL_KL_ROWS):
            rows = slice(start, start + FULL_KL_ROWS)
            logits = [head_logits(h[rows], head).float() for h, head in zip(hidden, heads, strict=True)]
            kl_BT.view(-1)[packed.flat_R[rows]] = full_kl(*logits)
    return kl_BT
