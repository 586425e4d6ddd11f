"""A traced model with this rollout's weights and pages: packs the matrices, hands the list of operations to C++.

Suffixes: N tokens of a step, S steps, B sequences, M pages per sequence, V vocabulary, D hidden.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import fx

from fastppo.attention.paged import KVCache
from fastppo.generation.memory import free_memory
from fastppo.generation.row_program import KINDS, Op, Program
from fastppo.kernels import _recycle
from fastppo.kernels._backend import extension
from fastppo.kernels.paged_attention import DTYPE_CODES


class Drawn(NamedTuple):
    """What several steps sampled; the first counts_B[b] steps of sequence b, the rest is undefined."""

    tokens_SB: torch.Tensor
    counts_B: torch.Tensor
    numbers_3SB: torch.Tensor  # log-prob as sampled, log-prob, entropy
    hidden_SBD: torch.Tensor | None


class DecodeProgram:
    """Weights are packed when this is made: make a new one for every rollout, after the last optimizer step."""

    def __init__(self, program: Program, cache: KVCache, weights: torch.dtype):
        self._program = program
        self._keep: list[torch.Tensor] = []  # what the C++ side has addresses of
        self.weights = weights
        self._constants = _evaluate(program)
        self._packed = self._room_for_packed()
        ops = [self._tuple(op, cache, program.layers.get(i)) for i, op in enumerate(program.ops)]
        program.workspace = program.workspace or extension().Workspace()
        self._native = extension().DecodeProgram(program.sizes, ops, cache.block_size, program.workspace)

    def forward(self, tokens_N, positions_N, layout, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, hidden) of the rows in `keep` (all when None). layout: PagedDecode or PagedPrefill."""
        program, N = self._program, len(tokens_N)
        tokens_N1, positions_N1 = tokens_N.float(), positions_N.float()  # indices are exact below 2**24
        starts = layout.packed.cu_seqlens.data_ptr() if hasattr(layout, "packed") else 0
        tables_BM = layout.block_tables_BM
        where = (
            layout.slots_N.data_ptr(),
            tables_BM.data_ptr(),
            tables_BM.shape[1],
            layout.context_lens_B.data_ptr(),
            starts,
        )
        inputs = [(program.tokens, tokens_N1.data_ptr()), (program.positions, positions_N1.data_ptr())]
        if keep is None:
            return self._rows(0, N, len(tables_BM), where, inputs)
        live = {buffer: torch.empty(N, program.sizes[buffer]) for buffer in program.live}
        inputs = dict(inputs) | {buffer: x.data_ptr() for buffer, x in live.items()}
        self._native.run(0, program.split, N, len(tables_BM), *where, list(inputs.items()))
        live = [(buffer, x[keep]) for buffer, x in live.items()]
        return self._rows(program.split, len(keep), len(keep), where, [(buffer, x.data_ptr()) for buffer, x in live])

    def _rows(self, first: int, N: int, B: int, where: tuple, inputs: list) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits, hidden) of N rows by the operations from `first` on."""
        program = self._program
        hidden_ND, logits_NV = (torch.empty(N, program.sizes[x]) for x in (program.hidden, program.logits))
        results = [(program.hidden, hidden_ND.data_ptr()), (program.logits, logits_NV.data_ptr())]
        if N:
            self._native.run(first, len(program.ops), N, B, *where, [*inputs, *results])
        return logits_NV, hidden_ND

    def decode(
        self, state, left: list[int], steps: int, options, eos: Iterable[int], *, stop_at_end: bool, keep_hidden: bool
    ) -> Drawn:
        """Up to `steps` tokens of every sequence of a DecodeState, whose pages hold that many more.

        left: how many tokens each may still get.   options: SamplingOptions without a repetition penalty.   stop_at_end:
        return as soon as one sequence ends. Tokens below 0 say why a row can't be sampled.
        """
        program, (B, M) = self._program, state.block_tables_BM.shape
        tokens_SB, counts_B = torch.zeros(steps, B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
        numbers_3SB, left_B = torch.zeros(3, steps, B), torch.tensor(left, dtype=torch.int64)
        hidden_SBD = torch.empty(steps, B, program.sizes[program.hidden]) if keep_hidden else None
        arrays = (state.tokens_B, state.positions_B, state.seeds_B, left_B, state.block_tables_BM)
        arrays += (tokens_SB, counts_B, numbers_3SB)
        addresses = [x.data_ptr() for x in arrays] + [0 if hidden_SBD is None else hidden_SBD.data_ptr()]
        buffers = (program.tokens, program.positions, program.hidden, program.logits)
        draw = (options.temperature, options.top_k, options.top_p, options.min_p, options.logprob_temperature)
        self._native.decode((steps, B, M), addresses, buffers, stop_at_end, list(eos), draw)
        return Drawn(tokens_SB, counts_B, numbers_3SB, hidden_SBD)

    def close(self) -> None:
        """The rollout is over: the weights' memory is the next stage's; much of it is given back."""
        packed = sum(x.nbytes for x in self._packed.values())
        self._native = None
        self._packed.clear()
        self._keep.clear()
        if packed > free_memory(torch.device("cpu")) // 8:
            self._program.workspace = None
            _recycle.release(_recycle.WEIGHTS_OR_GRADIENTS)

    def _tuple(self, op: Op, cache: KVCache, layer: int | None) -> tuple:
        mode, f, p, q = op.mode, op.f, 0, 0
        if op.kind == "linear":
            mode, p = self._pack(op.p)
            q = self._address(op.q)
        elif op.kind == "embed":
            table = self._constants[op.p].contiguous()
            mode = int(table.dtype == torch.bfloat16)
            p = self._hold(table if mode else table.float())
        elif op.kind == "attention":
            k_cache, v_cache = cache.layers[layer]
            mode, p, q = DTYPE_CODES[k_cache.dtype], self._hold(k_cache), self._hold(v_cache)
        else:
            p, q = self._address(op.p), self._address(op.q)
        if isinstance(f, fx.Node):
            f = self._constants[f].item()
        i = (*op.i, 0, 0, 0, 0, 0)[:5]
        return (KINDS.index(op.kind), mode, op.out, op.a, op.b, op.c, i, float(f), op.g, p, q)

    def _address(self, node: fx.Node | None) -> int:
        return 0 if node is None else self._hold(self._constants[node].float().contiguous())

    def _hold(self, x: torch.Tensor) -> int:
        self._keep.append(x)
        return x.data_ptr()

    def _is_half(self, node: fx.Node) -> bool:
        return torch.bfloat16 in (self.weights, self._constants[node].dtype)

    def _room_for_packed(self) -> dict[fx.Node, torch.Tensor]:
        """Where each packed matrix goes: one after the other in memory that the stage before may have left."""
        places: dict[fx.Node, torch.Tensor] = {}
        nodes = dict.fromkeys(op.p for op in self._program.ops if op.kind == "linear")
        for half in (False, True):
            mine = [node for node in nodes if self._is_half(node) == half]
            sizes = [extension().packed_size(*reversed(self._constants[node].shape)) for node in mine]
            if sizes:
                dtype = torch.bfloat16 if half else torch.float32
                memory = _recycle.of_stage(_recycle.WEIGHTS_OR_GRADIENTS, (sum(sizes),), dtype)
                places |= zip(mine, memory.split(sizes), strict=True)
        return places

    def _pack(self, node: fx.Node) -> tuple[int, int]:
        weight_KN, half, packed = self._constants[node], self._is_half(node), self._packed[node]
        K, N = weight_KN.shape
        if weight_KN.dtype not in (torch.float32, torch.bfloat16):
            weight_KN = weight_KN.float()
        k_stride, n_stride = weight_KN.stride()
        source = weight_KN.data_ptr(), weight_KN.dtype == torch.bfloat16
        extension().pack_linear(*source, n_stride, k_stride, N, K, packed.data_ptr(), half)
        return int(half), self._hold(packed)


def _evaluate(program: Program) -> dict[fx.Node, torch.Tensor]:
    """The constants' values now: parameters, their transposes, 1 + weight and the like."""
    values: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in program.constants:
            if node.op == "get_attr":
                values[node] = getattr(program.graph, node.target).detach()
                continue
            args, kwargs = (fx.node.map_arg(x, values.__getitem__) for x in (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)
    return values
