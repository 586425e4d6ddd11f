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
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from timing import call_us, compare, cpu_sample_ms, gpu_sample_ms, graph_ms

__all__ = ["arguments", "call_us", "compare", "graph_ms", "print_table", "report", "write_row"]
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
    best_ms = min(cpu_sample_ms(fn, 1) for _ in range(8) for fn in reads.values())
    return x.numel() * 4 / best_ms / 1e6


@functools.cache
def matmul_tflops(device_type: str, dtype: torch.dtype) -> float:
    """TFLOP/s of torch's matrix product: [2048, 2048] x [2048, 2048] on a CPU, [8192, 8192] x [8192, 8192] on a GPU."""
    n = CEILING_SIZES[f"{device_type} edge"]
    dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    a, b = (torch.randn(n, n, device=device_type).to(dtype) for _ in range(2))
    products = {"a @ b": lambda: a @ b, "linear": lambda: torch.nn.functional.linear(a, b)}
    sample = functools.partial(gpu_sample_ms, cold=False) if device_type == "cuda" else cpu_sample_ms
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
    """Short git commit, with + where tracked files other than rows differ; FASTPPO_COMMIT where there is no repository."""
    found = _output("git", "rev-parse", "--short", "HEAD")
    status = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    changed = "+" if found and _output(*status) else ""
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
