"""A model's body forward and backward over packed sequences, written out: few large calls, nothing kept twice.

    x = tokens[ids] + positions[places];  each block: x += out(attention(norm1(x)));  x += down(act(up(norm2(x))))
    hidden = norm(x) at the rows that the head reads

Past the last block's attention only the rows that the head reads go on: prompts have no part in what follows.
Kept for backward per block: x before both norms (float32), q k v, attention's output and log-sums, the MLP before its
activation. Norms' outputs and activations are computed again on the way back, inside the kernels that run there anyway.
Suffixes: N tokens of the pack (with padding rows of zeros at its end), R rows that the head reads, D hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engine import kernels
from fastppo.engine.kernels import Normed, Where
from fastppo.engine.native import Memory, Native, Room, fits
from fastppo.engine.spec import Block, Matrix, Spec
from fastppo.engine.weights import Gradients, Weights
from fastppo.gradients import FlatGradients
from fastppo.kernels._products import mm


class Inputs(NamedTuple):
    """One pack. tokens_N, places_N: int64, the token and its position.   at_R: rows that the head reads."""

    tokens_N: Tensor
    places_N: Tensor
    cu_seqlens: Tensor
    at_R: Tensor
    rows: int  # N with padding


@dataclass(eq=False)
class _Layer:
    """What a block keeps."""

    x1: Tensor
    stats1: Tensor
    qkv: Tensor
    rotated: Tensor  # qkv after the norms of the heads; qkv itself where there are none
    head_stats: tuple | None
    out: Tensor
    lse: Tensor
    x2: Tensor
    stats2: Tensor
    pre: Tensor
    at_R: Tensor | None  # of the last block: the rows that x2 and pre have


@dataclass(eq=False)
class Tape:
    inputs: Inputs
    where: Where
    layers: list[_Layer] | Room
    last: Normed


class _Rows(NamedTuple):
    """The rows that the head reads, and how many there are with padding."""

    at_R: Tensor
    count: int

    def of(self, x: Tensor) -> Tensor:
        """x [N, K] at them, then zeros: [count, K]"""
        picked = x.new_zeros(self.count, x.shape[1])
        torch.index_select(x, 0, self.at_R, out=picked[: len(self.at_R)])
        return picked

    def spread(self, x: Tensor, rows: int) -> Tensor:
        """of()'s transpose: [rows, K]"""
        return x.new_zeros(rows, x.shape[1]).index_copy_(0, self.at_R, x[: len(self.at_R)])


