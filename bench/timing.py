"""Time of callables: interleaved medians on a CPU or GPU, device time in a CUDA graph, and what a call costs Python."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def compare(
    fns: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    cold: bool = False,
) -> dict[str, float]:
    """Median milliseconds of each callable, run in turn in every round so that drift hits all alike.

    Short callables are repeated within a sample, on a CPU until it lasts 10 ms: threads and caches are then as warm as those
    of the longer callables it takes turns with. On a GPU: device time between events; cold=True overwrites the L2
    cache before each sample (a memory-bound op in a training step finds its inputs in DRAM).
    """
    device = torch.device(device)
    if device.type == "cpu":
        spread_threads()
    sample = functools.partial(gpu_sample_ms, cold=cold) if device.type == "cuda" else cpu_sample_ms
    repeats = {}
    for name, fn in fns.items():
        for _ in range(warmup):
            fn()
        once = sample(fn, 1)
        lasts_ms = 1.0 if device.type == "cuda" else 10.0
        repeats[name] = 1 if cold else max(1, min(1000, int(lasts_ms / max(once, 1e-4))))
    samples = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            samples[name].append(sample(fn, repeats[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


@functools.cache
def spread_threads() -> None:
    """Half a second of work: a new pool's threads may stand on one core, spinning, until the scheduler parts them."""
    x, until = torch.ones(1 << 22), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        x.add_(1.0)


def cpu_sample_ms(fn, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) * 1e3 / repeats


def gpu_sample_ms(fn, repeats: int, cold: bool) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if cold:
        _l2_flush_buffer().zero_()
    start.record()
    for _ in range(repeats):
        fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


@functools.cache
def _l2_flush_buffer() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


def graph_ms(fn: Callable[[], object], *, repeats: int = 20, rounds: int = 20) -> float:
    """Median device milliseconds of `fn` replayed from a CUDA graph: launch cost from Python taken out.

    Warmed up on the stream of the capture: what is kept per stream (kernels/_tickets.py) is then not part of the graph.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            fn()
    return compare({"graph": graph.replay}, rounds=rounds, device="cuda")["graph"] / repeats


def call_us(fn: Callable[[], object], *, calls: int = 200) -> float:
    """Median microseconds that Python spends in one call, not waiting for a GPU."""
    spent = []
    for _ in range(calls):
        start = time.perf_counter()
        fn()
        spent.append(time.perf_counter() - start)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return statistics.median(spent) * 1e6
