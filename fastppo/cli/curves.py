"""curves.png: what a person looks at first to see whether PPO worked."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastppo.report.plots import GRID, INK, PALE, trailing_mean

# key in metrics.jsonl, title, unit, colour
PANELS = (
    ("env/reward_mean", "Reward", "mean score of a batch, band: ± one standard deviation", "#0b7a75"),
    ("objective/kl", "KL from the start", "nats per response", "#c8553d"),
    ("objective/entropy", "Entropy", "nats per response", "#5b5f97"),
    ("perf/response_tokens_per_second", "Throughput", "response tokens per second, whole step", "#b8860b"),
)


def column(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else row[key] for row in rows]


def brief(value: float) -> str:
    """Two decimals, none from 100 on, two digits where these would hide it: a learning rate."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"


def draw_panel(axes: Any, rows: Sequence[dict[str, Any]], panel: tuple[str, str, str, str]) -> None:
    key, title, unit, colour = panel
    stage, slash, name = key.rpartition("/")
    held_out = [row for row in rows if row.get(f"{stage}{slash}eval_{name}") is not None]
    rows = [row for row in rows if key in row]  # training and evaluation have lines of their own
    steps, values = column(rows, "step"), column(rows, key)
    window = max(1, len(rows) // 12)
    trend = trailing_mean(values, window)
    if "env/reward_std" in rows[0] and key == "env/reward_mean":
        spread = column(rows, "env/reward_std")
        low, high = ([v + sign * s for v, s in zip(trend, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.10, linewidth=0)
    axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1.0, marker="o" if len(rows) < 3 else None)
    axes.plot(steps, trend, color=colour, linewidth=2.4, solid_capstyle="round")
    axes.annotate(
        brief(trend[-1]),
        (1.0, trend[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=11,
        fontweight="bold",
        annotation_clip=False,
    )
    if held_out:
        points = [(row["step"], row[f"{stage}{slash}eval_{name}"]) for row in held_out]
        axes.plot(*zip(*points, strict=True), "D:", color=INK, markersize=6, linewidth=1.2)
        unit += f"; ◆ held out: {brief(points[-1][1])}"
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=22)
    axes.text(0, 1.035, unit, transform=axes.transAxes, fontsize=9, color=PALE)
    if key not in ("env/reward_mean", "objective/scores") and min(v for v in values if not math.isnan(v)) >= 0:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)


def draw(
    rows: Sequence[dict[str, Any]],
    path: str | Path,
    title: str,
    panels: Sequence[tuple[str, str, str, str]] = PANELS,
    steps: str = "PPO step",
) -> None:
    """Draw the first four of `panels` whose metric the run has. Does nothing for a run without steps."""
    panels = [panel for panel in panels if any(row.get(panel[0]) is not None for row in rows)][:4]
    if not panels:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, squeeze=True).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        draw_panel(axes, rows, panel)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(colors=PALE, length=0, labelsize=9)
        axes.set_xlim(left=0 if len(rows) > 1 else None)
        axes.set_xlabel(steps, fontsize=9, color=PALE, loc="right")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, x=0.055, y=0.975, ha="left", fontsize=15, color=INK)
    figure.subplots_adjust(left=0.06, right=0.94, top=0.83, bottom=0.08, hspace=0.62, wspace=0.24)
    figure.savefig(path, facecolor="white")
