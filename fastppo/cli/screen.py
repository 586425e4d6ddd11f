"""What a run looks like in the terminal: live while it is one, one plain line per step when it is a file or a pipe."""

import math
import re
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastppo.cli.loop import Sample, Step

BARS = "▁▂▃▄▅▆▇█"
# key in a step's metrics, label, format
COLUMNS = (
    ("env/reward_mean", "reward", "{:+.2f}"),
    ("objective/kl", "KL", "{:.2f}"),
    ("objective/entropy", "entropy", "{:.1f}"),
    ("ppo/policy/clipfrac", "clipped", "{:.1%}"),
    ("perf/response_tokens_per_second", "tokens/s", "{:,.0f}"),
)
# key, label, format, and what the value is divided by: one line below the columns
SPEED = (
    ("fastppo/generate_tokens_per_s", "generate", "{:,.0f} tok/s", 1),
    ("fastppo/prepare_tokens_per_s", "prepare", "{:,.0f} tok/s", 1),
    ("fastppo/optimise_tokens_per_s", "optimise", "{:,.0f} tok/s", 1),
    ("fastppo/optimise_mfu", "MFU", "{:.0%}", 1),
    ("fastppo/peak_memory_bytes", "peak memory", "{:.2f} GiB", 2**30),
    ("fastppo/padding_saved", "padding saved", "{:.0%}", 1),
)


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """The values as a row of bars, in at most `width` groups. NaN and infinity, of a run that diverges, have none."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    return "".join(BARS[int((v - low) / (high - low or 1.0) * (len(BARS) - 1))] for v in means)


def shown(form: str, value: float) -> str:
    """The value as `form` writes it, without the sign of a zero."""
    text = form.format(value)
    return text if re.search("[1-9a-z]", text) else text.lstrip("-+")


def speed(metrics: Mapping[str, float]) -> str:
    """Tokens per second by phase, MFU, peak memory and padding saved, as far as a step's metrics have them."""
    return " · ".join(
        f"{label} {shown(form, metrics[key] / unit)}" for key, label, form, unit in SPEED if key in metrics
    )


class Screen:
    """Shows the steps of a run of `total` steps. Use it as a context manager around the loop."""

    def __init__(self, total: int, title: str, console: Console | None = None, columns: Sequence[tuple] = COLUMNS):
        self.console = console or Console(highlight=False)
        self.columns, self.before = columns, 0  # before: steps that an earlier start did
        self.total, self.title, self.message = total, title, ""
        self.last: Step | None = None
        self.curves: dict[str, list[float]] = {key: [] for key, *_ in columns}
        self.started = time.perf_counter()
        self.live = Live(console=self.console, refresh_per_second=8, transient=True, get_renderable=self.view)

    def __enter__(self):
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_):
        self.live.stop()

    def step(self, step: Step) -> None:
        first, self.last = self.last is None, step
        for key, values in self.curves.items():
            if key in step.metrics:
                values.append(step.metrics[key])
        if not self.console.is_terminal:
            told = [
                f"{label} {shown(form, step.metrics[key])}" for key, label, form in self.columns if key in step.metrics
            ]
            if told:
                self.console.print(f"step {step.number}/{self.total}  " + "  ".join(told), soft_wrap=True, markup=False)
            if (step.number == self.total or first) and (text := speed(step.metrics)):
                self.console.print(text, soft_wrap=True, markup=False)

    def notice(self, text: str) -> None:
        self.message = text
        if not self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def view(self) -> Panel:
        done, seconds = self.last.number if self.last else self.before, time.perf_counter() - self.started
        now = done - self.before
        left = f", about {seconds / now * (self.total - done):.0f} s to go" if now > 0 else ""
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_row(
            Text(f"step {done}/{self.total}", style="bold"),
            ProgressBar(total=self.total, completed=done, width=40),
            Text(f"{seconds:.0f} s{left}", style="dim"),
        )
        numbers = Table.grid(padding=(0, 3))
        for key, label, form in self.columns:
            if values := self.curves[key]:
                numbers.add_row(
                    Text(label, style="dim"), shown(form, values[-1]), Text(sparkline(values), style="cyan")
                )
        parts = [head, Text(), numbers]
        if self.last and (text := speed(self.last.metrics)):
            unbroken = (part.replace(" ", "\u00a0") for part in text.split(" · "))
            parts += [Text(), Text(" · ".join(unbroken), style="dim")]
        if self.last and self.last.samples:
            parts += [Text(), sample_text(self.last.samples[0])]
        if self.message:
            parts += [Text(), Text(self.message, style="yellow")]
        # the terminal writes ^C where the cursor is, behind the last border: room for two, or it scrolls the view by a line
        width = max(self.console.width - 5, 20)
        return Panel(
            Group(*parts), title=self.title, title_align="left", border_style="dim", padding=(1, 2), width=width
        )


def sample_text(sample: Sample, limit: int = 400) -> Text:
    """Prompt dim, response plain, score at the end."""
    response = sample.response if len(sample.response) <= limit else sample.response[:limit] + " ..."
    prompt = sample.prompt.text if len(sample.prompt.text) <= limit else "... " + sample.prompt.text[-limit:]
    gap = "" if response.startswith(" ") else " "
    return Text.assemble((prompt, "dim"), gap + response, (f"  ({sample.score:+.1f})", "bold"))


def before_and_after(before: Sequence[Sample], after: Sequence[Sample], rows: int = 4) -> Table:
    """The same prompts answered before and after training, side by side."""
    table = Table(show_lines=True, border_style="dim", header_style="bold", expand=True)
    for name, samples in (("before", before), ("after", after)):
        mean = sum(sample.score for sample in samples) / len(samples)
        table.add_column(f"{name}: mean reward {mean:+.2f} over {len(samples)} prompts", ratio=1)
    for one, two in list(zip(before, after, strict=True))[:rows]:
        table.add_row(sample_text(one), sample_text(two))
    return table
