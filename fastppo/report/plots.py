"""The plots of a report: which metrics, and how a panel is drawn."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.report.runs import Run, column

INK, PALE, GRID = "#1f2933", "#66727f", "#e4e7eb"
COLOURS = ("#0b7a75", "#c8553d", "#5b5f97", "#b8860b", "#2f6690", "#8d5a97", "#4f772d", "#6b705c")
LINE_STYLES = ("-", "--", ":", "-.")
MOST_POINTS = 600  # of a thin line: more cannot be seen and make the page heavy
LEGEND_WORDS = 34  # letters of a run's name in a legend


@dataclass(frozen=True)
class Panel:
    """One plot. lines: (names of the metric, classic and late, and the label of its line); zero: the axis starts at 0;
    log: it is logarithmic."""

    name: str
    title: str
    unit: str
    lines: tuple[tuple[tuple[str, ...], str], ...]
    zero: bool = True
    log: bool = False


PANELS = (
    Panel("reward", "Reward", "mean score of a batch", ((("env/reward_mean", "objective/scores"), ""),), False),
    Panel("kl", "KL from the reference", "nats per response", ((("objective/kl",), ""),)),
    Panel("entropy", "Entropy", "nats per token", ((("ppo/policy/entropy", "policy/entropy_avg", "entropy"), ""),)),
    Panel(
        "clip_fraction",
        "Clip fraction",
        "share of tokens",
        (
            (("ppo/policy/clipfrac", "policy/clipfrac_avg"), "policy"),
            (("ppo/val/clipfrac", "val/clipfrac_avg"), "value"),
        ),
    ),
    Panel("length", "Response length", "tokens, mean of a batch", ((("tokens/responses_len_mean",), ""),)),
    Panel("loss", "Loss", "", ((("loss",), ""),), False),
    Panel("eval_loss", "Loss on the evaluation set", "", ((("eval_loss",), ""),), False),
    Panel("policy_loss", "Policy loss", "", ((("ppo/loss/policy", "loss/policy_avg"), ""),), False),
    Panel("value_loss", "Value loss", "", ((("ppo/loss/value", "loss/value_avg"), ""),)),
    Panel(
        "value_fit", "Variance explained by the value head", "1 is perfect", ((("ppo/val/var_explained",), ""),), False
    ),
    Panel(
        "accuracy",
        "Accuracy",
        "share of labelled tokens, or of pairs",
        ((("mean_token_accuracy", "accuracy"), "training"), (("eval_mean_token_accuracy", "eval_accuracy"), "evaluation")),
    ),
    Panel("margin", "Margin", "score of chosen less score of rejected", ((("margin",), ""),), False),
    Panel("grad_norm", "Gradient norm", "before clipping", ((("grad_norm",), ""),)),
    Panel("learning_rate", "Learning rate", "", ((("ppo/learning_rate", "learning_rate", "lr"), ""),)),
    Panel(
        "throughput",
        "Throughput by phase",
        "tokens per second (whole step: response tokens)",
        (
            (("perf/response_tokens_per_second",), "whole step"),
            (("report/generate_tokens_per_s",), "generate"),
            (("fastppo/prepare_tokens_per_s",), "prepare"),
            (("fastppo/optimise_tokens_per_s",), "optimise"),
        ),
        log=True,
    ),
    Panel(
        "phases",
        "Seconds by phase",
        "per step",
        ((("time/loop/generate",), "generate"), (("time/loop/reward",), "score"), (("time/loop/step",), "update")),
    ),
    Panel("memory", "Peak memory", "GiB", ((("report/peak_memory_gib",), ""),)),
)  # fmt: skip


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at each place."""
    sums = [0.0, *itertools.accumulate(values)]
    ends = range(1, len(values) + 1)
    return [(sums[end] - sums[max(0, end - window)]) / min(window, end) for end in ends]


def thinned(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """At most `most` points that keep the highest and the lowest value of each stretch, in order."""
    if len(values) <= most:
        return list(steps), list(values)
    size, kept = -(-2 * len(values) // most), set()
    for start in range(0, len(values), size):
        stretch = range(start, min(start + size, len(values)))
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def short(name: str) -> str:
    """A long name without its middle: runs of one series differ at the end."""
    half = LEGEND_WORDS // 2
    return name if len(name) <= LEGEND_WORDS else f"{name[: half - 1]}…{name[-half:]}"


def draw(panel: Panel, runs: Sequence[Run]) -> Any:
    """A matplotlib Figure of one panel, or None when no run has its metrics. Colours are runs, dashes are metrics.

    With one run, colours are metrics.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6.4, 3.9), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    named: dict[str, Line2D] = {}
    # a metric is named where there is another to tell it from
    drawn = [any(column(run, keys)[0] for run in runs) for keys, _ in panel.lines]
    for i, run in enumerate(runs):
        for j, (keys, label) in enumerate(panel.lines):
            steps, values = column(run, keys)
            if not steps:
                continue
            colour = COLOURS[(i if len(runs) > 1 else j) % len(COLOURS)]
            style = LINE_STYLES[j % len(LINE_STYLES)] if len(runs) > 1 else "-"
            draw_line(axes, steps, values, colour, style)
            if len(runs) > 1:
                named[short(run.name)] = Line2D([], [], color=colour, linewidth=2.2)
            if label and sum(drawn) > 1:
                many = len(runs) > 1
                named[label] = Line2D([], [], color=PALE if many else colour, linestyle=style, linewidth=2.2)
    if not axes.lines:
        return None
    style_axes(axes, panel)
    if len(runs) > 1 or len(named) > 1:
        ordered = sorted(named, key=lambda name: named[name].get_color() == PALE)
        figure.legend(
            [named[name] for name in ordered], ordered, loc="outside lower left", ncols=3 if len(ordered) != 4 else 2,
            fontsize=8.5, frameon=False, labelcolor=INK,
        )  # fmt: skip
    return figure


def draw_line(axes: Any, steps: list[int], values: list[float], colour: str, style: str) -> None:
    """Single steps thin, their trailing mean thick; a run of one or two steps as dots."""
    trend = trailing_mean(values, max(1, len(values) // 15))
    axes.plot(*thinned(steps, values), "-", color=colour, alpha=0.3, linewidth=0.9)
    marker = "o" if len(steps) < 3 else None
    axes.plot(*thinned(steps, trend), style, color=colour, linewidth=2.2, marker=marker, solid_capstyle="round")


def style_axes(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=24 if panel.unit else 10)
    axes.text(0, 1.03, panel.unit, transform=axes.transAxes, fontsize=9, color=PALE)
    axes.set_xlabel("step", fontsize=9, color=PALE, loc="right")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", colors=PALE, length=0, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:,.6g}")
    first, last = (end(line.get_xdata()[at] for line in axes.lines) for end, at in ((min, 0), (max, -1)))
    if first == last:
        axes.set_xlim(first - 1, last + 1)
    values = [value for line in axes.lines for value in line.get_ydata()]
    if panel.log and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,.6g}")
        axes.yaxis.set_minor_formatter("")
    elif panel.zero and min(values) >= 0:
        axes.set_ylim(0, 1.06 * max(values) or 1)
