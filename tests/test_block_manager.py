"""Pages: worked example, sharing, copy-on-write, and random traffic with the invariants checked after every step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.generation.block_manager import BlockManager
from fastppo.generation.scheduler import Decode, Prefill, Scheduler
from fastppo.generation.sequence import Sequence, group_equal_prompts


def _seq(tokens, row=0, limit=8):
    return Sequence(len(tokens), list(tokens), [row], [limit], [0])


def test_worked_by_hand():
    manager = BlockManager(num_blocks=5, block_size=2)
    a = _seq([1, 2, 3])
    manager.allocate(a)
    assert a.block_table == [0, 1] and manager.num_free == 3
    manager.register(a, 3)
    b = _seq([1, 2, 9, 9, 9], row=1)  # shares the page of (1, 2)
    manager.allocate(b)
    assert b.block_table == [0, 2, 3] and b.num_computed == 2 and manager.ref_counts == [2, 1, 1, 1, 0]
    a.num_computed = 3
    a.tokens.append(4)  # fills page 1: no new page
    assert manager.append(a) is None and a.block_table == [0, 1]
    a.tokens.append(5)
    assert manager.append(a) is None and a.block_table == [0, 1, 4]
    assert not manager.can_allocate(_seq([7, 7]))
    manager.free(a)
    assert manager.ref_counts == [1, 0, 1, 1, 0]
    manager.check([b])
    manager.free(b)
    assert manager.num_free == 5


def test_fork_copies_a_shared_page_only_when_it_is_written():
    manager = BlockManager(num_blocks=8, block_size=4)
    parent = Sequence(6, [1, 2, 3, 4, 5, 6], [0, 1, 2], [8] * 3, [0] * 3)
    manager.allocate(parent)
    parent.num_computed = 6
    children = parent.children()
    manager.fork(parent, children)
    assert [c.block_table for c in children] == [[0, 1]] * 3 and manager.ref_counts[:2] == [3, 3]
    copies = []
    for child in children:
        child.tokens.append(7)
        copies.append(manager.append(child))
    assert copies == [(1, 2), (1, 3), None]  # the last one owns the page by then
    assert manager.ref_counts[:4] == [3, 1, 1, 1]


def test_a_page_handed_out_again_is_no_longer_found():
    manager = BlockManager(num_blocks=2, block_size=2)
    a = _seq([1, 2, 3])
    manager.allocate(a)
    manager.register(a, 3)
    manager.free(a)
    again = _seq([1, 2, 3])
    manager.allocate(again)
    assert again.num_computed == 2  # freed pages keep their content
    manager.free(again)
    other = _seq([5, 6, 7, 8])
    manager.allocate(other)
    manager.free(other)
    manager.allocate(last := _seq([1, 2, 3]))
    assert last.num_computed == 0
    manager.check([last])


def test_pages_are_compared_by_content_and_place():
    manager = BlockManager(num_blocks=8, block_size=2)
    manager.allocate(a := _seq([1, 2, 3, 4, 5]))
    manager.register(a, 5)
    manager.allocate(b := _seq([3, 4, 1, 2, 5]))
    assert b.num_computed == 0
    manager.allocate(c := _seq([1, 2, 3, 4]))
    assert c.num_computed == 2  # a token is left to compute, or there would be no logits


def test_what_can_never_fit_is_refused():
    scheduler = Scheduler(BlockManager(2, 4), 4, 16)
    with pytest.raises(ValueError, match="needs 3 KV pages of 4 tokens, but the cache has 2"):
        scheduler.add(_seq([1] * 5, limit=5))
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(0, 4)


def test_the_youngest_is_preempted_and_computed_again():
    scheduler = Scheduler(BlockManager(4, 2), 4, 64)
    for row in range(2):
        scheduler.add(_seq([row + 1, 5], row=row, limit=7))
    steps = 0
    order = []
    while not scheduler.is_finished:
        order += [seq.row for seq in _run(scheduler, lambda seq: None)]
        scheduler.check()
        steps += 1
        assert steps < 100
    assert scheduler.num_preemptions > 0 and order == [0, 1]
    assert scheduler.block_manager.num_free == 4


def _run(scheduler, stop, steps=1):
    """One step, or some of decoding, without a model: tokens are made up. Returns the sequences that ended."""
    step = scheduler.schedule()
    if isinstance(step, Prefill):
        assert sum(c.stop - c.start for c in step.chunks) <= scheduler.max_num_batched_tokens
        seqs = scheduler.prefilled(step)
    else:
        assert isinstance(step, Decode) and step.seqs
        targets = [target for _, target in step.copies]
        assert len(set(targets)) == len(targets)
        size = scheduler.block_manager.block_size
        slots = [(seq.block_table[(len(seq) - 1) // size], (len(seq) - 1) % size) for seq in step.seqs]
        assert len(set(slots)) == len(slots), "two sequences write the same slot"
        for seq, (page, _) in zip(step.seqs, slots, strict=True):
            assert scheduler.block_manager.ref_counts[page] == 1, f"row {seq.row} writes a shared page"
        return _decode(scheduler, step.seqs, stop, scheduler.reserve(step.seqs, steps))
    reasons = ["length" if seq.num_new + 1 >= seq.limit else stop(seq) for seq in seqs]
    scheduler.append(seqs, [(seq.row * 7 + len(seq)) % 3 for seq in seqs], reasons)
    return [seq for seq in seqs if seq.finish_reason]


def _decode(scheduler, seqs, stop, steps):
    made, reasons = [], []
    others_wait, most = bool(scheduler.waiting), steps
    for seq in seqs:
        tokens, reason = [], None
        while reason is None and len(tokens) < most:
            page = seq.block_table[(len(seq) + len(tokens) - 1) // scheduler.block_manager.block_size]
            assert scheduler.block_manager.ref_counts[page] == 1, f"row {seq.row} writes a shared page"
            tokens.append((seq.row * 7 + len(seq) + len(tokens)) % 3)
            reason = "length" if seq.num_new + len(tokens) >= seq.limit else stop(seq)
        most = len(tokens) if others_wait and reason else most
        made.append(tokens)
        reasons.append(reason)
    if others_wait:  # all stop where the first one ends
        reasons = [x if len(t) <= most else None for x, t in zip(reasons, made, strict=True)]
        made = [t[:most] for t in made]
    scheduler.extend(seqs, made, reasons)
    return [seq for seq in seqs if seq.finish_reason]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_random_traffic_never_leaks_frees_twice_or_shares_a_page_that_is_written(data):
    block_size = data.draw(st.integers(1, 5), "block size")
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8), "prompts"
    )
    limits = data.draw(st.lists(st.integers(1, 9), min_size=len(prompts), max_size=len(prompts)), "limits")
    groups = group_equal_prompts(prompts, limits, [0] * len(prompts))
    least = max(-(-group.most_tokens // block_size) for group in groups)
    manager = BlockManager(least + data.draw(st.integers(0, 12), "more pages"), block_size)
    scheduler = Scheduler(manager, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20)))
    ended, steps = [], 0
    while groups or not scheduler.is_finished:
        if groups and (scheduler.is_finished or data.draw(st.booleans(), "arrival")):
            scheduler.add(groups.pop())
        at_once = data.draw(st.integers(1, 6), "steps")
        ended += _run(scheduler, lambda seq: "eos" if data.draw(st.integers(0, 5), "eos") == 0 else None, at_once)
        scheduler.check()
        steps += 1
        assert steps < 2000, "no progress"
    assert sorted(seq.row for seq in ended) == list(range(len(prompts)))
    assert all(1 <= seq.num_new <= seq.limit for seq in ended)
    assert manager.num_free == manager.num_blocks


@settings(deadline=None, max_examples=20)
@given(steps=st.integers(0, 12), rows=st.integers(1, 6))
def test_abort_frees_every_page_at_any_moment(steps, rows):
    scheduler = Scheduler(BlockManager(12, 2), 4, 5)
    for group in group_equal_prompts([[1, 2, 3, row % 2] for row in range(rows)], [6] * rows, [0] * rows):
        scheduler.add(group)
    for _ in range(steps):
        if not scheduler.is_finished:
            _run(scheduler, lambda seq: None)
    scheduler.abort()
    scheduler.check()
    assert scheduler.block_manager.num_free == 12 and scheduler.is_finished
