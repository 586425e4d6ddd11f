"""One way to time, one way to report: interleaved medians, the machine's ceilings from the same run, CSV rows, a table.

    medians_ms = compare({"ours": ours, "torch": eager})
    report("logprob", "[256, 151936]", torch.float32, medians_ms, device=device, bytes=4 * 256 * 151936)

A bench is `python bench/bench_<op>.py [--device cuda] [--no-csv]`; rows go to bench/results/<bench>.csv. The floor of a
row is max(bytes / bandwidth, flops / matmul rate) with both ceilings measured in this process.
"""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results"
# fmt: off
COLUMNS = (
    "date", "commit", "device", "driver", "threads", "python", "torch", "triton", "transformers",
    "bench", "variant", "dtype", "shape",
    "ms", "gbs", "tflops", "floor_ms", "percent_of_floor",
    "bandwidth_gbs", "matmul_tflops", "speedup", "note",
)
# fmt: on


def arguments(description: str, *, cases: bool = False, **extra) -> argparse.Namespace:
    """--device, --csv/--no-csv, --quick (small shapes: to see that it runs) and --rounds, the same in every bench.

    cases: also --only NAME, once or more.   extra: further options with their defaults.
    """
    if (
        "OMP_WAIT_POLICY" not in os.environ
    ):  # libgomp's spinning threads fight any neighbour; it reads this only at load
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "passive"})
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small shapes, no CSV rows")
    parser.add_argument("--keep-rows", action="store_true", help="CSV rows with --quick as well")
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    if cases:
        parser.add_argument("--only", action="append", metavar="NAME", help="run this case (repeat for more)")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    options.device = torch.device(options.device)
    if options.quick:
        options.csv, options.rounds = options.csv and options.keep_rows, min(options.rounds, 3)
        CEILING_SIZES.update(QUICK_CEILING_SIZES)
    return options


# rows of 4 KB and bytes that are read or copied; edge of the matrix product
CEILING_SIZES = {"cpu rows": 1 << 17, "cuda bytes": 1 << 30, "cpu edge": 2048, "cuda edge": 8192}
QUICK_CEILING_SIZES = {"cpu rows": 1 << 10, "cuda bytes": 1 << 26, "cpu edge": 256, "cuda edge": 2048}


# --- time ---


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
    sample = functools.partial(_gpu_sample_ms, cold=cold) if device.type == "cuda" else _cpu_sample_ms
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


