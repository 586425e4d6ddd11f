"""The processes of one host exchange numbers and add up gradients on CPUs in memory that they share (csrc/cpu/host_group.cpp).

Only what every optimizer step waits for: torch's collectives do everything else, and on GPUs and several hosts this, too. The memory has
no name in any file system: it ends with the last process that has it mapped, however that ends.
Suffix: P processes.
"""

import mmap
import os
import select
import time
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

from fastppo.kernels import _backend

# bytes that a process brings to one meeting: the buffers of two processes stay in a second-level cache
ROOM = 1 << 18
_opened: list = []  # [torch's process group, its HostGroup or None]


class HostGroup:
    """Sums and tables over processes; each calls the same methods in the same order, with as many numbers."""

    def __init__(self, memory: mmap.mmap, rank: int, alive: Sequence[int], seconds: float):
        """alive: P file descriptors that can be read once their process has ended.   seconds: that a meeting may take."""
        self._memory = memory
        self._bytes = numpy.frombuffer(memory, dtype=numpy.uint8)
        self._native = _backend.extension().HostGroup(self._bytes.ctypes.data, rank, len(alive), ROOM)
        self._rank, self._alive, self._seconds = rank, alive, seconds
        self._lost: str | None = None

    def add_up(self, flat: Tensor) -> None:
        """The float32 CPU tensor becomes its sum over processes, in the order of ranks: the same bits on all."""
        done, count = 0, flat.numel()

        def further() -> bool:
            nonlocal done
            done = self._native.add_up(flat.data_ptr(), done, count)
            return done == count

        self._until(further)

    def table(self, numbers: Sequence[float]) -> Tensor:
        """float64 [P, len(numbers)]: every process's numbers."""
        own = numpy.array(numbers, dtype=numpy.float64)
        return torch.from_numpy(self._gather(own.view(numpy.uint8)).view(numpy.float64))

    def gather(self, own: Tensor) -> Tensor:
        """[P, *own.shape]: every process's CPU tensor, of one shape and dtype."""
        if not own.numel():
            return own.new_empty(len(self._alive), *own.shape)
        found = self._gather(own.detach().flatten().view(torch.uint8).numpy())
        return torch.from_numpy(found).view(own.dtype).view(len(found), *own.shape)

    def _gather(self, own: numpy.ndarray) -> numpy.ndarray:
        """uint8 [n] -> [P, n]"""
        found = numpy.empty((len(self._alive), len(own)), dtype=numpy.uint8)
        for start in range(0, len(own), ROOM):
            part = own[start : start + ROOM]
            self._buffer(self._rank, len(part))[:] = part
            self._until(self._native.meet)
            for rank, row in enumerate(found):
                row[start : start + ROOM] = self._buffer(rank, len(part))
            self._native.leave()
        return found

    def _buffer(self, rank: int, count: int) -> numpy.ndarray:
        start = self._native.buffer(rank) - self._bytes.ctypes.data
        return self._bytes[start : start + count]

    def _until(self, done: Callable[[], bool]) -> None:
        """Call it until it says True. RuntimeError when a process that is waited for has ended, or doesn't come in time."""
        if self._lost:
            raise RuntimeError(self._lost)
        # also what is left behind by Ctrl-C while waiting
        self._lost = "an earlier exchange between the processes was broken off: this run cannot go on"
        begun, ended = time.monotonic(), set()
        while not done():
            late = self._native.missing()
            if gone := ended.intersection(late):
                self._lost = f"process {min(gone)} has ended while others waited for it; its own output says why"
                raise RuntimeError(self._lost)
            if late and time.monotonic() - begun > self._seconds:
                self._lost = f"process {late[0]} didn't come within {self._seconds:g} s (config.ddp_timeout)"
                raise RuntimeError(self._lost)
            # before that is an error, one more look at what it has left behind
            ended = {rank for rank in late if select.select([self._alive[rank]], [], [], 0)[0]}
        self._lost = None


def of_world(device: torch.device) -> HostGroup | None:
    """The group of all processes, or None where they don't share a host, a device other than the CPU computes, or there is no
    extension. Opened at the first call, which every process must make."""
    group = torch.distributed.group.WORLD
    if device.type != "cpu" or group is None:
        return None
    if not _opened or _opened[0] is not group:
        _opened[:] = [group, _open(group)]
    return _opened[1]


def _open(group) -> HostGroup | None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = _backend.extension().HostGroup.bytes(world, ROOM) if _possible() else 0
    file = _anonymous_file(size) if rank == 0 and size else None
    try:
        offers = _everyones((_host() if size else None, os.getpid(), file))
        places = {host for host, _, _ in offers}
        mapped = None
        if len(places) == 1 and None not in places and offers[0][2] is not None:
            mapped = _map(f"/proc/{offers[0][1]}/fd/{offers[0][2]}", size, [pid for _, pid, _ in offers])
        if not all(_everyones(mapped is not None)):
            return None
    finally:
        if file is not None:
            os.close(file)
    return HostGroup(mapped[0], rank, mapped[1], _seconds(group))


def _possible() -> bool:
    asked = os.environ.get("FASTPPO_BACKEND", "cpu")
    return (
        not isinstance(_backend.extension(), str) and asked == "cpu" and hasattr(os, "memfd_create") and _host() != ""
    )


def _host() -> str:
    """The running system and the process numbers that count here: equal where /proc of one process shows the other."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}"
    except OSError:
        return ""


def _anonymous_file(size: int) -> int | None:
    """Zeros, no memory until they are written to."""
    try:
        file = os.memfd_create("fastppo")
    except OSError:
        return None
    try:
        os.ftruncate(file, size)
    except OSError:
        os.close(file)
        return None
    return file


def _map(path: str, size: int, processes: Sequence[int]) -> tuple[mmap.mmap, list[int]] | None:
    alive = []
    try:
        with open(path, "r+b", buffering=0) as file:
            memory = mmap.mmap(file.fileno(), size)
        for pid in processes:
            alive.append(os.pidfd_open(pid))
    except OSError:
        for opened in alive:
            os.close(opened)
        return None
    return memory, alive


def _everyones(mine) -> list:
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def _seconds(group) -> float:
    """The group's time-out, which accelerate got from config.ddp_timeout; torch's own where it has none for CPU tensors."""
    try:
        options = group._get_backend(torch.device("cpu")).options
    except RuntimeError:
        options = None
    return getattr(options, "_timeout", torch.distributed.constants.default_pg_timeout).total_seconds()
