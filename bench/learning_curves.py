"""The learning task's curves by precision and by where old log-probs come from, over seeds; a plot.

python bench/learning_curves.py --stories FOLDER [--trl-python PATH] [--seeds 0,1,2,3,4] [--steps 40] [--seconds 240]
float32 with old_logprobs="recompute", bfloat16 with old_logprobs="rollout", float32 with "rollout", and TRL 0.11.4 where its
python is given. Each finished run is a line of bench/results/learning_curves.jsonl, and is not run again: --seconds ends a call
before its next run, the call that finds all runs there appends the rows of learning_curves.csv and draws --plot.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
from bench_loop import Side

RUNS = harness.RESULTS / "learning_curves.jsonl"
PLOT = harness.ROOT / "docs" / "img" / "learning_curves.png"
BF16 = {"mixed_precision": "bf16"}
VARIANTS = {
    "float32, recompute": {"old_logprobs": "recompute"},
    "float32, rollout": {"old_logprobs": "rollout"},
    "bfloat16, rollout": {"old_logprobs": "rollout", **BF16},
}
TRL = "TRL 0.11.4, float32"
LAST = 10  # steps whose mean is a run's result


def run(variant: str, seed: int, options) -> dict:
    """Mean score and KL of every step of one run, in a process of its own."""
    spec = {"model": options.stories, "seed": seed, "threads": options.threads}
    if variant == TRL:
        side = Side(variant, options.trl_python, "trl", spec)
    else:
        side = Side(variant, sys.executable, "fastppo", spec | {"config": VARIANTS[variant]})
    for _ in range(options.steps):
        side.run(keep=True)
    side.close()
    keys = [key for key in ("reward", "kl", "mismatch") if key in side.results[0]]
    found = {key: [float(f"{result[key]:.5g}") for result in side.results] for key in keys}
    return {"variant": variant, "seed": seed, "commit": harness.commit(), **found}


def finished(steps: int) -> dict[tuple[str, int], dict]:
    runs = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return {(r["variant"], r["seed"]): r for r in runs if len(r["reward"]) == steps}


def by_variant(runs: list[dict], variant: str) -> list[list[float]]:
    return [r["reward"] for r in runs if r["variant"] == variant]


def plot(runs: list[dict], variants: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, variant in enumerate(variants):
        curves = by_variant(runs, variant)
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=f"C{number}", alpha=0.2, linewidth=0.8)
        mean = [statistics.mean(step) for step in zip(*curves, strict=True)]
        axis.plot(
            range(1, len(mean) + 1), mean, color=f"C{number}", linewidth=2, label=f"{variant}, {len(curves)} seeds"
        )
    axis.set(xlabel="step", ylabel="mean score of 32 stories", title="stories260K, happy words less sad words")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=90)


def scores(runs: list[dict], what: str, steps_of: slice, base: tuple[float, float] | None) -> tuple[str, tuple]:
    """(mean score of some steps over seeds, in words, beside `base`'s; its mean and standard error)."""
    means = [statistics.mean(r["reward"][steps_of]) for r in runs]
    mean, error = statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    each = ", ".join(f"{x:.2f}" for x in means)
    text = f"mean score of {what} steps: {mean:.3f} (standard error {error:.3f} over {len(means)} seeds: {each})"
    if base is not None:
        difference, both = mean - base[0], math.hypot(error, base[1])
        same = "equal within" if abs(difference) <= 2 * both else "NOT equal within"
        text += f", {difference:+.3f} from the first: {same} 2 standard errors of the difference ({both:.3f})"
    return text, (mean, error)


def write_rows(runs: list[dict], variants: list[str], steps: int, csv: bool) -> None:
    """One row per variant: mean scores over seeds, and how far from the first variant's they are."""
    base: dict[str, tuple[float, float]] = {}
    for variant in variants:
        own, notes = [r for r in runs if r["variant"] == variant], []
        for what, steps_of in ((f"the last {LAST} of {steps}", slice(-LAST, None)), (f"all {steps}", slice(None))):
            text, found = scores(own, what, steps_of, base.get(what))
            base.setdefault(what, found)
            notes.append(text)
        notes.append(f"KL at the end {statistics.mean(r['kl'][-1] for r in own):.1f} nats")
        if all("mismatch" in r for r in own):
            mismatch = statistics.mean(sum((r["mismatch"] for r in own), []))
            told = f"{mismatch:.2g}" if mismatch >= 1e-5 else "less than 1e-5"
            notes.append(f"rollout and training log-probs differ by {told} nats on average")
        note = "; ".join(notes)
        print(f"{variant}: {note}")
        if csv:
            dtype = "bfloat16" if variant.startswith("bfloat16") else "float32"
            shape = f"stories260K {steps} steps of 32"
            row = {"variant": variant, "dtype": dtype, "shape": shape, "commit": own[0]["commit"], "note": note}
            harness.write_row("learning_curves", "cpu", **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True)
    parser.add_argument("--trl-python", help="python of an environment with trl==0.11.4")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this long")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    options = parser.parse_args()
    variants = [*VARIANTS, *([TRL] if options.trl_python else [])]
    wanted = [(variant, int(seed)) for seed in options.seeds.split(",") for variant in variants]
    start, done = time.monotonic(), finished(options.steps)
    for key in wanted:
        if key in done:
            continue
        if time.monotonic() - start > options.seconds:
            print(f"{sum(key in done for key in wanted)} of {len(wanted)} runs are there; run this again")
            return
        done[key] = run(*key, options)
        with RUNS.open("a") as file:
            print(json.dumps(done[key]), file=file)
    runs = [done[key] for key in wanted]
    write_rows(runs, variants, options.steps, options.csv)
    plot(runs, variants, options.plot)


if __name__ == "__main__":
    main()
