"""One model's passes: log-probs of a pack, and a micro-batch of PPO with its gradients.

Suffixes: N packed tokens, R response tokens, D hidden, V vocabulary, L rows with a gradient.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastppo.engine.body import Body, Inputs, Tape
from fastppo.engine.native import fits
from fastppo.engine.spec import Spec, read
from fastppo.engine.weights import product
from fastppo.gradients import FlatGradients, for_one_stage
from fastppo.kernels import _recycle
from fastppo.kernels._backend import extension
from fastppo.kernels.linear_logprob import Head, Scales, linear_logprob
from fastppo.kernels.linear_ppo_loss import Chunk, Loss, Rows, chunk_rows, close_ranks, cpu_chunk
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions

# where oneDNN makes bfloat16 products (no AMX tiles): it compiles one for every new number of rows, so few numbers, padded with zeros
ROWS = 64
# scored in one pass: more would take memory, and no less time (measured: 384, 768 and 1536 tokens of a 4.6 M GPT-2 take the same)
SCORED_TOKENS = 512
# largest difference of the probe's hidden states, relative to the largest
PROBE_TOLERANCE = 1e-3


def engine_for(model, head: Head, value_head, temperature: float = 1.0) -> "Engine | str":
    """An Engine over the live parameters of `model` (in any wrappers), or why it can't have one.

    temperature: log-probs are those of logits / temperature.
    """
    if isinstance(extension(), str):
        return extension()
    spec = read(model)
    if isinstance(spec, str):
        return spec
    if head.weight_VD.dtype != torch.float32 or not head.weight_VD.is_contiguous():
        return "its head is not a contiguous float32 matrix"
    error = probe(model, spec)
    if not error <= PROBE_TOLERANCE:
        return f"its hidden states differ from the model's own by {error:.2g} of their size"
    return Engine(model, spec, head, value_head, temperature)


@torch.no_grad()
def probe(model, spec: Spec) -> float:
    """Relative difference of hidden states on three short sequences, the engine's and the model's own."""
    from fastppo import attention
    from fastppo.packed import hidden_states, pack, sequences
    from fastppo.update import eval_mode

    V = len(spec.tokens_VD)
    queries = [torch.arange(1, n + 1) * 7 % V for n in (5, 1, 3)]
    batch = sequences(queries, [q[:1] for q in queries], None, pad_left=False)
    packed = pack(batch, range(3), only_counting=False)
    packed = packed._replace(at_R=torch.arange(packed.tokens_1N.shape[1]))
    with eval_mode(model), attention.install(model), torch.autocast("cpu", enabled=False):
        own = hidden_states(model, packed)
    ours, _ = Body(spec, torch.float32, train=False).forward(inputs_of(packed, 1), len(own), keep=False)
    return float((own - ours).abs().max() / own.abs().max())


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def inputs_of(packed, multiple: int) -> Inputs:
    places_N = torch.from_numpy(np.concatenate([np.arange(n) for n in packed.lengths]))
    tokens_N = packed.tokens_1N[0]
    return Inputs(tokens_N, places_N, packed.cu_seqlens, packed.at_R, up(len(tokens_N), multiple))


class Microbatch:
    """What learn() returns: chunks of the head in order, their statistics and log-probs."""

    def __init__(self, parts: list[Chunk]):
        self.loss = torch.stack([part.loss for part in parts]).sum()
        self.stats = sum((part.stats for part in parts[1:]), parts[0].stats)
        self.logprob_R = torch.cat([part.logprob_R for part in parts]) if len(parts) > 1 else parts[0].logprob_R


class Engine:
    """Passes of one model. learn() runs inside `started`; `refresh` follows an optimizer step."""

    def __init__(self, model, spec: Spec, head: Head, value_head, temperature: float = 1.0):
        self.spec, self.value_head, self.temperature = spec, value_head, temperature
        self._model, self._head = model, head
        self._body: Body | None = None
        self._scorer: Body | None = None

    def still_fits(self) -> bool:
        """Reads the model again: False once it has hooks, adapters or other parameters than it can compute with."""
        spec = read(self._model)
        if isinstance(spec, str):
            return False
        self.spec = spec
        return True

    @contextlib.contextmanager
    def started(self, dtype: torch.dtype, flat: FlatGradients | None = None) -> Iterator["Engine"]:
        """Copies of weights and gradient buffers live inside. flat: where gradients go."""
        parameters = [*self.spec.parameters(), self._head.weight_VD, self._head.bias_V]
        self._body = Body(self.spec, dtype, train=True, flat=flat or for_one_stage(parameters, self.spec.neighbours()))
        if not fits(self.spec):
            _recycle.release(_recycle.PAGES_OR_ACTIVATIONS)  # each block's are made by themselves
        try:
            yield self
        finally:
            self._body = None

    @contextlib.contextmanager
    def scoring(self, dtype: torch.dtype) -> Iterator["Engine"]:
        """The passes of score() inside share their memory, and copies of weights where the body runs in one call."""
        self._scorer = Body(self.spec, dtype, train=False)
        try:
            yield self
        finally:
            self._scorer = None

    def refresh(self) -> None:
        self._body.refresh()

    @torch.no_grad()
    def score(self, packed, with_values: bool) -> tuple[Tensor, Tensor | None]:
        """(logprob_R, values_R or None) of a pack; inside `scoring`."""
        body, multiple = self._scorer, _multiple(self._scorer.dtype)
        R = len(packed.at_R)
        hidden, _ = body.forward(inputs_of(packed, multiple), up(R, multiple), keep=False)
        targets = torch.nn.functional.pad(packed.targets_R, (0, len(hidden) - R))
        head = _head_as(self._head, body.weights.head(self._head.weight_VD))
        logprob = linear_logprob(hidden, head, targets, temperature=self.temperature).logprob_N[:R]
        return logprob, self._values(hidden[:R]) if with_values else None

    def _values(self, hidden_RD: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.value_head(hidden_RD.float())[:, 0].float()

    def learn(self, packed, batch, options, normalizer: float, backward: bool) -> Microbatch:
        """PPO's loss of a pack; with backward its gradients are added to .grad. batch: PPOBatch at the pack's tokens."""
        R = len(packed.at_R)
        hidden, tape = self._forward(packed, keep=backward)
        leaf_RD = hidden[:R].float().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            values_R = self._values(leaf_RD)
        rows = Rows(hidden, values_R.detach(), packed.targets_R, batch)
        dhidden, parts = self._head_and_loss(rows, R, Loss(options, normalizer, None), backward)
        if backward:
            values_R.backward(parts[0].dvalues_R if len(parts) == 1 else torch.cat([p.dvalues_R for p in parts]))
            dhidden[:R] += leaf_RD.grad
            self._body.backward(tape, dhidden)
        return Microbatch(parts)

    @torch.no_grad()
    def score_as_learnt(self, packed, with_values: bool) -> tuple[Tensor, Tensor | None]:
        """score() inside `started`, in the very numbers that learn() would find now."""
        R = len(packed.at_R)
        hidden, _ = self._forward(packed, keep=False)
        values_R = self._values(hidden[:R].float()) if with_values else None
        zeros_R = torch.zeros(R)
        rows = Rows(hidden, zeros_R, packed.targets_R, PPOBatch(*[zeros_R] * 4))
        _, parts = self._head_and_loss(rows, R, Loss(PPOLossOptions(), 1.0, None), backward=False)
        return Microbatch(parts).logprob_R, values_R

    def _forward(self, packed, keep: bool) -> tuple[Tensor, Tape | None]:
        R, multiple = len(packed.at_R), _multiple(self._body.dtype)
        # first: the body's part of that memory is mostly the smaller one
        self._tile(min(self._chunk(R), up(R, multiple)))
        return self._body.forward(inputs_of(packed, multiple), up(R, multiple), keep)

    # --- head and loss ------------------------------------------------------------------------------------------------

    def _chunk(self, R: int) -> int:
        """Rows of a chunk of the head."""
        dtype = self._body.dtype
        return up(chunk_rows(R, len(self._head.weight_VD), dtype.itemsize, "cpu"), _multiple(dtype))

    def _tile(self, rows: int) -> Tensor:
        """[rows, V] in the memory that the body needs before and after the head."""
        V, dtype = len(self._head.weight_VD), self._body.dtype
        return self._body.memory.take(_recycle.SCRATCH, rows * V * dtype.itemsize).view(dtype).view(rows, V)

    @torch.no_grad()
    def _head_and_loss(self, rows: Rows, R: int, loss: Loss, backward: bool) -> tuple[Tensor, list[Chunk]]:
        """dhidden (zeros without backward) and the chunks; the head's gradients go to .grad."""
        hidden, weight_VD = rows.hidden_RD, self._body.weights.head(self._head.weight_VD)
        head, bias_V = self._head, self._head.bias_V
        multiple, size = _multiple(hidden.dtype), self._chunk(R)
        scales = Scales(self.temperature, float(head.logit_scale), float(head.softcap or 0.0))
        dhidden, parts = torch.zeros_like(hidden), []
        bias = None if bias_V is None else bias_V.detach().float()
        for first in range(0, R, size):
            count = min(size, R - first)
            part_rows = rows._replace(hidden_RD=hidden[first : first + up(count, multiple)])
            tile = self._tile(len(part_rows.hidden_RD))
            product(part_rows.hidden_RD, weight_VD.t(), tile)
            span = slice(first, first + count)
            given = Rows(hidden, rows.values_R[span], rows.tokens_R[span], _take(rows.batch, span))
            part = cpu_chunk(tile[:count], scales, bias, given, loss, backward)
            parts.append(part)
            if backward:
                self._head_gradients(tile, part, part_rows.hidden_RD, dhidden[first : first + count], weight_VD)
        return dhidden, parts

    def _head_gradients(self, tile, part: Chunk, hidden, dhidden, weight_VD) -> None:
        """tile: dloss/dlogits where dlogprob or dentropy is not 0, logits elsewhere."""
        count, multiple = len(part.logprob_R), _multiple(hidden.dtype)
        live, moves = part.numbers_2.read()
        if live == count:
            order_L, hidden_LD, dlogits = slice(0, count), hidden, tile
        elif live:
            order_L = close_ranks(tile[:count], part.live_R, live, moves)
            dlogits = tile[: up(live, multiple)]
            hidden_LD = hidden.new_zeros(len(dlogits), hidden.shape[1])
            torch.index_select(hidden, 0, order_L, out=hidden_LD[:live])
            count = live
        else:
            order_L, hidden_LD, dlogits, count = slice(0, 0), hidden[:1], tile[:1], 0  # a row of zeros
        dlogits[count:] = 0
        dhidden[order_L] = product(dlogits, weight_VD, torch.empty_like(hidden_LD))[:count]
        gradients = self._body.gradients
        gradients.add_product(self._head.weight_VD, dlogits.t(), hidden_LD)
        if self._head.bias_V is not None:
            gradients.add(self._head.bias_V, dlogits.sum(0, dtype=torch.float32))


def _multiple(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 or extension().amx_works() else ROWS


def _take(batch, span: slice):
    return type(batch)(*(None if x is None else x[span].contiguous() for x in batch))


def _head_as(head: Head, weight_VD: Tensor) -> Head:
    return head._replace(weight_VD=weight_VD, bias_V=None if head.bias_V is None else head.bias_V.to(weight_VD.dtype))
