"""The whole loop, generate + score + step: fastppo against TRL 0.11.4, in turn, each in its own process.

python bench/bench_loop.py [--trl-python PATH] [--stories FOLDER] [--workloads tiny,tiny-ragged,124m,...] [--rounds 5]
--trl-python: the python of an environment with trl==0.11.4, transformers==4.45.2 and the same torch. Every round runs one
iteration of each side; printed are the medians, the ratio of the medians, and the peak memory of each process.
--pool FILE: rounds of earlier calls with the same file count as well (long workloads in slices; --no-csv but for the last).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness

WORKER = (str(Path(__file__).parent / "loop_worker.py"),)
MODELS = {"tiny": 16, "124m": 8, "llama": 16, "qwen2": 16}  # sequences per batch
BF16 = {"mixed_precision": "bf16"}


class Side:
    """A worker process that runs one iteration at a time: a line in, a line of JSON out."""

    def __init__(
        self,
        name: str,
        python: str,
        package: str,
        spec: dict,
        worker: Sequence[str] = WORKER,
        variables: Mapping[str, str] | None = None,
    ):
        """variables: of the environment, over this process's own."""
        self.name, self.results = name, []
        environment = dict(os.environ, PYTHONPATH=str(harness.ROOT)) | dict(variables or {})
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        command = [python, *worker, package, json.dumps(spec)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **{**pipes, "stderr": subprocess.DEVNULL})

    def run(self, keep: bool) -> None:
        self.begin()
        self.end(keep)

    def begin(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # end() says so
            print(file=self.process.stdin, flush=True)

    def end(self, keep: bool) -> None:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.name}: the worker ended; run it by hand: {' '.join(self.process.args)!r} < /dev/tty"
            )
        if keep:
            self.results.append(json.loads(line))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def pool(self, path: Path, workload: str) -> None:
        """Keep this call's results in `path`, and take those of earlier calls from it."""
        earlier = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        key = {"side": self.name, "workload": workload}
        with path.open("a") as file:
            file.writelines(json.dumps(key | result) + "\n" for result in self.results)
        self.results = [r for r in earlier if key.items() <= r.items()] + self.results

    def median(self, key: str) -> float:
        return statistics.median(result[key] for result in self.results)

    def rate(self) -> float:
        """Response tokens per second of the loop."""
        return statistics.median(r["tokens"] / (r["gen_s"] + r["step_s"]) for r in self.results)


def note(side: Side) -> str:
    """What a row says beside its time."""
    last, rounds = side.results[-1], len(side.results)
    text = (
        f"{side.rate():.1f} response tok/s; generate {side.median('gen_s'):.3f} s, step {side.median('step_s'):.3f} s; "
        f"peak {last['peak_mb']:.0f} MB, {last['imports_mb']:.0f} after the imports; median of {rounds}"
    )
    if "needed_s" in last:
        share = side.median("step_s") / side.median("needed_s")
        text += f"; step {share:.2f} x its needed FLOPs at {side.median('matmul_gflops'):.0f} GFLOP/s (product measured in the run)"
    return text


def sides(options, spec: dict) -> list[Side]:
    own = {"config": spec.get("config", {}) | {"max_tokens_per_micro_batch": options.budget}}
    made = [Side("fastppo fp32", sys.executable, "fastppo", spec | own)]
    if options.bf16:
        made.append(Side("fastppo bf16", sys.executable, "fastppo", spec | {"config": own["config"] | BF16}))
    if options.trl_python:
        made.append(Side("trl 0.11.4 fp32", options.trl_python, "trl", spec))
    return made


def measure(options, bench: str, workload: str, spec: dict) -> list[Side]:
    """Run all sides in turn, print a table, append rows."""
    made = sides(options, spec)
    for round_ in range(options.warmup + options.rounds):
        for side in made:
            side.run(keep=round_ >= options.warmup)
    for side in made:
        side.close()
        if options.pool:
            side.pool(options.pool, workload)
    base = next((side for side in made if side.name.startswith("trl")), None)
    rows = []
    for side in made:
        seconds = side.median("gen_s") + side.median("step_s")
        ratio = f"{side.rate() / base.rate():.2f}" if base else ""
        rows.append({"variant": side.name, "ms": f"{seconds * 1e3:.1f}", "speedup": ratio, "note": note(side)})
        if options.csv:
            dtype = "bfloat16" if "bf16" in side.name else "float32"
            harness.write_row(bench, "cpu", shape=workload, dtype=dtype, **rows[-1])
    harness.print_table(f"{bench} {workload}", rows, ("variant", "ms", "speedup", "note"))
    return made


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trl-python", help="python of an environment with trl==0.11.4")
    parser.add_argument("--stories", help="folder of stories260K: runs the learning task")
    parser.add_argument("--steps", type=int, default=40, help="steps of the learning task")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workloads", default="tiny,tiny-ragged,124m,124m-ragged")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=int, default=None, help="max_tokens_per_micro_batch")
    parser.add_argument("--pool", type=Path, metavar="FILE")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false")
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def synthetic(options, bench: str, stage: str) -> None:
    for workload in filter(None, options.workloads.split(",")):
        name, _, ragged = workload.partition("-")
        if name not in MODELS or ragged not in ("", "ragged"):
            raise SystemExit(f"no workload {workload!r}; there are {', '.join(MODELS)}, each also with -ragged")
        spec = {
            "model": name,
            "batch": MODELS[name],
            "ragged": bool(ragged),
            "stage": stage,
            "threads": options.threads,
        }
        measure(options, bench, workload, spec)


def stories(options) -> None:
    """The learning task: the same curve, and how long it takes."""
    options.rounds, options.warmup = options.steps, 0
    for seed in map(int, options.seeds.split(",")):
        spec = {"model": options.stories, "seed": seed, "threads": options.threads}
        for side in measure(options, "bench_loop", f"stories260K seed {seed}", spec):
            rewards = [result["reward"] for result in side.results]
            seconds = [sum(result[key] for result in side.results) for key in ("gen_s", "step_s")]
            first, last = (statistics.mean(part) for part in (rewards[:5], rewards[-5:]))
            print(
                f"  {side.name}: reward {first:.3f} -> {last:.3f}, generate {seconds[0]:.1f} s, step {seconds[1]:.1f} s"
            )


if __name__ == "__main__":
    given = arguments(__doc__)
    if given.stories:
        stories(given)
    else:
        synthetic(given, "bench_loop", "loop")
