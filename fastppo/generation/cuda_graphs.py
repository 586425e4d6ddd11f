"""Decode steps on a GPU without Python and without a wait in between: model, sampler and bookkeeping of a step as one CUDA graph.

A step reads and writes static tensors only (Static), so that replaying its graph is the next step. Sequences are padded up to a bucket; a row
that has ended, or that only pads, has context length 0 and slot -1: it reads and writes no page. Weights are read from where they
lie: an in-place optimizer step is seen, and what moves a weight or the cache makes the graphs be captured anew (`fingerprint`).

The first STEPS of a bucket run eagerly, which warms its kernels up; a capture comes with the second call. Where it fails the eager step goes
on, and the reason is logged once.   Suffixes: S steps, B sequences (padded: a bucket), M pages per sequence, V vocabulary, D hidden.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastppo.attention.paged import PagedDecode
from fastppo.generation.decode_program import Drawn
from fastppo.kernels._to_host import ToHost
from fastppo.kernels.sampling import SamplingOptions, sampling

log = logging.getLogger(__name__)
STEPS = 16  # most steps of one call
POLL = 4  # steps between two looks at what has ended; the host is at most twice as many ahead of the GPU


def bucket(count: int) -> int:
    """The smallest power of two that holds `count`; steps of 64 from 256 on."""
    return 1 << (count - 1).bit_length() if count <= 256 else -(-count // 64) * 64


@dataclass
class Static:
    """The tensors that a step reads and writes, for one bucket and one width of the block tables."""

    tokens_B: torch.Tensor  # int64, read by the next step
    positions_B: torch.Tensor  # int64, of those
    seeds_B: torch.Tensor
    tables_BM: torch.Tensor  # int32
    left_B: torch.Tensor  # int64, tokens that a sequence may still get
    done_B: torch.Tensor  # bool
    counts_B: torch.Tensor  # int64, tokens got since load()
    step_1: torch.Tensor  # int64
    tokens_SB: torch.Tensor  # results, as Drawn has them
    numbers_3SB: torch.Tensor
    hidden_SBD: torch.Tensor | None

    @classmethod
    def empty(cls, B: int, M: int, hidden: tuple[int, torch.dtype] | None, device: torch.device) -> "Static":
        def int64(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            *(int64(B), int64(B), int64(B), torch.zeros(B, M, dtype=torch.int32, device=device), int64(B)),
            torch.ones(B, dtype=torch.bool, device=device),
            *(int64(B), int64(1), int64(STEPS, B), torch.zeros(3, STEPS, B, device=device)),
            None if hidden is None else torch.zeros(STEPS, B, hidden[0], dtype=hidden[1], device=device),
        )

    def load(self, state, left: list[int]) -> None:
        """The sequences of a DecodeState into the first rows; the others are done. No wait: sizes are the host's."""
        B, M = state.block_tables_BM.shape
        self.done_B.fill_(True)
        self.done_B[:B].fill_(False)
        self.tables_BM[:B, :M].copy_(state.block_tables_BM)
        for mine_B, given_B in (
            (self.tokens_B, state.tokens_B),
            (self.positions_B, state.positions_B),
            (self.seeds_B, state.seeds_B),
        ):
            mine_B[:B].copy_(given_B)
        self.left_B[:B].copy_(torch.tensor(left), non_blocking=True)
        for x in (self.counts_B, self.step_1, self.tokens_SB):
            x.zero_()


