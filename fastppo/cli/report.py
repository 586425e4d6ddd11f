"""`fastppo report RUN [RUN...]`: one HTML page over run folders of demo and train, and of the trainers' own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastppo.cli.errors import UserError, disk_error
from fastppo.cli.options import parse


@dataclass(frozen=True)
class ReportOptions:
    """Draw the curves of one or more runs into one self-contained HTML page, with PNGs beside it."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders: --output-dir of demo or train, or output_dir of the late PPO, SFT or reward trainer."""

    output: Path = Path("report.html")
    """The page to write."""


def run(argv: Sequence[str]) -> int:
    from fastppo.report import ReportError, write_report

    options = parse(ReportOptions, argv, "fastppo report", ReportOptions.__doc__)
    try:
        page = write_report(options.runs, options.output)
    except ReportError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise disk_error(options.output, error.strerror or str(error), "--output") from error
    print(f"wrote {page} (and its plots as PNG in {page.with_name(page.stem + '_plots')})")
    return 0
