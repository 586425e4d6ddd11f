"""The books of gpu_suite.sh: what ran here, every part's rows in one file, the summary table.

python bench/gpu_rows.py environment DEVICE
python bench/gpu_rows.py merge OUT ROWS PART RC SECONDS LIMIT CLOCKS_BEFORE CLOCKS_AFTER
python bench/gpu_rows.py summary OUT
"""

import csv
import importlib.metadata
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness

STATUS = ("part", "rc", "seconds", "limit_s", "clocks_before", "clocks_after", "date")
ROWS = ("part", "clocks_before", "clocks_after", *harness.COLUMNS)
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "pytest", "flash-attn", "liger-kernel")
PACKAGES += ("quack-kernels",)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def environment(device: str) -> None:
    """Into the log: machine, packages, back ends."""
    import torch

    from fastppo.attention import backends as attention
    from fastppo.kernels._backend import BACKENDS, missing

    print(harness.environment(device))
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    for name in BACKENDS:
        print(f"back end {name}: {missing(name, torch.device(device)) or 'ok'}")
    for name in attention.BACKENDS:
        found = attention.load(name)
        print(f"attention {name}: {found if isinstance(found, str) else 'imports'}")
    if device == "cuda":
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)


def merge(out: Path, rows: Path, part: str, rc: str, seconds: str, limit: str, before: str, after: str) -> None:
    """Append the part's rows to OUT/rows.csv and its line to OUT/status.csv; those of an earlier try are replaced."""
    clocks = {"part": part, "clocks_before": before, "clocks_after": after}
    new = [{**clocks, **row} for path in sorted(rows.glob("*.csv")) for row in read(path)]
    kept = [row for row in read(out / "rows.csv") if row["part"] != part]
    write(out / "rows.csv", ROWS, kept + new)
    line = {**clocks, "rc": rc, "seconds": seconds, "limit_s": limit, "date": harness.environment("cpu")["date"]}
    lines = [row for row in read(out / "status.csv") if row["part"] != part]
    write(out / "status.csv", STATUS, [*lines, line])


def summary(out: Path) -> str:
    """OUT/summary.md: the parts, then every row with its share of the floor and its ratio to the baseline."""
    status, rows = read(out / "status.csv"), read(out / "rows.csv")
    words = {"0": "done", "124": "timed out", "137": "killed at its limit"}
    lines = ["# GPU suite", ""]
    if rows:
        lines += [", ".join(f"{k} {rows[-1][k]}" for k in harness.COLUMNS[1:9] if rows[-1][k]), ""]
    lines += ["| part | result | seconds | clocks before | after |", "|---|---|---|---|---|"]
    for x in status:
        result = words.get(x["rc"], f"FAILED ({x['rc']})")
        lines.append(f"| {x['part']} | {result} | {x['seconds']} | {x['clocks_before']} | {x['clocks_after']} |")
    columns = ("bench", "shape", "dtype", "variant", "ms", "floor_ms", "percent_of_floor", "speedup", "note")
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[name].replace("|", "/") for name in columns) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text)
    return text


def main(command: str, *given: str) -> None:
    if command == "environment":
        environment(*given)
    elif command == "merge":
        merge(Path(given[0]), Path(given[1]), *given[2:])
    elif command == "summary":
        print(summary(Path(given[0])))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