class Body:
    """One model's body in one compute dtype; `train` says whether gradients will be asked for."""

    def __init__(self, spec: Spec, dtype: torch.dtype, train: bool, flat: FlatGradients | None = None):
        self.spec, self.dtype = spec, dtype
        self.weights = Weights(spec, dtype, keep=train)
        self.gradients = Gradients(flat)
        self._fits, self.memory = fits(spec), Memory()
        self._native: Native | None = None
        self._at = _addresses(spec)

    def refresh(self) -> None:
        """The parameters have changed."""
        if (now := _addresses(self.spec)) != self._at:  # some optimizers write p.data = ...
            self.weights, self._native, self._at = Weights(self.spec, self.dtype, self.weights.keep), None, now
            return
        self.weights.refresh()
        if not self.weights.copied:
            self._native = None

    # --- forward ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, inputs: Inputs, padded_rows: int, keep: bool) -> tuple[Tensor, Tape | None]:
        """(hidden [padded_rows, D] as T: the head's rows, then zeros or norms of zeros; what backward needs)."""
        where, rows = self._where(inputs), _Rows(inputs.at_R, padded_rows)
        padded = inputs.rows > len(inputs.tokens_N) or padded_rows > len(inputs.at_R)
        x_RD, add, layers = (self._blocks if padded or not self._fits else self._at_once)(inputs, where, rows, keep)
        last = kernels.norm(x_RD, add, self.spec.norm, self.dtype)
        return last.y_ND, Tape(inputs, where, layers, last) if keep else None

    def _blocks(self, inputs: Inputs, where: Where, rows: _Rows, keep: bool) -> tuple[Tensor, Tensor, list | None]:
        """(x, what the last block adds to it, what backward needs)"""
        x, layers, add = torch.empty(inputs.rows, self.spec.tokens_VD.shape[1]), [] if keep else None, None
        self._embed(inputs, x)
        *blocks, top = self.spec.blocks
        for block in blocks:
            x, add = self._block(block, x, add, where, layers)
        return *self._block(top, x, add, where, layers, rows), layers

    def _at_once(self, inputs: Inputs, where: Where, rows: _Rows, keep: bool) -> tuple[Tensor, Tensor, Room]:
        if self._native is None:
            self._native = Native(self.spec, self.weights, self.memory)
        room = self._native.room(inputs.rows, rows.at_R, keep)
        self._embed(inputs, room.x_ND)
        self._native.forward(room, where)
        return room.last_RD, room.add_RD, room

    def _embed(self, inputs: Inputs, x: Tensor) -> None:
        table = self.spec.tokens_VD
        N = len(inputs.tokens_N)
        torch.index_select(table, 0, inputs.tokens_N, out=x[:N])
        if self.spec.positions_PD is not None:
            x[:N] += self.spec.positions_PD.index_select(0, inputs.places_N)
        x[N:] = 0

    def _where(self, inputs: Inputs) -> Where:
        if self.spec.rotary is None:
            return Where(inputs.cu_seqlens, None, None)
        cos, sin = self.spec.rotary(self.spec.tokens_VD[:1], inputs.places_N[None])
        return Where(inputs.cu_seqlens, *(x[0].float().contiguous() for x in (cos, sin)))

    def _block(
        self, block: Block, x: Tensor, add: Tensor | None, where: Where, layers: list | None, rows: _Rows | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x, what the MLP adds to it), of `rows` where they are given."""
        first = kernels.norm(x, add, block.norm1, self.dtype)
        qkv = self.weights.of(block.qkv).forward(first.y_ND)
        rotated, head_stats = self._norm_heads(block, qkv)
        out, lse = kernels.attention(rotated, where, block.heads)
        x, read = (first.x_ND, out) if rows is None else (rows.of(first.x_ND), rows.of(out))
        second = kernels.norm(x, self.weights.of([block.out]).forward(read), block.norm2, self.dtype)
        pre = self.weights.of(block.up).forward(second.y_ND)
        add = self.weights.of([block.down]).forward(kernels.activation(pre, block.activation))
        if layers is not None:
            kept = (first.x_ND, first.stats_N2, qkv, rotated, head_stats, out, lse, second.x_ND, second.stats_N2, pre)
            layers.append(_Layer(*kept, None if rows is None else rows.at_R))
        return second.x_ND, add

    def _norm_heads(self, block: Block, qkv: Tensor):
        if block.head_norms is None:
            return qkv, None
        rotated, stats = qkv.clone(), []
        for (first, width), f in zip(_spans(block), block.head_norms, strict=True):
            x = _heads(qkv[:, first : first + width].float(), block.heads.D)
            normed = kernels.norm(x, None, f, self.dtype)
            rotated[:, first : first + width] = normed.y_ND.view(len(qkv), width)
            stats.append(normed.stats_N2)
        return rotated, stats

    # --- backward -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def backward(self, tape: Tape, dhidden_RD: Tensor) -> None:
        """Add the gradients of the parameters for dloss/dhidden (as T; zero in padding rows). The tape is used up."""
        last = tape.last
        dres = torch.empty_like(last.x_ND)
        into = (dres, self.gradients.norm(self.spec.norm))
        f = self.spec.norm
        dy, _ = kernels.norm_backward(dhidden_RD, last.x_ND, last.stats_N2, f, *into, fresh=True, again=False)
        if isinstance(tape.layers, Room):
            dres = self._native.backward(tape.layers, tape.where, dy, dres, self.gradients)
        else:
            for block in reversed(self.spec.blocks):
                dres, dy = self._block_backward(block, tape.layers.pop(), tape.where, dres, dy)
        self._embed_backward(tape.inputs, dres)

    def _block_backward(self, block: Block, kept: _Layer, where: Where, dres: Tensor, dy: Tensor):
        """(dloss/dx in float32, the same as T)."""
        of = self.weights.of
        dact = of([block.down]).backward(dy)
        dpre, act = kernels.activation_backward(kept.pre, dact, block.activation)
        self._matrix_gradients([block.down], act, dy)
        dy, y = self._norm_backward(of(block.up).backward(dpre), kept.x2, kept.stats2, block.norm2, dres)
        self._matrix_gradients(block.up, y, dpre)
        dout = of([block.out]).backward(dy)
        if kept.at_R is None:
            read = kept.out
        else:
            rows = _Rows(kept.at_R, len(dy))
            read, dout, dres = rows.of(kept.out), rows.spread(dout, len(kept.out)), rows.spread(dres, len(kept.out))
        self._matrix_gradients([block.out], read, dy)
        dqkv = kernels.attention_backward(dout, kept.rotated, kept.out, kept.lse, where, block.heads)
        if block.head_norms is not None:
            self._heads_backward(block, kept, dqkv)
        dy, y = self._norm_backward(of(block.qkv).backward(dqkv), kept.x1, kept.stats1, block.norm1, dres)
        self._matrix_gradients(block.qkv, y, dqkv)
        return dres, dy

    def _norm_backward(self, dy, x, stats, f, dres):
        return kernels.norm_backward(dy, x, stats, f, dres, self.gradients.norm(f))

    def _heads_backward(self, block: Block, kept: _Layer, dqkv: Tensor) -> None:
        for (first, width), f, stats in zip(_spans(block), block.head_norms, kept.head_stats, strict=True):
            part = slice(first, first + width)
            x, dy = _heads(kept.qkv[:, part].float(), block.heads.D), _heads(dqkv[:, part], block.heads.D)
            dx = torch.empty_like(x)
            kernels.norm_backward(dy, x, stats, f, dx, self.gradients.norm(f), fresh=True, again=False)
            dqkv[:, part] = dx.view(len(dqkv), width)

    def _matrix_gradients(self, matrices: list[Matrix], x: Tensor, dy: Tensor) -> None:
        weights, biases = self.gradients.pieces(matrices)
        for piece in weights:
            part = dy[:, piece.first : piece.first + piece.count]
            a, b = (x.t(), part) if piece.turned else (part.t(), x)
            mm(a, b, out=piece.to, add=piece.add)
        for piece in biases:
            kernels.sum_columns(dy[:, piece.first : piece.first + piece.count], piece.to, piece.add)

    def _embed_backward(self, inputs: Inputs, dres: Tensor) -> None:
        """dres is used up."""
        tables = ((self.spec.positions_PD, inputs.places_N), (self.spec.tokens_VD, inputs.tokens_N))
        for table, index_N in tables:
            to, add = self.gradients.target(table)
            if to is None:
                continue
            if not add:
                to.zero_()
            if table is self.spec.tokens_VD and self.spec.padding is not None:
                # as nn.Embedding has it: nothing is learnt of the padding token, also where it was sampled
                dres[: len(index_N)][index_N == self.spec.padding] = 0
            kernels.embedding_backward(index_N, dres, to)


def _addresses(spec: Spec) -> list[int]:
    return [p.data_ptr() for p in spec.parameters()]


def _heads(x: Tensor, D: int) -> Tensor:
    """x [N, heads D] as rows of D, one after the other: of a single head reshape() would give a view of strided rows."""
    return x.contiguous().view(-1, D)


def _spans(block: Block) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first column, width) of queries and keys."""
    q, k = block.heads.H * block.heads.D, block.heads.K * block.heads.D
    return (0, q), (q, k)
