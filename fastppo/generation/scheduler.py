"""Which tokens the model reads next: prompts (in chunks) as soon as they fit, else one token of every running sequence."""

from collections import deque
from typing import NamedTuple

from fastppo.generation.block_manager import BlockManager
from fastppo.generation.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens start .. stop of a sequence, whose earlier tokens are in its pages."""

    seq: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.seq)


class Prefill(NamedTuple):
    chunks: list[Chunk]


class Decode(NamedTuple):
    """One token of each sequence; `copies` of pages (from, to) come first. `changed`: not last step's sequences."""

    seqs: list[Sequence]
    copies: list[tuple[int, int]]
    changed: bool


class Scheduler:
    """Continuous batching with preemption: the youngest sequence gives its pages up and is computed again later."""

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._last_decoded: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Raises ValueError when seq could never be held by the cache, whoever else leaves."""
        needed = self.block_manager.blocks_for(seq.most_tokens)
        if needed > self.block_manager.num_blocks:
            raise ValueError(
                f"generate: a sequence of {seq.most_tokens + 1} tokens needs {needed} KV pages of "
                f"{self.block_manager.block_size} tokens, but the cache has {self.block_manager.num_blocks}; "
                "raise kv_cache_bytes or num_blocks, or ask for fewer new tokens"
            )
        self.waiting.extend(seq.split(self.max_num_seqs))

    @property
    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> Prefill | Decode:
        """The next step. Call `advance` with what it sampled."""
        chunks = self._prompts_that_fit()
        if chunks:
            return Prefill(chunks)
        return self._one_token_each()

    def _prompts_that_fit(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget, seats = self.max_num_batched_tokens, self.max_num_seqs - len(self.running)
        spare = len(self.running)  # a page for each running sequence, or the newcomer would be thrown out at once
        for seq in sorted(self.waiting, key=lambda seq: not seq.block_table):  # what holds pages is finished first
            if budget == 0 or len(seq.rows) > seats:
                break
            if not seq.block_table:
                if not self.block_manager.can_allocate(seq, spare):
                    break
                self.block_manager.allocate(seq)
            stop = min(len(seq), seq.num_computed + budget)
            chunks.append(Chunk(seq, seq.num_computed, stop))
            budget -= stop - seq.num_computed
            seats -= len(seq.rows)
            spare += len(seq.rows)
            self.block_manager.register(seq, stop)
        return chunks

    def _one_token_each(self) -> Decode:
        copies: list[tuple[int, int]] = []
        seqs: list[Sequence] = []
        queue = deque(self.running)
        while queue:
            seq = queue.popleft()
            if self.block_manager.blocks_to_append(seq) == 0:
                seqs.append(seq)
                continue
            while not self.block_manager.can_append(seq):
                victim = queue.pop() if queue else None
                if victim is None:
                    victim = next((s for s in reversed(self.waiting) if s.block_table), seq)
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                copy = self.block_manager.append(seq)
                copies += [copy] if copy else []
                seqs.append(seq)
        assert seqs, "no sequence fits into the cache: add() should have refused it"
        changed = len(seqs) != len(self._last_decoded) or any(
            a is not b for a, b in zip(seqs, self._last_decoded, strict=True)
        )
        self._last_decoded = seqs
        return Decode(seqs, copies, changed)

    def _preempt(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        self.num_preemptions += 1
        if seq in self.running:
            self.running.remove(seq)
            self.waiting.appendleft(seq)

    def prefilled(self, step: Prefill) -> list[Sequence]:
        """The chunks are computed. Returns the sequences that now get a token, one per response, in order."""
        ready: list[Sequence] = []
        for seq, _, stop in step.chunks:
            seq.num_computed = stop
            if stop < len(seq):
                continue
            self.waiting.remove(seq)
            if len(seq.rows) == 1:
                ready.append(seq)
                continue
            children = seq.children()
            self.block_manager.fork(seq, children)
            ready += children
        self.running += ready
        return ready

    def reserve(self, seqs: list[Sequence], steps: int) -> int:
        """Take the pages for `steps` decode steps of `seqs`, whose first step has its own; returns for how many there are."""
        manager = self.block_manager
        if self.waiting and len(self.running) < self.max_num_seqs:
            return 1  # they wait for pages
        while steps > 1 and sum(manager.blocks_to_extend(seq, steps) for seq in seqs) > manager.num_free:
            steps //= 2
        for seq in seqs if steps > 1 else ():
            manager.extend(seq, steps)
        return steps

    def append(self, seqs: list[Sequence], tokens: list[int], reasons: list[str | None]) -> None:
        """Each sequence got a token; those with a finish reason leave and give their pages back."""
        self.extend(seqs, [[token] for token in tokens], reasons)

    def extend(self, seqs: list[Sequence], tokens: list[list[int]], reasons: list[str | None]) -> None:
        """Each sequence got some tokens, of which all but the last are in its pages."""
        finished = False
        for seq, new, reason in zip(seqs, tokens, reasons, strict=True):
            seq.tokens += new
            seq.num_computed = len(seq.tokens) - 1
            if reason is not None:
                seq.finish_reason = reason
                self.block_manager.free(seq)
                finished = True
        if finished:
            self.running = [seq for seq in self.running if seq.finish_reason is None]

    def abort(self) -> None:
        """Forget everything and free every page."""
        for seq in (*self.running, *self.waiting):
            self.block_manager.free(seq)
        self.running, self.waiting = [], deque()

    def check(self) -> None:
        """Raise AssertionError unless pages and queues are consistent."""
        everyone = [*self.running, *self.waiting]
        self.block_manager.check(everyone)
        rows = [row for seq in everyone for row in seq.rows]
        assert len(rows) == len(set(rows)), "a response is in the queues twice"
        assert sum(len(seq.rows) for seq in self.running) <= self.max_num_seqs
        for seq in self.running:
            assert seq.num_computed == len(seq) - 1 and seq.finish_reason is None
