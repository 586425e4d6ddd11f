"""What late_loop.py learn printed, as rows of bench/results/late_learn.csv; learning curves as a plot, too.

for seed in 0 1 2: python bench/late_loop.py learn fastppo STORIES --seed N --steps 40 > fastppo-N.json (and trl, in its environment)
python bench/late_curves.py fastppo-*.json trl-*.json --plot bench/results/late_learn.png
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness

COLOURS = {"fastppo two backbones": "#0b7a75", "fastppo value head": "#b8860b", "trl 1.12.0 two backbones": "#c8553d"}


def read(path: str) -> list[dict]:
    """The runs in a file: its lines that are JSON objects."""
    runs = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith('{"what"'):
            run = json.loads(line)
            package = "trl 1.12.0" if run["package"] == "trl" else "fastppo"
            runs.append(run | {"variant": f"{package} {'value head' if run['value_head'] else 'two backbones'}"})
    return runs


def write_rows(runs: list[dict]) -> None:
    for run in runs:
        scores = run["scores"]
        note = (
            f"mean reward of updates: first five {run['first5']:.3f}, last five {run['last5']:.3f}, all "
            f"{statistics.mean(scores):.3f}; KL at the end {run['kl']:.1f} nats; {32 * len(scores)} episodes"
        )
        shape = f"stories260K seed {run['seed']} {len(scores)} updates of 32"
        harness.write_row("late_learn", "cpu", variant=run["variant"], dtype="float32", shape=shape, note=note)


def plot(runs: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for variant, colour in COLOURS.items():
        curves = [run["scores"] for run in runs if run["variant"] == variant]
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.2, linewidth=1)
        if curves:
            mean = [statistics.mean(step) for step in zip(*curves, strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=f"{variant}, {len(curves)} seeds")
    axis.set(xlabel="update of 32 episodes", ylabel="mean reward", title="stories260K, happy words less sad words")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--plot")
    parser.add_argument("--no-csv", dest="csv", action="store_false")
    options = parser.parse_args()
    runs = [run for path in options.runs for run in read(path)]
    if options.csv:
        write_rows(runs)
    if options.plot:
        plot(runs, options.plot)
    for variant in COLOURS:
        last = [run["last5"] for run in runs if run["variant"] == variant]
        if last:
            print(f"{variant}: last five updates {statistics.mean(last):.3f} over seeds {[round(x, 3) for x in last]}")


if __name__ == "__main__":
    main()
