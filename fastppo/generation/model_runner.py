"""Runs the policy on the scheduler's steps: prompts into pages, then one token per sequence from them.

Suffixes: N tokens of a step, B sequences of a step, M pages per sequence, V vocabulary, D hidden.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fastppo.attention.layout import Packed, using
from fastppo.attention.paged import KVCache, LayerSpec, PagedDecode, PagedPrefill
from fastppo.generation.cuda_graphs import DecodeGraphs, Step, fingerprint
from fastppo.generation.scheduler import Chunk
from fastppo.generation.sequence import Sequence
from fastppo.kernels.sampling import SamplingOptions


class Output(NamedTuple):
    """Of the last token of each sequence."""

    logits_BV: torch.Tensor
    values_B: torch.Tensor | None


class DecodeState(NamedTuple):
    """The sequences of a decode step as tensors."""

    seqs: list[Sequence]
    tokens_B: torch.Tensor
    positions_B: torch.Tensor  # int64, of the token that is read
    block_tables_BM: torch.Tensor
    context_lens_B: torch.Tensor
    seeds_B: torch.Tensor


class ModelRunner:
    """One rollout on `model` (unwrapped, in eval mode, our attention installed)."""

    def __init__(self, model, v_head, layers: list[LayerSpec], num_blocks: int, block_size: int):
        self.model, self.v_head = model, v_head
        self.program = None  # a DecodeProgram takes the place of the model's Python where it can
        self.graphs: DecodeGraphs | None = None  # on a GPU: several decode steps without the host in between
        self.device = model.get_input_embeddings().weight.device
        self.block_size = block_size
        self._layers, self._num_blocks = layers, num_blocks
        self._keeps_logits = model._supports_logits_to_keep()
        self._hidden: list[torch.Tensor] = []

    @functools.cached_property
    def cache(self) -> KVCache:
        return KVCache(self._layers, self._num_blocks, self.block_size, self.device)

    def keep_pages_in(self, dtype: torch.dtype) -> None:
        """The dtype of the pages, instead of the model's; before they are first used."""
        assert "cache" not in vars(self)
        self._layers = [spec._replace(dtype=dtype) for spec in self._layers]

    @contextlib.contextmanager
    def _watching_head(self):
        """The value head reads what the output embedding reads: catch it on its way."""
        if self.v_head is None:
            yield
            return
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: self._hidden.append(args[0])
        )
        try:
            yield
        finally:
            hook.remove()
            self._hidden.clear()

    def prefill(self, chunks: list[Chunk]) -> Output | None:
        """Read the chunks; the output has a row for each chunk that ends its sequence, None when none does."""
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.device)
        packed = Packed(cu_seqlens, max(lengths), lengths)
        tokens_N = self._int64([token for seq, start, stop in chunks for token in seq.tokens[start:stop]])
        positions_N = self._int64([i for _, start, stop in chunks for i in range(start, stop)])
        layout = PagedPrefill(
            self.cache,
            packed,
            self._int64([self._slot(seq, i) for seq, start, stop in chunks for i in range(start, stop)]),
            self._tables([chunk.seq for chunk in chunks]),
            torch.tensor([chunk.stop for chunk in chunks], dtype=torch.int32, device=self.device),
            any(chunk.start for chunk in chunks),
        )
        ends = itertools.accumulate(lengths)  # not cu_seqlens.tolist(), which would wait for a GPU
        last = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last]
        return self._forward(tokens_N, positions_N, layout, self._int64(last))

    def decode(self, state: DecodeState) -> Output:
        """Read the last token of every sequence."""
        tables_BM, positions_B = state.block_tables_BM, state.positions_B
        pages_B = tables_BM.gather(1, (positions_B // self.block_size)[:, None])[:, 0]
        slots_B = pages_B * self.block_size + positions_B % self.block_size
        return self._forward(
            state.tokens_B, positions_B, PagedDecode(self.cache, slots_B, tables_BM, state.context_lens_B), None
        )

    def decode_steps(self, seqs, steps: int, options, eos, stop_at_end: bool):
        """Several steps of the program with sampling in between: a Drawn, with hidden states when there is a value head."""
        left = [seq.limit - seq.num_new for seq in seqs]
        return (self.program or self.graphs).decode(
            self.state(seqs), left, steps, options, eos, stop_at_end=stop_at_end, keep_hidden=self.v_head is not None
        )

    @property
    def decodes_several(self) -> bool:
        """Whether decode_steps works here, when tokens depend on nothing but logits, options and seeds."""
        return self.program is not None or self.graphs is not None

    def use_graphs(self, graphs: DecodeGraphs, options: SamplingOptions, eos: Iterable[int]) -> None:
        """Decode through `graphs`, which hold tensors of the rollout before this one."""
        head = self.model.get_output_embeddings().weight
        hidden = None if self.v_head is None else (head.shape[1], head.dtype)
        eos_E = torch.tensor(sorted(eos), dtype=torch.int64, device=self.device)
        step = Step(self.logits_and_hidden, self.cache, options, eos_E, self.block_size, hidden)
        graphs.begin(step, fingerprint(self.model, self.cache, step))
        self.graphs = graphs

    def _forward(self, tokens_N, positions_N, layout, keep: torch.Tensor | None) -> Output:
        if self.program is not None:
            logits_BV, hidden_BD = self.program.forward(tokens_N, positions_N, layout, keep)
            return Output(logits_BV, None if self.v_head is None else self.values(hidden_BD))
        return self.run_model(tokens_N, positions_N, layout, keep)

    def run_model(self, tokens_N, positions_N, layout, keep: torch.Tensor | None) -> Output:
        """The model's own forward pass."""
        logits_BV, hidden_BD = self.logits_and_hidden(tokens_N, positions_N, layout, keep)
        return Output(logits_BV, None if hidden_BD is None else self.values(hidden_BD))

    def logits_and_hidden(self, tokens_N, positions_N, layout, keep: torch.Tensor | None = None):
        """(logits, hidden) of the rows in `keep` (all when None); hidden None without a value head."""
        self._hidden.clear()
        options = {} if keep is None or not self._keeps_logits else {"logits_to_keep": keep}
        with self._watching_head(), using(layout):
            out = self.model(input_ids=tokens_N[None], position_ids=positions_N[None], use_cache=False, **options)
            hidden_BD = self._hidden[0][0] if self._hidden else None
        logits_BV = out.logits[0]
        if keep is not None and not self._keeps_logits:
            logits_BV = logits_BV[keep]
            hidden_BD = hidden_BD if hidden_BD is None else hidden_BD[keep]
        return logits_BV, hidden_BD

    def values(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """The value head's output for each hidden state, [B] float32."""
        weight = next(self.v_head.parameters(), None)
        if weight is not None:
            hidden_BD = hidden_BD.to(weight.device, weight.dtype)
        return self.v_head(hidden_BD).float().view(-1)

    # -- tensors from sequences

    def state(self, seqs: list[Sequence]) -> DecodeState:
        lengths = [len(seq) for seq in seqs]
        return DecodeState(
            seqs,
            self._int64([seq.tokens[-1] for seq in seqs]),
            self._int64([n - 1 for n in lengths]),
            self._tables(seqs),
            torch.tensor(lengths, dtype=torch.int32, device=self.device),
            self._int64([seq.seed for seq in seqs]),
        )

    def advance(self, state: DecodeState, tokens_B: torch.Tensor) -> DecodeState:
        """The same sequences one token later; a page that was added in between is entered into the tables."""
        tables_BM = state.block_tables_BM
        new = [(b, seq.block_table) for b, seq in enumerate(state.seqs) if (len(seq.tokens) - 1) % self.block_size == 0]
        if new and max(len(table) for _, table in new) > tables_BM.shape[1]:
            tables_BM = self._tables(state.seqs)
        elif new:
            rows, columns, pages = zip(*((b, len(table) - 1, table[-1]) for b, table in new), strict=True)
            tables_BM[list(rows), list(columns)] = torch.tensor(pages, dtype=torch.int32, device=self.device)
        return DecodeState(
            state.seqs, tokens_B, state.positions_B + 1, tables_BM, state.context_lens_B + 1, state.seeds_B
        )

    def _tables(self, seqs: list[Sequence]) -> torch.Tensor:
        width = max(len(seq.block_table) for seq in seqs)
        rows = [seq.block_table + [0] * (width - len(seq.block_table)) for seq in seqs]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    def _slot(self, seq: Sequence, i: int) -> int:
        return seq.block_table[i // self.block_size] * self.block_size + i % self.block_size

    def _int64(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)