class Step(NamedTuple):
    """What one step does, on any device; run(static) is what a graph records.

    forward: (tokens_B, positions_B, layout) -> logits_BV, hidden_BD or None.   hidden: size and dtype of those that are kept.
    """

    forward: Callable
    cache: object  # KVCache
    options: SamplingOptions
    eos_E: torch.Tensor  # int64
    block_size: int
    hidden: tuple[int, torch.dtype] | None

    def layout(self, x: Static) -> PagedDecode:
        page_B1 = (x.positions_B // self.block_size)[:, None].clamp(max=x.tables_BM.shape[1] - 1)
        slots_B = x.tables_BM.gather(1, page_B1)[:, 0].long() * self.block_size + x.positions_B % self.block_size
        lens_B = (x.positions_B + 1).masked_fill(x.done_B, 0).int()
        return PagedDecode(self.cache, slots_B.masked_fill(x.done_B, -1), x.tables_BM, lens_B)

    def run(self, x: Static) -> None:
        logits_BV, hidden_BD = self.forward(x.tokens_B, x.positions_B, self.layout(x))
        drawn = sampling(logits_BV, x.seeds_B, x.positions_B + 1, self.options, check=False)
        live_B = ~x.done_B
        x.tokens_SB.index_copy_(0, x.step_1, drawn.tokens_B.masked_fill(x.done_B, 0)[None])
        numbers_3B = torch.stack((drawn.sampled_logprob_B, drawn.logprob_B, drawn.entropy_B))
        x.numbers_3SB.index_copy_(1, x.step_1, numbers_3B[:, None])
        if x.hidden_SBD is not None:
            x.hidden_SBD.index_copy_(0, x.step_1, hidden_BD[None].to(x.hidden_SBD.dtype))
        x.step_1 += 1
        x.counts_B += live_B
        x.left_B -= live_B.long()
        ended_B = (drawn.tokens_B[:, None] == self.eos_E).any(1) | (x.left_B <= 0)
        ended_B |= (
            (drawn.tokens_B < 0) & live_B
        ).any()  # a row that can't be sampled is reported, and ends the rollout
        x.tokens_B.copy_(torch.where(live_B, drawn.tokens_B.clamp(min=0), x.tokens_B))
        x.done_B |= ended_B
        x.positions_B += ~x.done_B


def capture(run: Callable[[], None], pool) -> object:
    """A CUDA graph of run(); raises whatever the capture raises."""
    graph = torch.cuda.CUDAGraph()
    with no_autocast_cache(), torch.cuda.graph(graph, pool=pool):
        run()
    return graph


@contextlib.contextmanager
def no_autocast_cache() -> Iterator[None]:
    """autocast keeps its 16-bit copies of weights: a graph must not read one from before it, nor what follows one of the graph's."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def new_pool(device: torch.device):
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Captured(NamedTuple):
    static: Static
    graph: object | None  # None: not captured yet, or not to be


class DecodeGraphs:
    """The graphs of one model, kept from rollout to rollout by a Generator; decode() is DecodeProgram's.

    enabled False: the same steps, launched one operation at a time.
    """

    def __init__(self, device: torch.device, enabled: bool = True):
        self.device, self.enabled = device, enabled
        self.step: Step | None = None
        self.why_not: str | None = None  # why steps are not captured, in words
        self.captures = 0
        self._fingerprint: tuple = ()
        self._buckets: dict[tuple, Captured] = {}
        self._pool = None

    def begin(self, step: Step, fingerprint: tuple) -> None:
        """Before a rollout. Graphs stay good while everything that they have addresses or values of is the same."""
        if fingerprint != self._fingerprint:
            self._buckets.clear()
            self._fingerprint, self._pool = fingerprint, None
        self.step = step

    def end(self) -> None:
        """After a rollout: lets go of its pages."""
        self.step = None

    def decode(
        self, state, left: list[int], steps: int, options, eos: Iterable[int], *, stop_at_end: bool, keep_hidden: bool
    ) -> Drawn:
        """Up to `steps` tokens of every sequence of a DecodeState, whose pages hold that many more; see DecodeProgram.decode.

        options and eos are those of begin(). Sequences that end stay in the batch until the host has looked, at most 2 * POLL steps.
        """
        B, M = state.block_tables_BM.shape
        key = bucket(B), bucket(M), self.step.hidden if keep_hidden else None
        static, replay = self._prepare(key)
        static.load(state, left)
        polls: list[ToHost] = []
        for i in range(min(steps, STEPS, max(left))):
            if (
                i % POLL == 0 and len(polls) >= 2
            ):  # the one before last: POLL steps are still queued while the host waits
                ended = polls[-2].read()[0]
                if ended == B or (stop_at_end and ended):
                    break
            replay()
            if i % POLL == POLL - 1:
                polls.append(ToHost(static.done_B[:B].sum()[None]))
        hidden = None if static.hidden_SBD is None else static.hidden_SBD[:, :B].clone()
        results = (static.tokens_SB[:, :B].clone(), static.counts_B[:B].cpu(), static.numbers_3SB[:, :, :B].clone())
        return Drawn(*results, hidden)

    def _prepare(self, key: tuple) -> tuple[Static, Callable[[], None]]:
        """The bucket's tensors and what makes a step on them: eager at first, then its graph."""
        if key not in self._buckets:
            self._buckets[key] = Captured(Static.empty(*key, self.device), None)
            return self._buckets[key].static, self._eager(key)
        static, graph = self._buckets[key]
        if graph is None and self.enabled and self.why_not is None:
            graph = self._capture(key)
        return static, self._eager(key) if graph is None else graph.replay

    def _eager(self, key: tuple) -> Callable[[], None]:
        static = self._buckets[key].static
        return lambda: self.step.run(static)

    def _capture(self, key: tuple):
        if self._pool is None:
            self._pool = new_pool(self.device)
        try:
            graph = capture(self._eager(key), self._pool)
        except (RuntimeError, ValueError, TypeError) as error:  # an operation that waits for the host, allocates, ...
            self.why_not = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            log.warning("generate: decoding without CUDA graphs, because a capture failed: %s", self.why_not)
            return None
        self.captures += 1
        self._buckets[key] = self._buckets[key]._replace(graph=graph)
        return graph


def fingerprint(model, cache, step: Step) -> tuple:
    """What a graph of a step has addresses or values of: weights, pages, sampling options, autocast, which adapters are on."""
    device = step.eos_E.device.type
    tensors = [*model.parameters(), *model.buffers(), *(x for pair in cache.layers.values() for x in pair)]
    adapters = [m for m in model.modules() if hasattr(m, "merged") and hasattr(m, "disable_adapters")]
    return (
        *(x.data_ptr() for x in tensors),
        *((m.disable_adapters, m.merged, tuple(m.active_adapters)) for m in adapters),
        *(step.options, tuple(step.eos_E.tolist()), step.block_size, step.hidden),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )
