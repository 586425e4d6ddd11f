"""The performance tables, written from bench/results/*.csv and from nothing else.

    python -m bench.report           rewrite the table in README.md and bench/results/README.md
    python -m bench.report --check   exit 1 where they differ from the rows

README.md has a line per workload of whole stages (STAGES), and for kernels one per device, op and dtype over all shapes: worst,
median and best, so that no slow case is left out. bench/results/README.md has every row. A row measured again (same device, op,
dtype, shape and variant, and for kernels the same note, its memory and wait policy apart) replaces the older one.
"""

import csv
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
BEGIN, END = "<!-- bench:begin (python -m bench.report writes this) -->", "<!-- bench:end -->"
# First word of a variant's name that is ours (generate's are the dtypes of our decode weights); every other variant is what
# we compare with.
OURS = ("fastppo", "ours", "cuda", "triton", "cpu", "fp32", "bf16", "fp16")
KEY = ("device", "bench", "dtype", "shape", "note", "variant")
# Parts of a note that say how a measurement went and not what was measured.
CONDITIONS = re.compile(r"-?\d+ MiB extra|OMP_WAIT_POLICY=\w*")
# Benches of whole stages: what was timed, and against what. Their notes only tell numbers.
STAGES = {
    "bench_loop": ("generate + score + step", "TRL 0.11.4"),
    "bench_step": ("step", "TRL 0.11.4"),
    "late_loop": ("late trainer, an update", "TRL 1.12.0"),
    "generate": ("rollout", "model.generate"),
    "bench_scaling": ("weak scaling", "one process"),
    "deterministic": ("deterministic=True", "without it"),
}
NONE_YET = "No measurements have been recorded yet."

Row = Mapping[str, str]


def key(row: Row) -> tuple[str, ...]:
    """The columns that tell what was measured."""
    return tuple(name for name in KEY if name != "note" or row["bench"] not in STAGES)


def read_rows(folder: Path) -> list[Row]:
    """The newest row of each KEY over all files, in file order."""
    newest: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                newest[tuple(CONDITIONS.sub("", row.get(name) or "") for name in key(row))] = row
    return list(newest.values())


def is_ours(row: Row) -> bool:
    return re.split(r"[^a-z0-9]", row["variant"].lower())[0] in OURS


def number(row: Row, name: str) -> float | None:
    try:
        return float(row.get(name) or "")
    except ValueError:
        return None


def best_of_ours(rows: Iterable[Row]) -> list[Row]:
    """Our fastest variant of each case (device, op, dtype, shape, note)."""
    cases: dict[tuple[str, ...], Row] = {}
    for row in rows:
        case, ms = tuple(row.get(name) or "" for name in KEY[:-1]), number(row, "ms")
        if is_ours(row) and ms is not None and (case not in cases or ms < number(cases[case], "ms")):
            cases[case] = row
    return list(cases.values())


def spread(rows: Sequence[Row], name: str, form: str) -> str:
    """'worst / median / best' of a column; one number where there is one."""
    values = sorted(v for row in rows if (v := number(row, name)) is not None)
    if not values:
        return ""
    if len(values) == 1:
        return form.format(values[0])
    return " / ".join(form.format(v) for v in (values[0], statistics.median(values), values[-1]))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def when(row: Row) -> str:
    return f"{row['date']} at {row['commit']}"


def stages(rows: Sequence[Row]) -> str:
    """README.md's first table: a line per workload and variant of ours."""
    order = list(STAGES)
    ours = sorted(
        (row for row in rows if row["bench"] in STAGES and is_ours(row)), key=lambda r: order.index(r["bench"])
    )
    lines = [
        (
            STAGES[row["bench"]][0],
            row["shape"],
            row["variant"].removeprefix("fastppo "),
            f"{number(row, 'speedup'):.2f} x {STAGES[row['bench']][1]}",
            f"{number(row, 'ms'):.0f}",
            row["device"],
            when(row),
        )
        for row in ours
    ]
    header = ("what", "workload", "ours", "tokens per second against", "ms", "device", "measured")
    below = (
        "Medians; the sides take turns in one run. tiny and 124m are GPT-2 shapes of 4.6 M and 124 M parameters: prompt 32, "
        "response 64 (ragged: 8 to 64), 16 and 8 sequences, mini-batches of 4, 4 epochs; the baseline runs in float32."
    )
    return f"{markdown(header, lines)}\n\n{below}" if lines else ""


def kernels(rows: Sequence[Row]) -> str:
    """README.md's second table."""
    groups = defaultdict(list)
    for row in best_of_ours(rows):
        if row["bench"] not in STAGES:
            groups[row["device"], row["bench"], row["dtype"]].append(row)
    header = (
        "device",
        "op",
        "dtype",
        "cases",
        "times faster than its baseline",
        "% of the machine's floor",
        "measured",
    )
    lines = [
        (
            device,
            bench,
            dtype,
            str(len(found)),
            spread(found, "speedup", "{:.2f}"),
            spread(found, "percent_of_floor", "{:.0f}"),
            when(max(found, key=lambda row: row["date"])),
        )
        for (device, bench, dtype), found in sorted(groups.items())
    ]
    below = (
        "Over all measured cases: worst / median / best. The baseline is plain PyTorch; for the linear rooms it is the bare "
        "matrix products, made by torch. Every row, slower ones too: bench/results/README.md."
    )
    return f"{markdown(header, lines)}\n\n{below}" if lines else ""


def summary(rows: Sequence[Row]) -> str:
    return "\n\n".join(table for table in (stages(rows), kernels(rows)) if table) or NONE_YET


def full(rows: Sequence[Row]) -> str:
    """bench/results/README.md: every row, by device and op."""
    parts = ["# Every measurement", "", "Written by `python -m bench.report` from the CSV files beside this page."]
    groups = defaultdict(list)
    for row in rows:
        groups[row["device"], row["bench"]].append(row)
    header = (
        "dtype",
        "shape",
        "variant",
        "ms",
        "times faster than its baseline",
        "% of floor",
        "versions",
        "commit",
        "note",
    )
    for (device, bench), found in sorted(groups.items()):
        lines = [
            (
                row["dtype"],
                row["shape"],
                row["variant"],
                row["ms"],
                row.get("speedup") or "",
                row.get("percent_of_floor") or "",
                f"torch {row['torch']}, {row['threads']} threads",
                f"{row['date']} {row['commit']}",
                row.get("note") or "",
            )
            for row in found
        ]
        parts += ["", f"## {bench} on {device}", "", markdown(header, lines)]
    return "\n".join([*parts, *([] if groups else ["", NONE_YET]), ""])


def with_table(readme: str, table: str) -> str:
    """`readme` with what is between the markers replaced by `table`."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r} once each")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def wanted(root: Path = ROOT) -> dict[Path, str]:
    """file -> what it should hold."""
    rows, readme = read_rows(root / "bench/results"), root / "README.md"
    return {
        readme: with_table(readme.read_text(encoding="utf-8"), summary(rows)),
        root / "bench/results/README.md": full(rows),
    }


def main(argv: Sequence[str]) -> int:
    if set(argv) - {"--check"}:
        print(f"python -m bench.report: unknown arguments {' '.join(argv)}; there is --check", file=sys.stderr)
        return 2
    stale = 0
    for path, text in wanted().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if "--check" in argv:
            print(f"{path.relative_to(ROOT)} differs from bench/results/*.csv: run python -m bench.report")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
