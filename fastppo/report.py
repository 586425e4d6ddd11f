"""One self-contained HTML page over one or more run folders, and the same plots as PNG files.

A run folder is what `fastppo demo` and `fastppo train` write: metrics.jsonl (one line per PPO step), and where present
samples.json (answers before and after), config.yaml and info.json. Several runs are drawn over each other.
"""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INK, PALE, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#0b7a75", "#c8553d", "#5b5f97", "#b8860b", "#4f772d", "#8d5a97", "#2f6690", "#6b705c")
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One plot. keys: (key in metrics.jsonl, label); with several keys each is a line style."""

    name: str
    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]


PANELS = (
    Panel("reward", "Reward", "mean score of a batch", (("env/reward_mean", ""),)),
    Panel("kl", "KL from the reference", "nats per response", (("objective/kl", ""),)),
    Panel("entropy", "Entropy", "nats per token", (("ppo/policy/entropy", ""),)),
    Panel(
        "clip_fraction",
        "Clip fraction",
        "share of tokens",
        (("ppo/policy/clipfrac", "policy"), ("ppo/val/clipfrac", "value")),
    ),
    Panel("length", "Response length", "tokens, mean of a batch", (("tokens/responses_len_mean", ""),)),
    Panel("value_fit", "Variance explained by the value head", "1 is perfect", (("ppo/val/var_explained", ""),)),
    Panel("throughput", "Throughput", "response tokens per second", (("perf/response_tokens_per_second", ""),)),
    Panel(
        "phases",
        "Seconds by phase",
        "per PPO step",
        (("time/loop/generate", "generate"), ("time/loop/reward", "score"), ("time/loop/step", "step")),
    ),
    Panel("memory", "Peak memory", "GiB", (("perf/peak_memory_gib", ""),)),
)


@dataclass(frozen=True)
class Run:
    """name: the folder's own name. rows: metrics.jsonl. samples: samples.json. settings: config.yaml. about: info.json."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


class ReportError(ValueError):
    """A folder that is no run, or a file of it that cannot be read; names it."""


def read_run(folder: str | Path) -> Run:
    """Read one run folder. A last line of metrics.jsonl that a crash cut off is left out.

    Raises ReportError when there is no metrics.jsonl, no step in it, or another line is damaged.
    """
    import yaml

    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ReportError(f"{folder}: no metrics.jsonl there; a run folder is what --output-dir of demo or train names")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ReportError(f"{folder / 'metrics.jsonl'}: line {number} is not JSON: {error}") from error
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    if not rows:
        raise ReportError(f"{folder / 'metrics.jsonl'}: not one finished step in it")
    try:
        samples = json.loads((folder / "samples.json").read_text("utf-8")) if (folder / "samples.json").exists() else {}
        about = json.loads((folder / "info.json").read_text("utf-8")) if (folder / "info.json").exists() else {}
        text = (folder / "config.yaml").read_text("utf-8") if (folder / "config.yaml").exists() else ""
        settings = yaml.safe_load(text) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{folder}: {error}") from error
    return Run(folder.resolve().name, folder, rows, samples, settings, about)


