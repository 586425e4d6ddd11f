"""Weak scaling on a CPU: the whole loop in one process with one thread, and in two (DDP) with one thread each.

Two processes that know nothing of each other run as well: what they lose is the machine's (memory, clock), not fastppo's.

python bench/bench_scaling.py [--rounds 7] [--workload tiny] [--mini-batch 4] [--stories FOLDER] [--late] [--no-csv]
--stories: the learning task of bench_loop.py instead, mini-batches of 8; FOLDER holds stories260K.
--late: the late trainer's updates (late_loop.py) with a value head, mini-batches of 4.
Every process has its own batch, so that two do twice the work per step; ideal is twice the tokens per second. The three
take turns, an iteration each; those that aren't asked wait on their standard input.
"""

import argparse
import socket
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
from bench_late_loop import WORKER as LATE_WORKER
from bench_loop import MODELS, WORKER, Side


def alone(spec: dict, worker: Sequence[str] = WORKER) -> Side:
    return Side("alone", sys.executable, "fastppo", spec, worker=worker, variables=COMMON)


def pair(spec: dict, worker: Sequence[str] = WORKER, processes: int = 2) -> list[Side]:
    """The processes of one run, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(processes)} for r in range(processes)]
    return [
        Side(f"rank {r}", sys.executable, "fastppo", spec, worker=worker, variables=COMMON | world | own)
        for r, own in enumerate(ranks)
    ]


# by whether it is the late trainer's: what a round's seconds are called -> their name in the worker's lines
STAGES = {False: {"generate": "gen_s", "step": "step_s"}, True: {"update": "wall_s"}}
COMMON = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def task(options: argparse.Namespace) -> tuple[str, dict]:
    """(what rows call it, specification for the worker)"""
    if options.late:
        return "tiny, late trainer, value head, mini-batch 4", {"value_head": True, "threads": 1}
    config = {"accelerator_kwargs": {"cpu": True}}
    if options.stories:
        return "stories260K, mini-batch 8", {"model": options.stories, "seed": 0, "threads": 1, "config": config}
    name, _, ragged = options.workload.partition("-")
    spec = {"model": name, "batch": MODELS[name], "ragged": bool(ragged), "stage": "loop", "threads": 1}
    config["mini_batch_size"] = options.mini_batch
    return f"{options.workload}, mini-batch {options.mini_batch}", spec | {"config": config}


def iteration(sides: list[Side], keep: bool) -> None:
    for side in sides:
        side.begin()
    for side in sides:
        side.end(keep)


def seconds(sides: list[Side], stage: str) -> float:
    """Median over rounds of the slowest process."""
    rounds = zip(*(side.results for side in sides), strict=True)
    return statistics.median(max(result[stage] for result in results) for results in rounds)


def rate(sides: list[Side], keys: Collection[str]) -> float:
    """Response tokens per second of all processes, of the slowest one's seconds below `keys`."""
    rounds = zip(*(side.results for side in sides), strict=True)
    return statistics.median(
        sum(r["tokens"] for r in results) / max(sum(r[key] for key in keys) for r in results) for results in rounds
    )


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="tiny", choices=[n for x in MODELS for n in (x, f"{x}-ragged")])
    parser.add_argument("--mini-batch", type=int, default=4, help="sequences of a process between two reductions")
    parser.add_argument("--stories", metavar="FOLDER")
    parser.add_argument("--late", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    options = parser.parse_args(argv)
    workload, spec = task(options)
    worker = LATE_WORKER if options.late else WORKER
    groups = {"one process": [alone(spec, worker)], "two unrelated processes": [alone(spec, worker) for _ in range(2)]}
    groups["fastppo 2 processes"] = pair(spec, worker)
    for round_ in range(options.warmup + options.rounds):
        for sides in groups.values():
            iteration(sides, keep=round_ >= options.warmup)
    rows = []
    stages = STAGES[options.late]
    for variant, sides in groups.items():
        for side in sides:
            side.close()
        told = ", ".join(f"{words} {seconds(sides, key):.3f} s" for words, key in stages.items())
        spent = sum(seconds(sides, key) for key in stages.values())
        found, alone_rate = (rate(x, stages.values()) for x in (sides, groups["one process"]))
        gain = found / alone_rate
        note = f"{found:.1f} response tok/s of all processes; {told}; one thread each; median of {options.rounds}"
        rows.append({"variant": variant, "ms": f"{spent * 1e3:.1f}", "speedup": f"{gain:.2f}", "note": note})
        if options.csv:
            harness.write_row(
                "bench_scaling",
                "cpu",
                shape=workload,
                dtype="float32",
                **rows[-1],
            )
    harness.print_table(
        f"bench_scaling {workload}",
        rows,
        ("variant", "ms", "speedup", "note"),
    )
    return gain


if __name__ == "__main__":
    main()
