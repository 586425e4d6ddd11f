"""Sums and tables through shared memory: threads stand for processes (the C++ gives up the GIL), pipes for their lives."""

import mmap
import os
import threading

import pytest
import torch

from fastppo import host_group
from fastppo.host_group import ROOM, HostGroup
from fastppo.kernels._backend import extension

FLOATS = ROOM // 4


class World:
    """P groups over one memory, as P processes have them. end(rank): as if that process had ended."""

    def __init__(self, processes: int, seconds: float = 60.0):
        memory = mmap.mmap(-1, extension().HostGroup.bytes(processes, ROOM))
        self._pipes = [os.pipe() for _ in range(processes)]
        alive = [read for read, _ in self._pipes]
        self.groups = [HostGroup(memory, rank, alive, seconds) for rank in range(processes)]

    def end(self, rank: int) -> None:
        os.close(self._pipes[rank][1])

    def run(self, function) -> list:
        """function(rank, group) in all of them at a time; what each returned or raised."""
        found = [None] * len(self.groups)

        def one(rank: int) -> None:
            try:
                found[rank] = function(rank, self.groups[rank])
            except RuntimeError as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(r,)) for r in range(len(self.groups))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def drawn(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1000 * rank + count))


@pytest.mark.parametrize("processes", [2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 15, FLOATS - 1, FLOATS, FLOATS + 1, 5 * FLOATS + 4097])
def test_sums_are_those_of_float64_and_the_same_bits_on_all(processes, count):
    world = World(processes)
    tensors = [drawn(rank, count) for rank in range(processes)]
    in_order = tensors[0].clone()
    for x in tensors[1:]:
        in_order += x
    exact = sum(x.double() for x in tensors)
    world.run(lambda rank, group: group.add_up(tensors[rank]))
    for x in tensors:
        assert torch.equal(x, in_order)
    torch.testing.assert_close(in_order.double(), exact, rtol=0, atol=processes * 2**-24 * float(exact.abs().max() + 8))


def test_many_rounds_of_sums_and_tables_in_any_mixture():
    """Neighbouring rounds use other buffers; one that is written too early would show in somebody's numbers."""
    world, generator = World(3), torch.Generator().manual_seed(0)
    counts = torch.randint(1, 3 * FLOATS, (60,), generator=generator).tolist()

    def work(rank: int, group: HostGroup) -> list:
        found = []
        for i, count in enumerate(counts):
            if count % 3 == rank:
                _ = drawn(rank, 50_000).sum()  # somebody else is late each time
            if count % 2:
                found.append(group.table([rank, i, count / 3]).tolist())
            else:
                flat = torch.full((count,), float(rank + i))
                group.add_up(flat)
                found.append(flat.unique().tolist())
        return found

    want = [[[float(r), i, n / 3] for r in range(3)] if n % 2 else [3.0 + 3 * i] for i, n in enumerate(counts)]
    assert world.run(work) == [want] * 3


def test_tables_keep_float64_and_what_is_no_number():
    world = World(2)
    rows = [[1 + 2**-52, float("inf"), True], [-0.0, float("nan"), 2**53]]
    for found in world.run(lambda rank, group: group.table(rows[rank])):
        assert found.dtype == torch.float64
        assert found.nan_to_num(7.0, posinf=8.0).tolist() == [[1 + 2**-52, 8, 1], [0, 7, 2**53]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (ROOM + 3, 2)])
def test_gathered_tensors_are_those_of_all_in_the_order_of_ranks(dtype, shape):
    world = World(3)
    tensors = [
        (100 * drawn(rank, 2 * ROOM + 6)[: torch.Size(shape).numel()]).view(shape).to(dtype) for rank in range(3)
    ]
    for found in world.run(lambda rank, group: group.gather(tensors[rank])):
        assert torch.equal(found, torch.stack(tensors))


def test_a_process_that_has_ended_is_named_and_stays_an_error():
    world = World(3)

    def work(rank: int, group: HostGroup) -> None:
        group.table([rank])
        if rank == 1:
            world.end(rank)
        else:
            group.add_up(torch.ones(3 * FLOATS))

    first, _, third = world.run(work)
    for error in (first, third):
        assert str(error) == "process 1 has ended while others waited for it; its own output says why"
    with pytest.raises(RuntimeError, match="process 1 has ended"):
        world.groups[0].table([1.0])


def test_what_a_process_left_behind_before_it_ended_counts():
    world = World(2)

    def work(rank: int, group: HostGroup):
        if rank == 1:
            found = group.table([5.0])
            world.end(rank)
            return found.tolist()
        return group.table([4.0]).tolist()

    assert world.run(work) == [[[4.0], [5.0]]] * 2


def test_a_process_that_does_not_come_is_named_after_the_time_out():
    world = World(2, seconds=0.3)
    error = world.run(lambda rank, group: None if rank else group.table([1.0]))[0]
    assert str(error) == "process 1 didn't come within 0.3 s (config.ddp_timeout)"


def test_an_exchange_that_was_broken_off_is_not_gone_on_with(monkeypatch):
    world = World(2)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(host_group.select, "select", interrupted)
        world.groups[0].table([1.0])
    with pytest.raises(RuntimeError, match="broken off"):
        world.groups[0].add_up(torch.ones(1))


@pytest.mark.parametrize("why", ["another host", "no memory", "reference"])
def test_gloo_where_memory_cannot_be_shared(monkeypatch, why):
    """All processes decide the same, from what all of them said."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    said = []

    def everyones(mine):
        said.append(mine)
        if len(said) > 1:
            return [mine, True]
        return [mine, ("elsewhere" if why == "another host" else mine[0], mine[1], None)]

    monkeypatch.setattr(host_group, "_everyones", everyones)
    if why == "reference":
        monkeypatch.setenv("FASTPPO_BACKEND", "reference")
    if why == "no memory":
        monkeypatch.setattr(host_group.os, "ftruncate", lambda *args: (_ for _ in ()).throw(OSError("full")))
    open_before = set(os.listdir("/proc/self/fd"))
    assert host_group._open(None) is None
    assert said[-1] is False
    assert set(os.listdir("/proc/self/fd")) == open_before