def column(run: Run, key: str) -> tuple[list[int], list[float]]:
    """(steps, finite values) of one metric."""
    pairs = [(row["step"], row.get(key)) for row in run.rows]
    pairs = [(s, float(v)) for s, v in pairs if isinstance(v, (int, float)) and math.isfinite(v)]
    return [s for s, _ in pairs], [v for _, v in pairs]


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values at each place."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def draw(panel: Panel, runs: Sequence[Run]) -> Any:
    """A matplotlib Figure of one panel, or None when no run has its metrics."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.3), dpi=150, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    axes = figure.add_subplot()
    drawn = 0
    for i, run in enumerate(runs):
        for j, (key, label) in enumerate(panel.keys):
            steps, values = column(run, key)
            if not steps:
                continue
            drawn += 1
            colour = COLOURS[(i if len(runs) > 1 else j) % len(COLOURS)]
            style = LINE_STYLES[j % len(LINE_STYLES)] if len(runs) > 1 else "-"
            name = " ".join(filter(None, (run.name if len(runs) > 1 else "", label)))
            axes.plot(steps, values, style, color=colour, alpha=0.25, linewidth=1)
            trend = trailing_mean(values, max(1, len(values) // 15))
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, trend, style, color=colour, linewidth=2.2, label=name or None, marker=marker)
    if not drawn:
        return None
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_ylabel(panel.unit, fontsize=8, color=PALE)
    axes.set_xlabel("PPO step", fontsize=8, color=PALE, loc="right")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=PALE, length=0, labelsize=8)
    if len(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


STYLE = """
:root{--ink:#1f2933;--pale:#66727f;--line:#e4e7eb;--wash:#f7f8fa;--good:#0b7a75}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);max-width:1180px;margin:0 auto;padding:32px 24px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:40px 0 12px}p.sub{color:var(--pale);margin:0 0 24px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:16px 0}
.tile{background:var(--wash);border-radius:10px;padding:12px 16px}.tile b{display:block;font-size:22px}.tile span{color:var(--pale);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:16px}
.plots img{width:100%;border:1px solid var(--line);border-radius:10px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--pale);font-weight:600}th,td{padding:8px 10px;border-bottom:1px solid var(--line);vertical-align:top}
td.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.text{white-space:pre-wrap;overflow-wrap:anywhere}details{margin:8px 0}summary{cursor:pointer}
pre{background:var(--wash);border-radius:10px;padding:12px 16px;overflow-x:auto;font-size:13px}
@media(max-width:520px){.plots{grid-template-columns:1fr}}
"""


def first_and_last(run: Run, key: str) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a run's steps (at least one step each)."""
    _, values = column(run, key)
    if not values:
        return None
    n = max(1, len(values) // 10)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def tiles(run: Run) -> str:
    """The few numbers that a reader wants first."""
    cells = [("PPO steps", f"{run.rows[-1]['step']:,}")]
    for key, title, form in (
        ("env/reward_mean", "mean reward", "{:.2f}"),
        ("objective/kl", "KL, nats per response", "{:.1f}"),
        ("perf/response_tokens_per_second", "response tokens per second", "{:,.0f}"),
    ):
        ends = first_and_last(run, key)
        if ends:
            cells.append((f"{title}, first → last tenth", " → ".join(form.format(x) for x in ends)))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{v}</b><span>{t}</span></div>' for t, v in cells)
        + "</div>"
    )


def sample_table(run: Run) -> str:
    """Answers to the same prompts before and after; without those, the last step's samples."""
    before, after = run.samples.get("before") or [], run.samples.get("after") or []
    cell = '<td class="text">{}</td><td class="num">{}</td>'.format

    def answer(sample: dict[str, Any] | None) -> str:
        return cell(html.escape(sample["response"]), f"{sample['score']:.2f}") if sample else cell("", "")

    rows = []
    if before or after:
        head = "<th>prompt</th><th>before</th><th>score</th><th>after</th><th>score</th>"
        for i in range(max(len(before), len(after))):
            old, new = before[i] if i < len(before) else None, after[i] if i < len(after) else None
            rows.append(f'<td class="text">{html.escape((old or new)["prompt"])}</td>{answer(old)}{answer(new)}')
    else:
        head = "<th>prompt</th><th>response in the last step</th><th>score</th>"
        for sample in (run.samples.get("last_step") or [])[:12]:
            rows.append(f'<td class="text">{html.escape(sample["prompt"])}</td>{answer(sample)}')
    if not rows:
        return ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<h2>Samples: {html.escape(run.name)}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def details(run: Run) -> str:
    """Configuration and versions, folded."""
    import yaml

    parts = []
    for title, values in (("Configuration", run.settings), ("Versions and machine", run.about)):
        if values:
            text = html.escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
            parts.append(f"<details><summary>{title}: {html.escape(run.name)}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def picture(figure: Any, title: str) -> str:
    """The figure as an SVG image inside the page (as data, so that scripts and styles cannot reach it)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write `output` (an .html file) and, beside it in `<stem>_plots/`, one PNG per plot. Returns the page's path.

    Raises ReportError for a folder that is no run; nothing is written then.
    """
    if not folders:
        raise ReportError("a report needs at least one run folder")
    runs, output = [read_run(folder) for folder in folders], Path(output)
    plots = output.parent / f"{output.stem}_plots"
    plots.mkdir(parents=True, exist_ok=True)
    pictures = []
    for panel in PANELS:
        figure = draw(panel, runs)
        if figure is not None:
            figure.savefig(plots / f"{panel.name}.png")
            pictures.append(picture(figure, panel.title))
    names = ", ".join(run.name for run in runs)
    title = f"fastppo: {names}"
    summaries = "".join((f"<h2>{html.escape(r.name)}</h2>" if len(runs) > 1 else "") + tiles(r) for r in runs)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(names)}</h1><p class='sub'>PPO training report. Thin lines are single steps, thick lines their "
        f"trailing mean.</p>{summaries}<h2>Curves</h2><div class='plots'>{''.join(pictures)}</div>"
        f"{''.join(map(sample_table, runs))}<h2>How it was run</h2>{''.join(map(details, runs))}</body></html>"
    )
    temporary = output.with_name(f".{output.name}.writing")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)
    return output
