"""A run's folder: config.yaml, info.json, metrics.jsonl, tensorboard events, samples.json, curves.png, and the saved policy."""

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastppo.cli.errors import UserError, disk_error
from fastppo.cli.lock import hold
from fastppo.cli.loop import Outcome, Sample, Step
from fastppo.disk import disk_trouble, write_whole
from fastppo.run_folder import whole_or_nothing

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises into a message."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (why := disk_trouble(error)) is None:
            raise
        raise disk_error(path, why) from error


@contextlib.contextmanager
def quiet_tensorboard() -> Iterator[None]:
    """tensorboard's own thread raises what its next write or close() raises in ours: without the thread's traceback."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class RunFolder:
    """Creates the folder (a new one, or an empty one, unless `overwrite`) and writes a run into it as it goes.

    resume: goes on with the run that is there; `at_step` then drops what it recorded after that step.
    Raises UserError when the folder holds another run or cannot be written.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False):
        self.path, self.board, self.purge_step = Path(path), None, None
        self.cleanup = contextlib.ExitStack()
        with writing(self.path):
            if resume:
                hold(self.path)
                self.metrics = (self.path / METRICS).open("a", encoding="utf-8")
                return
            self.path.mkdir(parents=True, exist_ok=True)
            hold(self.path)
            old = self.path / METRICS
            begun = old.exists() and old.stat().st_size or any((self.path / CHECKPOINTS).glob("step-*"))
            if begun and not overwrite:
                raise UserError(
                    f"{self.path} already holds a run. Choose another --output-dir, or write over it with --overwrite."
                )
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
            self.metrics = (self.path / METRICS).open("w", encoding="utf-8")

    def at_step(self, step: int) -> None:
        """Forget what was recorded after `step`: those steps are done again."""
        self.purge_step = step + 1
        with writing(self.path / METRICS):
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            self.metrics.close()
            write_whole(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
            self.metrics = (self.path / METRICS).open("a", encoding="utf-8")

    def write_config(self, values: Mapping[str, Any]) -> None:
        """config.yaml: what --config takes to do this run again. info.json: versions, machine, back ends."""
        from fastppo.cli.info import about

        with writing(self.path / "config.yaml"):
            write_whole(self.path / "config.yaml", yaml.safe_dump(dict(values), sort_keys=False))
            write_whole(self.path / "info.json", json.dumps(about(), indent=1))

    def write_step(self, step: Step) -> None:
        """One line of metrics.jsonl (NaN and infinity as null, which JSON has no word for) and the tensorboard events."""
        clean = {name: value if math.isfinite(value) else None for name, value in step.metrics.items()}
        line = {"step": step.number, "wall_time": time.time(), **clean}
        with writing(self.path / METRICS):
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()
        with writing(self.path / "tensorboard"):
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                self.cleanup.enter_context(quiet_tensorboard())
                self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=self.purge_step)
            for name, value in step.metrics.items():
                self.board.add_scalar(name, value, step.number)

    def write_samples(self, outcome: Outcome, last: Sequence[Sample]) -> None:
        """samples.json: answers to the probes before and after, and the last step's samples."""
        told = {"before": outcome.before, "after": outcome.after, "last_step": last}
        rows = {
            name: [{"prompt": s.prompt.text, "response": s.response, "score": s.score} for s in samples]
            for name, samples in told.items()
        }
        with writing(self.path / "samples.json"):
            write_whole(self.path / "samples.json", json.dumps(rows, indent=1, ensure_ascii=False))

    def write_curves(self, title: str) -> None:
        from fastppo.cli.curves import draw

        with writing(self.path / "curves.png"):
            draw(read_metrics(self.path), self.path / "curves.png", title)

    def save_policy(self, model: Any, tokenizer: Any, name: str = "policy") -> Path:
        """A policy folder is whole or not there."""
        target = self.path / name
        with writing(target), whole_or_nothing(target) as folder:
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
        return target

    def close(self) -> None:
        with self.cleanup, writing(self.path):
            if self.board is not None:
                self.board.close()
            self.metrics.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; what a crash cut off or left garbled is left out."""
    rows = []
    for line in (Path(folder) / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows
