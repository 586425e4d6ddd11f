"""One self-contained HTML page over one or more run folders, and the same plots as PNG files.

A run folder is what `fastppo demo` and `fastppo train` write, or the output_dir of the late PPOTrainer, SFTTrainer and
RewardTrainer (runs.py says which files are read). Several runs are drawn over each other.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from fastppo.report.page import page_text, picture
from fastppo.report.plots import PANELS, Panel, draw, trailing_mean
from fastppo.report.runs import ReportError, Run, apart, column, first_and_last, read_run

__all__ = [
    "PANELS",
    "Panel",
    "ReportError",
    "Run",
    "column",
    "draw",
    "first_and_last",
    "read_run",
    "trailing_mean",
    "write_report",
]


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write `output` (an .html file) and, beside it in `<stem>_plots/`, one PNG per plot. Returns the page's path.

    Raises ReportError for a folder that is no run; nothing is written then.
    """
    if not folders:
        raise ReportError("a report needs at least one run folder")
    runs, output = apart([read_run(folder) for folder in folders]), Path(output)
    if output.is_dir():
        raise ReportError(f"{output} is a folder; name the page to write, like {output / 'report.html'}")
    plots = output.parent / f"{output.stem}_plots"
    shutil.rmtree(plots, ignore_errors=True)  # an earlier report's, which may have had other panels
    plots.mkdir(parents=True)
    pictures = []
    for panel in PANELS:
        figure = draw(panel, runs)
        if figure is not None:
            figure.savefig(plots / f"{panel.name}.png")
            pictures.append(picture(figure, panel, runs))
    temporary = output.with_name(f".{output.name}.writing")
    temporary.write_text(page_text(runs, pictures), encoding="utf-8")
    temporary.replace(output)
    return output
