"""A body's blocks in one call each way: csrc/cpu/train_body.cpp, on processors with AMX tiles, for models without norms of heads.

Small models spend more time in Python between the kernels than in them: 35 calls per block and pass become none.
Suffixes: N tokens of the pack, R rows that the head reads, D hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engine.kernels import NormGradients, Where
from fastppo.engine.spec import Block, Matrix, Spec
from fastppo.engine.weights import Gradients, Piece, Weights
from fastppo.kernels import _recycle
from fastppo.kernels._backend import extension


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def fits(spec: Spec) -> bool:
    """Whether its blocks can run in one call here: all of one shape (Qwen2 may have windows in some of them only)."""
    return (
        len({_shape(block) for block in spec.blocks}) == 1 and not spec.blocks[0].head_norms and extension().amx_works()
    )


def _shape(block: Block) -> tuple:
    """What all blocks of a TrainBody share."""
    return block.heads, block.activation, block.norm1.layer, block.norm2.layer, block.down.inputs, block.down.outputs


# a rollout's pages are given back before learning where they are so many times larger than what is kept for backward
SPARE = 4


class Room(NamedTuple):
    """Memory of one pass. x_ND: float32, the first block's input, to be filled. last_RD, add_RD: their sum is the last's output."""

    x_ND: Tensor
    at_R: Tensor
    last_RD: Tensor
    add_RD: Tensor
    blocks: Tensor
    step: int  # bytes from one block's memory to the next
    scratch: Tensor


class Memory:
    """Bytes that passes share one after the other, and with other stages; fresh ones would cost page faults.

    SCRATCH is the body's until its pass is over and the head's from there to its end.
    """

    def __init__(self):
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, count: int) -> Tensor:
        if name not in self._held or self._held[name].numel() < count:
            self._held.pop(name, None)  # freed before the larger one is made
            self._held[name] = _recycle.of_stage(name, (count,), torch.uint8)
        return self._held[name][:count]


class Native:
    """The blocks of `spec` with the weights as they are now."""

    def __init__(self, spec: Spec, weights: Weights, memory: Memory):
        self.spec, self._memory, self._dtype = spec, memory, weights.dtype
        self._ready = []  # what C++ has addresses of
        first = spec.blocks[0]
        heads, inputs = first.heads, first.down.inputs
        sizes = (len(first.norm1.weight_D), inputs, heads.H, heads.K, heads.D, heads.window or 0, first.activation)
        sizes += (int(first.norm1.layer), int(weights.dtype == torch.bfloat16))
        self._run = extension().TrainBody(sizes, heads.scale, [self._block(block, weights) for block in spec.blocks])

    def _block(self, block: Block, weights: Weights) -> tuple:
        norms = [(_at(f.weight_D), _at(f.bias_D), f.eps) for f in (block.norm1, block.norm2)]
        return norms, [self._matrices(x, weights) for x in _matrices(block)]

    def _matrices(self, matrices: list[Matrix], weights: Weights) -> tuple:
        ready = weights.of(matrices)
        self._ready.append(ready)
        parts = []
        for w_nK, b_n, first in ready.parts:
            turned = not w_nK.is_contiguous()
            parts.append((_at(w_nK), _at(b_n), w_nK.stride(1 if turned else 0), first, len(w_nK), turned))
        return matrices[0].inputs, ready.outputs, parts

    def room(self, N: int, at_R: Tensor, keep: bool) -> Room:
        one, scratch, x2 = self._run.bytes(N)
        R, D, count = len(at_R), len(self.spec.norm.weight_D), len(self.spec.blocks) if keep else 1
        if keep:
            _recycle.release_over(_recycle.PAGES_OR_ACTIVATIONS, SPARE * one * count)
        blocks = self._memory.take(_recycle.PAGES_OR_ACTIVATIONS, one * count)
        scratch = self._memory.take(_recycle.SCRATCH, scratch)
        last = one * (count - 1) + x2
        x_ND = blocks[: N * D * 4].view(torch.float32).view(N, D)
        last_RD = blocks[last : last + R * D * 4].view(torch.float32).view(R, D)
        add_RD = scratch[: R * D * self._dtype.itemsize].view(self._dtype).view(R, D)
        return Room(x_ND, at_R, last_RD, add_RD, blocks, one if keep else 0, scratch)

    def _pack(self, room: Room, where: Where) -> tuple:
        sizes = len(room.x_ND), len(room.at_R), len(where.cu_seqlens) - 1
        return sizes, (room.at_R.data_ptr(), where.cu_seqlens.data_ptr(), _at(where.cos_ND), _at(where.sin_ND))

    def forward(self, room: Room, where: Where) -> None:
        addresses = room.blocks.data_ptr(), room.scratch.data_ptr()
        self._run.forward(self._pack(room, where), *addresses, room.step)

    def backward(self, room: Room, where: Where, dy_RD: Tensor, dres_RD: Tensor, gradients: Gradients) -> Tensor:
        """dres: dloss/d(the last block's output), dy: the same as T. Returns dloss/d(the first block's input), float32 [N, D].

        The parameters' gradients are added to .grad; dy and dres are used up.
        """
        targets = [_targets(block, gradients) for block in self.spec.blocks]
        dres_ND = torch.empty_like(room.x_ND)
        addresses = room.blocks.data_ptr(), room.scratch.data_ptr()
        given = dy_RD.data_ptr(), dres_RD.data_ptr(), dres_ND.data_ptr()
        self._run.backward(self._pack(room, where), *addresses, room.step, given, targets)
        return dres_ND


def _matrices(block: Block) -> tuple[list[Matrix], ...]:
    """In the order of train_body.cpp."""
    return block.qkv, [block.out], block.up, [block.down]


def _targets(block: Block, gradients: Gradients) -> tuple:
    norms = [_norm(gradients.norm(f)) for f in (block.norm1, block.norm2)]
    return norms, [[_addresses(x) for x in gradients.pieces(matrices)] for matrices in _matrices(block)]


def _norm(to: NormGradients) -> tuple[int, int, bool]:
    return _at(to.weight_D), _at(to.bias_D), to.add


def _addresses(pieces: list[Piece]) -> list[tuple]:
    return [(piece.to.data_ptr(), *piece[1:]) for piece in pieces]
