"""Figures and tables of the guides, from data/*.jsonl: writes docs/img/*.png and the tables between the guides' markers.

python docs/experiments/plot.py            # --check: only say whether the tables are up to date
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastppo.report.plots import COLOURS, GRID, INK, PALE, trailing_mean

HERE = Path(__file__).parent
DOCS = HERE.parent
LAST = 4  # steps that a figure in a table is the mean of
SETTINGS = {
    "learning_rate": ("lr-3e-5", "base", "lr-3e-3"),
    "init_kl_coef": ("kl-0", "base", "kl-1"),
    "ppo_epochs": ("epochs-1", "base", "epochs-12"),
}
VALUES = {
    "lr-3e-5": "3e-5", "lr-3e-3": "3e-3", "kl-0": "0", "kl-1": "1.0", "epochs-1": "1", "epochs-12": "12",
    "base learning_rate": "3e-4", "base init_kl_coef": "0.2", "base ppo_epochs": "4",
}  # fmt: skip
REWARD, KL, ENTROPY = "env/reward_mean", "objective/kl", "ppo/policy/entropy"
PANELS = {
    REWARD: "reward", KL: "KL, nats per response", ENTROPY: "entropy, nats per token", "ppo/policy/clipfrac": "clip fraction",
    "tokens/responses_len_mean": "response length, tokens", "ppo/loss/value": "value loss",
    "ppo/val/var_explained": "variance explained by the value head", "ppo/val/clipfrac": "value clip fraction",
}  # fmt: skip
# figure -> (experiments and their labels, panels)
TROUBLES = {
    "kl-explosion": ({"base": "demo's settings", "kl-explosion": "no KL term, 1e-3, 8 epochs"}, (REWARD, KL, ENTROPY)),
    "reward-hacking": ({"base": "counts each word once", "reward-hacking": "counts every word"}, (REWARD, KL, ENTROPY)),
    "entropy-collapse": ({"base": "3e-4", "lr-3e-3": "3e-3"}, (REWARD, ENTROPY, "tokens/responses_len_mean")),
    "value-trouble": (
        {"value-trouble": "reward x 50", "value-scaled": "the same, use_score_scaling"},
        ("ppo/loss/value", "ppo/val/var_explained", "ppo/val/clipfrac"),
    ),
}


def read(name: str, seed: int) -> list[dict[str, Any]]:
    lines = (HERE / "data" / f"{name}-seed{seed}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "step" in row]


def seeds(name: str) -> list[int]:
    return sorted(int(path.stem.rpartition("seed")[2]) for path in (HERE / "data").glob(f"{name}-seed*.jsonl"))


def at_end(name: str, key: str) -> list[float]:
    """Mean over the last steps, one per seed."""
    return [sum(row[key] for row in read(name, seed)[-LAST:]) / LAST for seed in seeds(name)]


def spread(values: Sequence[float], form: str) -> str:
    """'5.9 (5.7 to 6.1)': the middle value, and the lowest and highest."""
    low, middle, high = min(values), sorted(values)[len(values) // 2], max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def table(setting: str) -> str:
    head = f"| `{setting}` | reward | KL | entropy | clip fraction | response length |\n|---|---|---|---|---|---|\n"
    rows = []
    for name in SETTINGS[setting]:
        cells = [
            spread(at_end(name, key), form)
            for key, form in (
                (REWARD, ".1f"), (KL, ".0f"), (ENTROPY, ".2f"), ("ppo/policy/clipfrac", ".2f"), ("tokens/responses_len_mean", ".0f")
            )
        ]  # fmt: skip
        rows.append(f"| {VALUES.get(name) or VALUES[f'{name} {setting}']} | {' | '.join(cells)} |")
    return head + "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """`text` with each table between its markers written anew."""
    for setting in SETTINGS:
        pattern = rf"(<!-- table:{setting} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, s=setting: f"{m[1]}\n{table(s)}\n{m[2]}", text, flags=re.DOTALL)
    return text


def draw(path: Path, runs: Sequence[tuple[str, Sequence[int], str]], panels: Sequence[str]) -> None:
    """One axes per panel; a line per (experiment, seeds, label): thick for the first seed's trend, thin for the others'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * len(panels), 3.5), dpi=110, facecolor="white", layout="constrained")
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (name, chosen, label) in enumerate(runs):
            for seed in chosen:
                rows = read(name, seed)
                first = seed == chosen[0]
                axes.plot(
                    [row["step"] for row in rows], trailing_mean([row[key] for row in rows], 3), color=COLOURS[i],
                    linewidth=2.2 if first else 1.0, alpha=1.0 if first else 0.55, label=label if first else None,
                )  # fmt: skip
        axes.set_title(PANELS[key], loc="left", fontsize=11, fontweight="bold", color=INK)
        axes.grid(axis="y", color=GRID)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(colors=PALE, length=0, labelsize=9)
        axes.set_xlabel("PPO step", fontsize=9, color=PALE, loc="right")
        highest = max(max(line.get_ydata()) for line in axes.lines)
        if key == "ppo/loss/value" and highest > 1000:
            axes.set_yscale("log")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=len(labels), fontsize=10, frameon=False, labelcolor=INK
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> int:
    guide = DOCS / "guides" / "hyperparameters.md"
    text = guide.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(text != with_tables(text))
    guide.write_text(with_tables(text), encoding="utf-8")
    for setting, names in SETTINGS.items():
        runs = [(name, seeds(name), VALUES.get(name) or VALUES[f"{name} {setting}"]) for name in names]
        draw(DOCS / "img" / f"setting-{setting}.png", runs, (REWARD, KL, ENTROPY))
    for name, (runs, panels) in TROUBLES.items():
        draw(DOCS / "img" / f"trouble-{name}.png", [(run, (0,), label) for run, label in runs.items()], panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
