"""linear_ppo_loss: hidden states, values, output embedding and tokens -> PPO's loss, statistics and all gradients.

    logprob, entropy = linear_logprob(hidden, head, tokens)          loss = ppo_loss(logprob, values, batch, entropy)

Three matrix products, 6 N V D FLOPs, where a forward and a backward that recomputes the logits take 8 N V D: the
coefficients of the loss (advantage, old log-prob, normalizer) are known beforehand, so dL/dlogprob and dL/dentropy of a
token are known as soon as its row of logits is complete, and the row becomes its own gradient in place. The gradients
of hidden, values, weight and bias are therefore made in the forward, chunk of rows by chunk of rows; backward only
scales them. Tokens that the mask drops are left out, and tokens with zero gradient (clipped) leave the last two products.

Extra memory: one chunk of logits (CHUNK_BYTES, at least one row), and for 16-bit inputs of more than one chunk a
float32 accumulator of dweight [V, D] and one tile of a chunk's part of it. The gradients live from the forward to the
backward. On a CPU the chunk, and a dweight of at most _recycle.GRADIENT bytes once nobody holds it, are kept for the next call.
Suffixes: N tokens, D hidden, V vocabulary, R rows of a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.kernels import _recycle
from fastppo.kernels import linear_logprob as tiles
from fastppo.kernels._backend import pick
from fastppo.kernels._ppo_chunk import Chunk, Loss, Rows, chunk_by_parts, cpu_chunk
from fastppo.kernels._products import mm
from fastppo.kernels.linear_logprob import Head, Scales, autocast_inputs, check_head, linear_logprob_reference
from fastppo.kernels.logprob import DTYPE_CODES, check_temperature, check_tokens, once
from fastppo.kernels.ppo_loss import PPOBatch, PPOLossOptions, PPOStats, ppo_loss_reference

# By device and bytes of an element. On a CPU torch's float32 products need up to 35 MiB of their own beside the chunk, and
# 16-bit chunks after the first an accumulator that is larger than what a smaller chunk would save.
CHUNK_BYTES = {("cpu", 4): 80 * 2**20, ("cpu", 2): 100 * 2**20, ("cuda", 4): 1280 * 2**20, ("cuda", 2): 1280 * 2**20}
MOVE_ROWS = 64


class LinearPPOLoss(NamedTuple):
    """loss: scalar, differentiable in hidden, values, weight and bias.

    logprob_N, entropy_N: nats, float32, detached; 0 where the mask is False.
    """

    loss: Tensor
    stats: PPOStats
    logprob_N: Tensor
    entropy_N: Tensor


def linear_ppo_loss_reference(
    hidden_ND, values_N, head, tokens_N, batch, options, *, temperature=1.0, normalizer=None, whiten=None
) -> LinearPPOLoss:
    """The definition: the two rooms one after the other, differentiable by autograd; makes the [N, V] logits."""
    logprob_N, entropy_N = linear_logprob_reference(hidden_ND, head, tokens_N, temperature)
    loss, stats = ppo_loss_reference(
        logprob_N, values_N, batch, options, entropy_N=entropy_N, normalizer=normalizer, whiten=whiten
    )
    if batch.mask_N is not None:
        logprob_N, entropy_N = (x.masked_fill(~batch.mask_N, 0.0) for x in (logprob_N, entropy_N))
    return LinearPPOLoss(loss, stats, logprob_N.detach(), entropy_N.detach())


def chunk_rows(count: int, vocab: int, itemsize: int, device_type: str) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES holds, evened out over the chunks."""
    most = max(1, CHUNK_BYTES[device_type, itemsize] // (vocab * itemsize))
    return -(-count // -(-count // most)) if count else 1


def recycled(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device, most: int) -> Tensor:
    """torch.empty(rows, columns). On a CPU `name`'s last memory again: page faults are a quarter of a bfloat16 call."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    return _recycle.empty(f"linear_ppo_loss {name}", (rows, columns), dtype, most)


def _first(on_R: Tensor, count: int) -> Tensor:
    """Indices of the first `count` True of on_R, which has as many: nonzero without its wait for a GPU."""
    return on_R.to(torch.int8).argsort(descending=True, stable=True)[:count]


def close_ranks(tile_RV: Tensor, live_R: Tensor, live: int, moves: int) -> Tensor:
    """Move live rows from the back of the tile into dead rows at its front; returns which row each front row now is."""
    order_R = torch.arange(len(live_R), device=live_R.device)
    holes, fillers = _first(~live_R[:live], moves), _first(live_R[live:], moves) + live
    for span in tiles.spans(moves, MOVE_ROWS):  # in steps: the moved rows are copied once on their way
        tile_RV[holes[span]] = tile_RV[fillers[span]]
    order_R[holes] = fillers
    return order_R[:live]


class GradientSums:
    """dhidden, dweight and dbias, added up over chunks; 16-bit dweight in float32 when there is more than one chunk."""

    def __init__(self, hidden_ND: Tensor, head: Head, chunks: int, needs: tuple[bool, ...]):
        self.dhidden_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        exact = chunks > 1 and hidden_ND.element_size() == 2
        dtype = torch.float32 if exact else hidden_ND.dtype
        shape, device = head.weight_VD.shape, hidden_ND.device
        self.dweight_VD = recycled("dweight", *shape, dtype, device, _recycle.GRADIENT) if needs[2] else None
        self.dbias_V = torch.zeros(len(head.weight_VD), device=hidden_ND.device) if needs[3] else None
        self.empty = True

    def add(self, index, dlogits_RV: Tensor, hidden_RD: Tensor, weight_VD: Tensor) -> None:
        if self.dhidden_ND is not None:
            self.dhidden_ND[index] = mm(dlogits_RV, weight_VD)
        if self.dbias_V is not None:
            self.dbias_V += dlogits_RV.sum(0, dtype=torch.float32)
        if self.dweight_VD is not None:
            self._add_dweight(dlogits_RV, hidden_RD)
        self.empty = False

    def _add_dweight(self, dlogits_RV: Tensor, hidden_RD: Tensor) -> None:
        whole = self.dweight_VD.dtype == hidden_RD.dtype
        if whole and self.empty:
            mm(dlogits_RV.t(), hidden_RD, self.dweight_VD)
            return
        if self.empty:
            self.dweight_VD.zero_()
        vocab, depth = self.dweight_VD.shape
        step = vocab if whole else max(1, tiles.TILE_BYTES[hidden_RD.device.type] // (depth * hidden_RD.element_size()))
        for span in tiles.spans(vocab, step):  # 16-bit products are made before they are added: a tile at a time
            mm(dlogits_RV[:, span].t(), hidden_RD, self.dweight_VD[span], add=True)


def run_chunks(chunk: Callable, rows: Rows, head: Head, scales: Scales, loss: Loss, needs: tuple[bool, ...]):
    """All chunks: LinearPPOLoss, and the gradients of hidden, values, weight and bias (None where not needed)."""
    hidden_ND, weight_VD = rows.hidden_RD, head.weight_VD
    count, vocab, device = len(hidden_ND), len(weight_VD), hidden_ND.device
    size = chunk_rows(count, vocab, hidden_ND.element_size(), device.type)
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    sums = GradientSums(hidden_ND, head, max(1, -(-count // size)), needs)
    most = CHUNK_BYTES[device.type, hidden_ND.element_size()]
    workspace = recycled("chunk", min(size, count), vocab, hidden_ND.dtype, device, most)
    parts = []
    for span in tiles.spans(count, size) if count else [slice(0, 0)]:  # no token: the loss is 0, the statistics too
        part_rows = rows.take(span)
        tile_RV = workspace[: len(part_rows.hidden_RD)]
        mm(part_rows.hidden_RD, weight_VD.t(), tile_RV)
        part = chunk(tile_RV, scales, bias_V, part_rows, loss, any(needs))
        parts.append(part)
        if not any(needs[i] for i in (0, 2, 3)):
            continue
        live, moves = part.numbers_2.read()
        if live == len(tile_RV):
            sums.add(span, tile_RV, part_rows.hidden_RD, weight_VD)
        elif live:
            order_L = close_ranks(tile_RV, part.live_R, live, moves)
            sums.add(order_L + span.start, tile_RV[: len(order_L)], part_rows.hidden_RD[order_L], weight_VD)
    if sums.empty and sums.dweight_VD is not None:
        sums.dweight_VD.zero_()
    return parts, sums


def _cat(parts: list[Chunk], field: str) -> Tensor:
    return torch.cat([getattr(part, field) for part in parts]) if parts else torch.zeros(0)


class _LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, values_N, weight_VD, bias_V, tokens_N, batch, scales, loss, chunk):
        rows, keep_N = Rows(hidden_ND, values_N, tokens_N, batch), None
        if batch.mask_N is not None:
            keep_N = batch.mask_N.nonzero()[:, 0]
            if len(keep_N) == len(hidden_ND):
                keep_N = None
            else:
                rows = rows.take(keep_N)
        needs = tuple(ctx.needs_input_grad[:4])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            parts, sums = run_chunks(chunk, rows, Head(weight_VD, bias_V), scales, loss, needs)

        def spread(x_M: Tensor) -> Tensor:
            return x_M if keep_N is None else x_M.new_zeros(len(hidden_ND), *x_M.shape[1:]).index_copy_(0, keep_N, x_M)

        ctx.grads = [
            spread(sums.dhidden_ND) if needs[0] else None,
            spread(_cat(parts, "dvalues_R")).to(values_N.dtype) if needs[1] else None,
            sums.dweight_VD,
            sums.dbias_V,
        ]
        ctx.dtypes = (hidden_ND.dtype, values_N.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        total = torch.stack([part.loss for part in parts]).sum()
        stats = PPOStats(tuple(x for part in parts for x in part.stats.parts))
        outputs = (total, stats, spread(_cat(parts, "logprob_R")), spread(_cat(parts, "entropy_R")))
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @once("linear_ppo_loss")
    def backward(ctx, g, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "linear_ppo_loss: backward ran before and has used up the gradients that the forward made; "
                "call linear_ppo_loss again instead of retain_graph=True"
            )
        grads, ctx.grads = ctx.grads, None
        if not (g.device.type == "cpu" and g.item() == 1.0):
            grads = [None if x is None else x.mul_(g) for x in grads]
        return (
            *(None if x is None else x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


def _run(chunk: Callable) -> Callable:
    def run(hidden_ND, values_N, head, tokens_N, batch, options, *, temperature, normalizer, whiten):
        if hidden_ND.dtype not in DTYPE_CODES:
            raise ValueError(
                f"linear_ppo_loss: hidden must be float32, bfloat16 or float16 here; got {hidden_ND.dtype}"
            )
        shape, depth = tokens_N.shape, hidden_ND.shape[-1]
        if normalizer is None:
            normalizer = tokens_N.numel() if batch.mask_N is None else batch.mask_N.sum().clamp(min=1)
        flat = PPOBatch(*(None if x is None else x.detach().reshape(-1) for x in batch))
        flat = PPOBatch(*(x.float() for x in flat[:4]), flat.mask_N)
        scales = Scales(temperature, float(head.logit_scale), float(head.softcap or 0.0))
        loss, stats, logprob_N, entropy_N = _LinearPPOLoss.apply(
            hidden_ND.reshape(-1, depth),
            values_N.reshape(-1),
            head.weight_VD,
            head.bias_V,
            tokens_N.reshape(-1).contiguous(),
            flat,
            scales,
            Loss(options, normalizer, whiten),
            chunk,
        )
        return LinearPPOLoss(loss, stats, logprob_N.view(shape), entropy_N.view(shape))

    return run


BACKEND_TABLE = {
    "triton": _run(chunk_by_parts(tiles.TRITON, "triton")),
    "cpu": _run(cpu_chunk),
    "reference": linear_ppo_loss_reference,
}


def check_batch(values_N: Tensor, batch: PPOBatch, shape: torch.Size, device: torch.device) -> None:
    named = {"values_N": values_N, **{f"batch.{name}": x for name, x in zip(batch._fields, batch, strict=True)}}
    for name, x in named.items():
        if x is None and name == "batch.mask_N":
            continue
        right = x.dtype == torch.bool if name == "batch.mask_N" else x.is_floating_point()
        if not right or x.shape != shape or x.device != device:
            kind = "bool" if name == "batch.mask_N" else "floating point"
            raise ValueError(
                f"linear_ppo_loss: {name} must be {kind} of shape {tuple(shape)} on {device}; "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )


def linear_ppo_loss(
    hidden_ND: Tensor,
    values_N: Tensor,
    head: Head,
    tokens_N: Tensor,
    batch: PPOBatch,
    options: PPOLossOptions,
    *,
    temperature: float = 1.0,
    normalizer: float | None = None,
    whiten: tuple | None = None,
    backend: str | None = None,
) -> LinearPPOLoss:
    """PPO's loss of `tokens_N` under `head` applied to `hidden_ND`, with statistics, log-probs and entropies.

    hidden_ND: [..., D] and head.weight_VD: [V, D] of one dtype, float32, bfloat16 or float16 (float64 runs the
    reference); values_N, tokens_N and batch's tensors: [...]. options, normalizer (default: how many tokens count) and
    whiten are ppo_loss's. The loss of micro-batches that share one normalizer adds up to the whole batch's, and so do
    their gradients. Memory is bounded as the module says.

    On a GPU the host waits once for the rows of a mask with False in it (give the rows that count, and there is no mask), and
    at each chunk for how many rows have a gradient, while the GPU makes that gradient.

    backward may run once: it hands over the gradients that the forward made. Under no_grad only the loss is computed.
    Raises ValueError for a wrong shape, dtype, device, token, head or temperature.
    """
    check_head("linear_ppo_loss", hidden_ND, head)
    hidden_ND, head = autocast_inputs(hidden_ND, head)
    shape = hidden_ND.shape[:-1]
    check_tokens("linear_ppo_loss", tokens_N, shape, hidden_ND.device, head.weight_VD.shape[0])
    check_batch(values_N, batch, shape, hidden_ND.device)
    temperature = check_temperature("linear_ppo_loss", temperature)
    if backend is None and hidden_ND.dtype == torch.float64:
        backend = "reference"
    run = pick("linear_ppo_loss", BACKEND_TABLE, hidden_ND.device, backend)
    return run(
        hidden_ND,
        values_N,
        head,
        tokens_N,
        batch,
        options,
        temperature=temperature,
        normalizer=normalizer,
        whiten=whiten,
    )
