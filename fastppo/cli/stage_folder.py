"""A stage's folder: config.yaml, info.json, metrics.jsonl, curves.png, checkpoints, the trained model, results.json.

results.json is written last: a folder that has it is a finished run, one that has checkpoints alone can go on.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fastppo.cli.errors import UserError, one_line
from fastppo.cli.lock import hold
from fastppo.cli.run_folder import METRICS, read_metrics, writing
from fastppo.disk import CheckpointError, read_json, write_whole
from fastppo.run_folder import whole_or_nothing

CONFIG, RESULTS, SAMPLES, CURVES = "config.yaml", "results.json", "samples.json", "curves.png"
OURS = (RESULTS, SAMPLES, CURVES, METRICS, "info.json", "model", "adapter", "data", CONFIG)
SAVED = ("checkpoint-*", "set-aside-checkpoint-*", ".*-checkpoint-*")


class StageFolder:
    """Opens a new folder, or one that holds the same run.

    Raises UserError when it holds another run or cannot be written.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], *, overwrite: bool = False, write: bool = True):
        self.path, self.write = Path(path), write
        values = yaml.safe_load(yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}))
        if not write:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            hold(self.path)
            if overwrite:
                self.clear()
            self.refuse_another_run(values)
            self.write_text(CONFIG, yaml.safe_dump(values, sort_keys=False))

    def clear(self) -> None:
        """Remove what a run writes; other files stay."""
        # checkpoints first and the options last: a start that is killed on the way leaves none that a run with others takes
        saved = (found for pattern in SAVED for found in self.path.glob(pattern))
        for path in [*saved, *(self.path / name for name in OURS)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def refuse_another_run(self, values: Mapping[str, Any]) -> None:
        file = self.path / CONFIG
        if not file.is_file():
            if (self.path / METRICS).is_file():
                raise UserError(f"{self.path} holds another run. Choose another --output-dir, or use --overwrite.")
            return
        before = options_of(file)
        changed = [name for name in {**before, **values} if before.get(name) != values.get(name)]
        if changed and not self.has_progress():
            self.clear()  # of a start that failed, at a wrong path perhaps: nothing is lost
        elif changed:
            told = ", ".join(f"{name} was {before.get(name)!r}, is {values.get(name)!r}" for name in changed[:4])
            raise UserError(
                f"{self.path} holds a run with other options ({told}). Choose another --output-dir, or start anew there "
                "with --overwrite."
            )

    def has_progress(self) -> bool:
        """Whether a step was recorded or saved here, or in a stage's folder of a pipeline."""
        logs = [*self.path.glob(METRICS), *self.path.glob(f"*/{METRICS}")]
        saved = [*self.path.glob("checkpoint-*"), *self.path.glob("*/checkpoint-*"), *self.path.glob(RESULTS)]
        return bool(saved) or any(file.stat().st_size for file in logs)

    @property
    def results(self) -> dict[str, Any] | None:
        """Of a finished run; else None, as of one whose file is garbled: its last steps are done again."""
        try:
            return read_json(self.path / RESULTS)
        except CheckpointError:
            return None

    def write_text(self, name: str, text: str) -> None:
        with writing(self.path / name):
            write_whole(self.path / name, text)

    def write_json(self, name: str, values: Any) -> None:
        self.write_text(name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def write_about(self) -> None:
        from fastppo.cli.info import about

        self.write_json("info.json", about())

    def start_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """metrics.jsonl holds `history`, the log of a run that goes on, and nothing past it."""
        lines = [json.dumps(line_of(logs, logs["step"])) for logs in history if "step" in logs]
        self.write_text(METRICS, "".join(f"{line}\n" for line in lines))

    def add_metrics(self, logs: Mapping[str, Any], step: int) -> None:
        with writing(self.path / METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(logs, step)) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def write_curves(self, title: str, panels: Sequence[tuple], steps: str) -> None:
        from fastppo.cli.curves import draw

        with writing(self.path / CURVES):
            draw(self.read_metrics(), self.path / CURVES, title, panels, steps)

    def save_model(self, trainer: Any) -> Path:
        """`model`: weights and tokenizer, adapters merged; `adapter`: the adapter alone, where there is one."""
        target = self.path / "model"
        with writing(target):
            model = getattr(trainer, "policy_model", None) or trainer.accelerator.unwrap_model(trainer.model)
            if hasattr(model, "peft_config"):
                with whole_or_nothing(self.path / "adapter") as folder:
                    model.save_pretrained(str(folder))
                model = model.merge_and_unload()
            with whole_or_nothing(target) as folder:
                model.save_pretrained(str(folder))
                trainer.processing_class.save_pretrained(str(folder))
        return target


def options_of(file: Path) -> dict[str, Any]:
    """What a run's config.yaml holds. Raises UserError."""
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if not isinstance(read, dict):
            raise ValueError(f"'name: value' lines were wanted, got {type(read).__name__}")
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{file} is damaged: {one_line(error)}. Choose another --output-dir, or start anew there with --overwrite."
        ) from error
    return read


def line_of(logs: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A line of metrics.jsonl: numbers alone; NaN and infinity, which JSON has no word for, as null."""
    numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float)) and name != "step"}
    return {"step": step, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}
