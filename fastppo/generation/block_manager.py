"""Pages of the KV cache: reference counts, sharing of equal prefixes, copy-on-write.

A page ("block") holds the keys and values of block_size consecutive tokens of every layer. A full page whose content is
computed may be shared: it is found by (key of the page before it, its tokens), compared exactly. A freed page keeps its
content until it is handed out again, so that a preempted sequence finds its own pages.
"""

from fastppo.generation.sequence import Sequence


class BlockManager:
    """Hands out pages 0 .. num_blocks - 1 to sequences."""

    def __init__(self, num_blocks: int, block_size: int, share_prefixes: bool = True):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"BlockManager: need at least one block of one token; got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.share_prefixes = share_prefixes
        self.ref_counts = [0] * num_blocks
        self._free = dict.fromkeys(range(num_blocks))  # ordered set; first in, first out
        self._shared: dict[tuple, int] = {}  # (key of the page before, tokens) -> page
        self._key_of: dict[int, tuple] = {}  # page -> its entry in _shared
        self._serial_of: dict[int, int] = {}  # page -> a number that names its content
        self._serials = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- a prompt enters and leaves

    def _cached_prefix(self, seq: Sequence) -> list[int]:
        """Pages that already hold the start of seq; always leaves at least one token to compute."""
        pages: list[int] = []
        serial = -1
        if not self.share_prefixes:
            return pages
        for start in range(0, (len(seq) - 1) // self.block_size * self.block_size, self.block_size):
            page = self._shared.get((serial, tuple(seq.tokens[start : start + self.block_size])))
            if page is None:
                break
            pages.append(page)
            serial = self._serial_of[page]
        return pages

    def blocks_missing(self, seq: Sequence) -> int:
        """How many free pages allocate(seq) takes."""
        in_use = sum(self.ref_counts[page] > 0 for page in self._cached_prefix(seq))
        return self.blocks_for(len(seq)) - in_use

    def can_allocate(self, seq: Sequence, spare: int = 0) -> bool:
        return self.blocks_missing(seq) + spare <= self.num_free

    def allocate(self, seq: Sequence) -> None:
        """Give seq pages for all its tokens; those that already hold its start are shared and need no computing."""
        assert not seq.block_table
        cached = self._cached_prefix(seq)
        for page in cached:
            self._free.pop(page, None)
            self.ref_counts[page] += 1
        fresh = [self._take() for _ in range(self.blocks_for(len(seq)) - len(cached))]
        seq.block_table = cached + fresh
        seq.num_computed = len(cached) * self.block_size
        seq.registered_blocks = len(cached)

    def free(self, seq: Sequence) -> None:
        """Take all pages back; computed content stays findable until a page is handed out again."""
        for page in reversed(seq.block_table):  # so that the start of a prefix is reused last
            self._release(page)
        seq.block_table = []
        seq.num_computed = seq.registered_blocks = 0

    # -- a sequence grows

    def blocks_to_append(self, seq: Sequence) -> int:
        """Free pages needed to write the key and value of seq's last token: 0 or 1."""
        table, last = seq.block_table, (len(seq.tokens) - 1) // self.block_size
        return int(last >= len(table) or self.ref_counts[table[last]] > 1)

    def can_append(self, seq: Sequence) -> bool:
        return self.blocks_to_append(seq) <= self.num_free

    def append(self, seq: Sequence) -> tuple[int, int] | None:
        """Make room for the last token of seq. Returns (from, to) when a shared page has to be copied first."""
        last = (len(seq) - 1) // self.block_size
        if last >= len(seq.block_table):
            seq.block_table.append(self._take())
            return None
        page = seq.block_table[last]
        if self.ref_counts[page] == 1:
            return None
        seq.block_table[last] = self._take()
        self._release(page)
        return page, seq.block_table[last]

    def blocks_to_extend(self, seq: Sequence, steps: int) -> int:
        """Free pages needed beyond seq's own for its next `steps` tokens, the first of which append() made room for."""
        tokens = min(len(seq) + steps - 1, seq.most_tokens)
        return max(0, self.blocks_for(tokens) - len(seq.block_table))

    def extend(self, seq: Sequence, steps: int) -> None:
        seq.block_table += [self._take() for _ in range(self.blocks_to_extend(seq, steps))]

    def fork(self, parent: Sequence, children: list[Sequence]) -> None:
        """Children share all of parent's pages; the parent gives its own references up."""
        for child in children:
            child.block_table = list(parent.block_table)
            child.num_computed = parent.num_computed
            child.registered_blocks = parent.registered_blocks
            for page in child.block_table:
                self.ref_counts[page] += 1
        self.free(parent)

    def register(self, seq: Sequence, num_computed: int) -> None:
        """Full pages of seq up to num_computed tokens are (or in this step become) right: others may share them."""
        if not self.share_prefixes:
            return
        for i in range(seq.registered_blocks, num_computed // self.block_size):
            page = seq.block_table[i]
            serial = self._serial_of.get(seq.block_table[i - 1]) if i else -1
            if serial is None:
                return
            key = (serial, tuple(seq.tokens[i * self.block_size : (i + 1) * self.block_size]))
            if page in self._key_of or key in self._shared:
                return  # somebody computed the same page at the same time; this one stays private
            self._shared[key], self._key_of[page] = page, key
            self._serials += 1
            self._serial_of[page] = self._serials
            seq.registered_blocks = i + 1

    # -- pages

    def _take(self) -> int:
        page = next(iter(self._free))
        del self._free[page]
        if (key := self._key_of.pop(page, None)) is not None:
            del self._shared[key], self._serial_of[page]
        self.ref_counts[page] = 1
        return page

    def _release(self, page: int) -> None:
        assert self.ref_counts[page] > 0, f"block {page} is freed twice"
        self.ref_counts[page] -= 1
        if self.ref_counts[page] == 0:
            self._free[page] = None

    def check(self, sequences: list[Sequence]) -> None:
        """Raise AssertionError unless the pages are exactly those that `sequences` hold."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            for page in seq.block_table:
                counts[page] += 1
            if seq.block_table:
                assert self.blocks_for(seq.num_computed) <= len(seq.block_table)
        assert counts == self.ref_counts, "reference counts differ from the block tables"
        assert set(self._free) == {page for page, n in enumerate(counts) if n == 0}, "leaked or doubly free blocks"
        assert all(self._shared[key] == page for page, key in self._key_of.items())
        assert set(self._serial_of) == set(self._key_of)
        for seq in sequences:  # a page that will be written is never shared
            written = seq.num_computed // self.block_size
            for page in seq.block_table[written + 1 :]:
                assert self.ref_counts[page] == 1, f"block {page} is to be written but shared"
