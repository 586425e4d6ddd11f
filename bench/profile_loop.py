"""Where one iteration's time goes (generate + score + step): torch.profiler's table, and samples of all threads by C++ function.

python bench/profile_loop.py tiny|tiny-bf16|124m-ragged-bf16|... [--threads 2] [--rows 16] [--no-samples]
The workload is one of bench_loop.py's, -bf16 for mixed precision. Printed are tables in Markdown, for docs/performance.md:
first torch's operators and the calls into fastppo's C++, own time on the main thread; then, where Linux's `perf` can
be run, what the threads were in when they were looked at a thousand times per second.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness
import loop_worker
from bench_loop import BF16, MODELS

from fastppo.kernels import _products
from fastppo.kernels._backend import extension

# symbol -> what it is called in the table; first match
KINDS = (
    (
        r"amx_linear|packed_linear|pack_linear|strip|panel|part_row|DecodeProgram|quick_block|unary|binary|rms_norm|layer_norm",
        "decoding",
    ),
    (
        r"paged|cache_write|scores_|values_|softmax_row|merge_row|widen|narrow|interleave|run<|fill_assign",
        "decoding: attention",
    ),
    (r"sampling|tile_(bins|max|weight)|widen_tile", "sampling"),
    (r"add_block|multiply_|small_product|fastppo::product|::lay|::rows<", "matrix products"),
    (
        r"row_stats|row_grad|row_log2|stats_|grad_(bf16|float)|tile_stats|tile_grad|ppo_loss|chunk",
        "softmax of the head, loss and gradient",
    ),
    (r"train_attention|(forward|backward)_(float|bf16)", "attention, forward and backward"),
    (r"act_|train_activation", "activations"),
    (r"adam", "Adam"),
    (r"block_squares|sum_of_squares", "norm of the gradients"),
    (r"norm", "norms"),
    (r"copy|round_block|column_sums|add_rows|embedding", "copies of the weights, sums of columns"),
)


class Named:
    """Calls of fastppo's extension as records of torch.profiler, under their own names."""

    def __init__(self, module, classes=("TrainBody", "DecodeProgram")):
        self.module, self.classes, self.was = module, classes, {}

    def __enter__(self):
        _products._amx.cache_clear()
        for name in dir(self.module):
            member = getattr(self.module, name)
            if name in self.classes:
                made = self._class(name, member)
            elif callable(member) and not isinstance(member, type):
                made = _recorded(f"fastppo: {name}", member)
            else:
                continue
            self.was[name] = member
            setattr(self.module, name, made)
        return self

    def __exit__(self, *_):
        for name, member in self.was.items():
            setattr(self.module, name, member)
        _products._amx.cache_clear()

    @staticmethod
    def _class(name: str, kind):
        methods = {m: _recorded(f"fastppo: {name}.{m}", getattr(kind, m)) for m in dir(kind) if not m.startswith("_")}
        return type(name, (kind,), methods)


def _recorded(label: str, function):
    def run(*args, **kwargs):
        with torch.profiler.record_function(label):
            return function(*args, **kwargs)

    return run


def table(title: str, rows: list[tuple[str, int | str, float]], total: float, heads: tuple[str, str]) -> None:
    print(f"\n{title}\n\n| {heads[0]} | {heads[1]} | share |\n|---|---|---|")
    for name, count, seconds in rows:
        print(f"| {name} | {count} | {100 * seconds / total:.0f} % |")


def profiled(workload, title: str, rows: int) -> None:
    """Own time on the main thread by torch operator and C++ call, of one iteration."""
    with Named(extension()), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        workload.iteration()
        wall = time.perf_counter() - start
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)[:rows]
    found = [
        (f"`{e.key}`", f"{e.count:,} | {e.self_cpu_time_total / 1e6:.3f}", e.self_cpu_time_total / 1e6) for e in events
    ]
    found.append(("other operators, and Python between them", " | ", wall - sum(x[2] for x in found)))
    table(f"{title}, {wall:.2f} s under the profiler", found, wall, ("operator or call", "calls | own s"))


@contextlib.contextmanager
def samples(into: Path):
    """`perf` looks at this process's threads a thousand times per second."""
    command = ["perf", "record", "-q", "-F", "999", "-e", "cpu-clock", "-p", str(os.getpid()), "-o", str(into)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(0.7)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def kind_of(dso: str, symbol: str) -> str:
    if "_C." in dso:
        return next((name for pattern, name in KINDS if re.search(pattern, symbol)), "other C++ of fastppo")
    if "libgomp" in dso:
        return "threads that wait for each other (libgomp)"
    if "kernel" in dso:
        return "the system: fresh pages of memory, switches"
    if "libtorch" in dso or "mkl" in dso or "dnnl" in dso:
        return "torch"
    return "Python and C library"


def sampled(workload, title: str, rows: int) -> None:
    """What all threads were in, by kind of function, of one iteration."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "perf.data"
        with samples(into):
            start = time.perf_counter()
            workload.iteration()
            wall = time.perf_counter() - start
        command = [
            "perf",
            "report",
            "-i",
            str(into),
            "--stdio",
            "-q",
            "--sort",
            "dso,symbol",
            "-F",
            "sample,dso,symbol",
        ]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    counts: Counter[str] = Counter()
    for line in lines:
        if found := re.match(r"\s*(\d+)\s+(\S+)\s+\[.\]\s+(.*)", line):
            counts[kind_of(found[2], found[3])] += int(found[1])
    total = sum(counts.values())
    found = [(name, count, float(count)) for name, count in counts.most_common(rows)]
    table(f"{title}, {wall:.2f} s, {total:,} samples of all threads", found, total, ("what", "samples"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--no-samples", dest="samples", action="store_false")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import fastppo

    print(
        f"commit {harness.commit()}, {harness.device_name('cpu')}, {options.threads} threads, torch {torch.__version__}"
    )
    model, *more = options.workload.split("-")
    spec = {"model": model, "batch": MODELS[model], "ragged": "ragged" in more, "stage": "loop"}
    workload = loop_worker.Synthetic(fastppo, spec | {"config": BF16 if "bf16" in more else {}})
    for _ in range(2):
        workload.iteration()
    profiled(workload, options.workload, options.rows)
    if options.samples and shutil.which("perf"):
        sampled(workload, options.workload, options.rows)


if __name__ == "__main__":
    main()
