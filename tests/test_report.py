"""README's performance table is what bench/results/*.csv says."""

import csv
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).parent.parent
COLUMNS = [
    "date",
    "commit",
    "device",
    "threads",
    "torch",
    "bench",
    "variant",
    "dtype",
    "shape",
    "ms",
    "percent_of_floor",
    "speedup",
    "note",
]


def row(**values) -> dict[str, str]:
    usual = {"date": "2026-01-01", "commit": "abc", "device": "cpu X", "threads": "2", "torch": "2.13", "bench": "gae"}
    return {**dict.fromkeys(COLUMNS, ""), **usual, "dtype": "float32", **values}


@pytest.fixture
def root(tmp_path) -> Path:
    rows = [
        row(variant="torch", shape="[1]", ms="4", speedup="1"),
        row(variant="cpu", shape="[1]", ms="8", speedup="0.5", percent_of_floor="20"),
        row(
            variant="cpu", shape="[1]", ms="2", speedup="2", percent_of_floor="80", date="2026-01-02"
        ),  # measured again
        row(variant="triton", shape="[1]", ms="3", speedup="1.33", percent_of_floor="53"),
        row(variant="cpu", shape="[2]", ms="5", speedup="0.8", percent_of_floor="40"),
        row(variant="liger", shape="[2]", ms="1", speedup="4"),
    ]
    (tmp_path / "bench/results").mkdir(parents=True)
    with (tmp_path / "bench/results/gae.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return tmp_path


def test_the_table_has_every_case_the_slow_one_too(root):
    text = report.wanted(root)[root / "README.md"]
    # [1]: our best is the newer cpu row, 2.00; [2]: 0.80, slower than torch. liger is not ours.
    assert "| cpu X | gae | float32 | 2 | 0.80 / 1.40 / 2.00 | 40 / 60 / 80 | 2026-01-02 at abc |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_the_full_page_has_every_newest_row(root):
    text = report.wanted(root)[root / "bench/results/README.md"]
    assert "| float32 | [2] | liger | 1 | 4 |" in text and "| cpu | 8 |" not in text


def test_missing_markers_are_an_error():
    with pytest.raises(ValueError, match="must have the lines"):
        report.with_table("no markers", "table")


def test_readme_agrees_with_the_results():
    for path, text in report.wanted().items():
        message = f"{path.relative_to(ROOT)} differs from bench/results/*.csv: run python -m bench.report"
        assert path.read_text(encoding="utf-8") == text, message


def test_every_bench_has_a_line_in_readme():
    """A bench whose variants the report does not know as ours would be left out without a word."""
    timed = {row["bench"] for row in report.read_rows(ROOT / "bench/results") if report.number(row, "ms") is not None}
    rows = report.read_rows(ROOT / "bench/results")
    shown = {line.split(" | ")[1] for line in report.kernels(rows).splitlines()[2:-2]}
    whole = {line.split(" | ")[0].removeprefix("| ") for line in report.stages(rows).splitlines()[2:-2]}
    shown |= {bench for bench, (what, _) in report.STAGES.items() if what in whole}
    assert timed and timed == shown


@pytest.mark.parametrize(
    ("bench", "notes"),
    [
        ("gae", ["fwd+bwd; 133 MiB extra", "fwd+bwd; -1 MiB extra"]),
        ("bench_loop", ["402 tok/s; median of 5", "407 tok/s; median of 7"]),
    ],
)
def test_a_case_measured_again_with_other_numbers_in_its_note_is_one_case(tmp_path, bench, notes):
    lines = [row(bench=bench, variant="ours", ms=ms, note=note) for ms, note in zip("43", notes, strict=True)]
    with (tmp_path / "gae.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    assert [made["ms"] for made in report.read_rows(tmp_path)] == ["3"]