def _cpu_sample_ms(fn, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    return (time.perf_counter() - start) * 1e3 / repeats


def _gpu_sample_ms(fn, repeats: int, cold: bool) -> float:
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
    """Median device milliseconds of `fn` replayed from a CUDA graph: launch cost from Python taken out."""
    for _ in range(3):
        fn()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


# --- ceilings ---


@functools.cache
def bandwidth_gbs(device_type: str) -> float:
    """GB/s: on a CPU the best single read pass over 512 MB with torch's threads; on a GPU a copy of 1 GB (read + write)."""
    if device_type == "cuda":
        source, target = (torch.empty(CEILING_SIZES["cuda bytes"], dtype=torch.int8, device="cuda") for _ in range(2))
        ms = compare({"copy": lambda: target.copy_(source)}, rounds=20, device="cuda")["copy"]
        return 2 * source.numel() / ms / 1e6
    x, row = torch.ones(CEILING_SIZES["cpu rows"], 1 << 10), torch.ones(1 << 10)
    reads = {"sum": x.sum, "mv": lambda: torch.mv(x, row), "dot": lambda: torch.dot(x.view(-1), x.view(-1))}
    best_ms = min(_cpu_sample_ms(fn, 1) for _ in range(8) for fn in reads.values())
    return x.numel() * 4 / best_ms / 1e6


@functools.cache
def matmul_tflops(device_type: str, dtype: torch.dtype) -> float:
    """TFLOP/s of torch's matrix product: [2048, 2048] x [2048, 2048] on a CPU, [8192, 8192] x [8192, 8192] on a GPU."""
    n = CEILING_SIZES[f"{device_type} edge"]
    dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    a, b = (torch.randn(n, n, device=device_type).to(dtype) for _ in range(2))
    products = {"a @ b": lambda: a @ b, "linear": lambda: torch.nn.functional.linear(a, b)}
    sample = functools.partial(_gpu_sample_ms, cold=False) if device_type == "cuda" else _cpu_sample_ms
    best_ms = min(sample(fn, 1) for _ in range(6) for fn in products.values())
    return 2 * n**3 / best_ms / 1e9


@functools.cache
def launch_us() -> float:
    """Microseconds of host time for one torch kernel launch on a tiny GPU tensor."""
    x = torch.zeros(1, device="cuda")
    return call_us(lambda: x.add_(1))


# --- rows ---


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


@functools.cache
def commit() -> str:
    """Short git commit, with + where tracked files differ from it; FASTPPO_COMMIT where there is no repository."""
    found = _output("git", "rev-parse", "--short", "HEAD")
    changed = "+" if found and _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return found + changed or os.environ.get("FASTPPO_COMMIT", "unknown")


@functools.cache
def device_name(device_type: str) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


@functools.cache
def environment(device_type: str) -> dict[str, str]:
    """The columns that are the same for every row of this process."""
    driver = (
        _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device_type == "cuda" else ""
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device_name(device_type),
        "driver": driver.splitlines()[0] if driver else "",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
    }


def write_row(bench: str, device_type: str, **row) -> None:
    """Append one row to bench/results/<bench>.csv; unknown columns raise."""
    if unknown := set(row) - set(COLUMNS):
        raise ValueError(f"write_row: no column {sorted(unknown)}; there are {', '.join(COLUMNS)}")
    folder = Path(os.environ.get("FASTPPO_BENCH_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({**environment(device_type), "bench": bench, **row})


def report(
    bench: str,
    shape: str,
    dtype: torch.dtype,
    medians_ms: Mapping[str, float],
    *,
    device: torch.device | str = "cpu",
    bytes: int = 0,
    flops: int = 0,
    baseline: str = "torch",
    note: str = "",
    csv: bool = True,
) -> list[dict]:
    """Print one table line per variant and append its CSV row. bytes and flops are the floor's, for one call.

    speedup is the baseline's time over the variant's; percent_of_floor is the floor's time over the variant's.
    """
    kind, dtype_name = torch.device(device).type, str(dtype).removeprefix("torch.")
    bandwidth = bandwidth_gbs(kind) if bytes else 0.0
    rate = matmul_tflops(kind, dtype) if flops else 0.0
    floor_ms = max(bytes / bandwidth / 1e6 if bytes else 0.0, flops / rate / 1e9 if flops else 0.0)
    rows = []
    for variant, ms in medians_ms.items():
        rows.append(
            {
                "variant": variant,
                "dtype": dtype_name,
                "shape": shape,
                "ms": f"{ms:.5g}",
                "gbs": f"{bytes / ms / 1e6:.4g}" if bytes else "",
                "tflops": f"{flops / ms / 1e9:.4g}" if flops else "",
                "floor_ms": f"{floor_ms:.4g}" if floor_ms else "",
                "percent_of_floor": f"{100 * floor_ms / ms:.1f}" if floor_ms else "",
                "bandwidth_gbs": f"{bandwidth:.4g}" if bandwidth else "",
                "matmul_tflops": f"{rate:.4g}" if rate else "",
                "speedup": f"{medians_ms[baseline] / ms:.2f}" if baseline in medians_ms else "",
                "note": note,
            }
        )
        if csv:
            write_row(bench, kind, **rows[-1])
    print_table(f"{bench} {shape} {dtype_name} on {device_name(kind)} {note}", rows)
    return rows


def print_table(title: str, rows: list[dict], columns: tuple[str, ...] = ()) -> None:
    """Print the columns of `rows` that hold anything, aligned."""
    columns = columns or ("variant", "ms", "speedup", "gbs", "tflops", "floor_ms", "percent_of_floor")
    shown = [name for name in columns if any(row.get(name) for row in rows)]
    widths = {name: max(len(name), *(len(str(row.get(name, ""))) for row in rows)) for name in shown}
    print(f"\n{title}")
    print("  " + "  ".join(name.rjust(widths[name]) for name in shown))
    for row in rows:
        print("  " + "  ".join(str(row.get(name, "")).rjust(widths[name]) for name in shown), flush=True)
