"""What a report reads: the folder of one run.

metrics.jsonl        one line per step: what `fastppo demo` and `fastppo train` write
trainer_state.json   the log of a transformers Trainer (late PPO, SFT, reward), in the folder or its newest checkpoint
samples.json, config.yaml, info.json      answers before and after, settings, versions; where present
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Run:
    """name: the folder's. rows: one per step, in order. samples: samples.json. settings: config.yaml. about: info.json."""

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

    Raises ReportError when it holds no run, no finished step, or a damaged file.
    """
    import yaml

    folder = Path(folder)
    rows = [row | derived(row) for row in in_order(read_rows(folder))]
    try:
        samples, about = (read_object(folder / name, json.loads) for name in ("samples.json", "info.json"))
        settings = read_object(folder / "config.yaml", yaml.safe_load)
    except OSError as error:
        raise ReportError(f"{folder}: cannot read {error.filename}: {error.strerror}") from error
    return Run(folder.resolve().name, folder, rows, samples, settings, about)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run. Raises ReportError."""
    try:
        if (folder / "metrics.jsonl").is_file():
            source, rows = folder / "metrics.jsonl", read_lines(folder / "metrics.jsonl")
        elif source := trainer_state(folder):
            history = read_object(source, json.loads).get("log_history") or []
            rows = [{**row, "step": row.get("step")} for row in history if isinstance(row, Mapping)]
        else:
            raise ReportError(f"{folder}: no metrics.jsonl and no trainer_state.json there; {what_instead(folder)}")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{folder}: {error}") from error
    rows = [row for row in rows if type(row.get("step")) is int]
    if not rows:
        raise ReportError(f"{source}: not one finished step in it yet; leave this run out")
    return rows


def what_instead(folder: Path) -> str:
    """What to name in place of a folder that is no run: the runs in it, if there are any."""
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    if inside:
        return f"its folders are runs: fastppo report {' '.join(map(str, inside[:8]))}{' ...' if inside[8:] else ''}"
    return "a run folder is what --output-dir (or a trainer's output_dir) names"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; only the last line may be damaged."""
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ReportError(f"{path}: line {number} is not JSON: {error}") from error
    return [row for row in rows if isinstance(row, dict)]


def trainer_state(folder: Path) -> Path | None:
    """trainer_state.json of a transformers run: the folder's own, or that of its newest whole checkpoint."""
    from fastppo.run_folder import checkpoints

    places = [folder, *reversed(checkpoints(folder))]
    return next((p / "trainer_state.json" for p in places if (p / "trainer_state.json").is_file()), None)


def read_object(path: Path, parse: Any) -> dict[str, Any]:
    """The mapping in a file, {} where there is no file. Raises ReportError when it holds something else."""
    import yaml

    if not path.exists():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8")) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: must hold names and values; got a {type(value).__name__}")
    return value


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step: what a resumed run logged again wins, what was logged apart (a summary) is added."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps[row["step"]] = steps.get(row["step"], {}) | row
    return [steps[step] for step in sorted(steps)]


def number(value: Any) -> float | None:
    """`value` as a finite float; None for anything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def derived(row: Mapping[str, Any]) -> dict[str, float]:
    """Figures that follow from others: peak memory in GiB, response tokens per second while generating."""
    found = {}
    peak = number(row.get("fastppo/peak_memory_bytes"))
    if peak is not None:
        found["report/peak_memory_gib"] = peak / GIB
    phases = [number(row.get(f"time/loop/{phase}")) for phase in ("generate", "reward", "step")]
    rate = number(row.get("perf/response_tokens_per_second"))
    if rate is not None and None not in phases and phases[0] > 0:
        found["report/generate_tokens_per_s"] = rate * sum(phases) / phases[0]
    return found


def column(run: Run, keys: str | Sequence[str]) -> tuple[list[int], list[float]]:
    """(steps, finite values) of one metric; of several names for it, the first that the run has."""
    for key in (keys,) if isinstance(keys, str) else keys:
        pairs = [(row["step"], number(row.get(key))) for row in run.rows]
        pairs = [(step, value) for step, value in pairs if value is not None]
        if pairs:
            return [step for step, _ in pairs], [value for _, value in pairs]
    return [], []


def lost(run: Run, keys: str | Sequence[str]) -> tuple[int, int] | None:
    """(steps that logged one of these metrics as NaN, infinite or null, the last of them); None where there is none."""
    keys = (keys,) if isinstance(keys, str) else keys
    steps = [row["step"] for row in run.rows if any(key in row and number(row[key]) is None for key in keys)]
    return (len(steps), steps[-1]) if steps else None


def first_and_last(run: Run, keys: str | Sequence[str]) -> tuple[float, float] | None:
    """Means over the first and the last tenth of a run's steps (at least one step each)."""
    _, values = column(run, keys)
    if not values:
        return None
    n = max(1, len(values) // 10)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, each with a name of its own: folders called alike get their parents' names in front, or a number."""
    from dataclasses import replace

    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.path.resolve().parts[-2:]) if names.count(run.name) > 1 else run.name for run in runs]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
