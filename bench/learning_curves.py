"""The learning task's curves by precision and by where old log-probs come from, over seeds; a plot.

python bench/learning_curves.py --stories FOLDER --out docs/img/learning_curves.png [--seeds 0,1,2,3,4] [--steps 20]
float32 with old_logprobs="recompute", bfloat16, and old_logprobs="rollout": mean score per step, one line per seed, and the
mean over seeds. The numbers go to a .json beside the plot.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent))
from loop_worker import Stories

import fastppo

VARIANTS = {
    "float32, recompute": {"old_logprobs": "recompute"},
    "bfloat16, recompute": {"old_logprobs": "recompute", "mixed_precision": "bf16"},
    "float32, rollout": {"old_logprobs": "rollout"},
}


def curve(folder: str, seed: int, steps: int, config: dict) -> list[float]:
    AcceleratorState._reset_state(reset_partial_state=True)
    task = Stories(fastppo, {"model": folder, "seed": seed, "config": config})
    return [float(task.iteration()["stats"]["ppo/mean_scores"]) for _ in range(steps)]


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for number, (name, runs) in enumerate(curves.items()):
        for run in runs:
            axis.plot(run, color=f"C{number}", alpha=0.25, linewidth=0.8)
        axis.plot(torch.tensor(runs).mean(0), color=f"C{number}", linewidth=2, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel("mean score of 32 stories")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    curves = {
        name: [curve(options.stories, seed, options.steps, config) for seed in seeds]
        for name, config in VARIANTS.items()
    }
    options.out.with_suffix(".json").write_text(json.dumps(curves))
    plot(curves, options.out)
    for name, runs in curves.items():
        last_S = torch.tensor(runs)[:, -5:].mean(1)
        print(f"{name}: last five steps {last_S.mean():.3f}, by seed {[round(float(x), 3) for x in last_S]}")


if __name__ == "__main__":
    main()
