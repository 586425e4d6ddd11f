"""The late trainer's whole loop: fastppo against TRL 1.12.0, an update of each in turn, each in its own process.

python bench/bench_late_loop.py --python PATH [--ragged] [--rounds 5] [--threads 2]
--python: of an environment with trl==1.12.0. fastppo runs in it, too: what the imports take depends on what is installed beside.
Printed are the median times of an update, their ratios to TRL's, and the peak memory of each process, imports included.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
from bench_loop import Side

WORKER = (str(Path(__file__).parent / "late_loop.py"), "speed")
TRL = "trl 1.12.0 two backbones"


def sides(options) -> list[Side]:
    spec = {"threads": options.threads, "ragged": options.ragged}
    made = {
        "fastppo two backbones": ("fastppo", spec),
        "fastppo value head": ("fastppo", spec | {"value_head": True}),
        TRL: ("trl", spec),
    }
    return [Side(name, options.python, *what, worker=WORKER) for name, what in made.items()]


def row(side: Side, base: Side) -> dict[str, str]:
    seconds, peak, imports = (side.median(key) for key in ("wall_s", "peak_mb", "imports_mb"))
    of_base = (peak - imports) / (base.median("peak_mb") - base.median("imports_mb"))
    note = (
        f"peak {peak:.0f} MB, of them {imports:.0f} the imports' and {peak - imports:.0f} the loop's ({100 * of_base:.0f} % of "
        f"TRL's); medians of {len(side.results)} updates in turn"
    )
    speedup = statistics.median(b["wall_s"] for b in base.results) / seconds
    return {"variant": side.name, "ms": f"{seconds * 1e3:.0f}", "speedup": f"{speedup:.2f}", "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="python of an environment with trl==1.12.0")
    parser.add_argument("--ragged", action="store_true", help="responses end after 1 to 64 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    options = parser.parse_args()
    harness.torch.set_num_threads(options.threads)
    made = sides(options)
    for number in range(options.warmup + options.rounds):
        for side in made:
            side.run(keep=number >= options.warmup)
    for side in made:
        side.close()
    base = next(side for side in made if side.name == TRL)
    rows = [row(side, base) for side in made]
    shape = "tiny GPT-2 ragged" if options.ragged else "tiny GPT-2"
    if options.csv:
        for each in rows:
            harness.write_row("late_loop", "cpu", dtype="float32", shape=shape, **each)
    harness.print_table(f"late_loop {shape}", rows, ("variant", "ms", "speedup", "note"))


if __name__ == "__main__":
    main()
