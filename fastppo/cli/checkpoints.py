"""Checkpoints of `fastppo train`: when one is written, where a run goes on, and what --resume means."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.cli.errors import UserError
from fastppo.cli.run_folder import CHECKPOINTS as FOLDER

# where --save-every is not given: checkpoints take at most this share of the run's time
SHARE = 0.05


@dataclass
class Checkpoints:
    """folder: where they are.   every: steps between two; None: as often as takes SHARE of the time.   keep: how many stay."""

    folder: Path
    every: int | None = None
    keep: int = 3
    saved: int = -1  # the step that was written last
    _ended: float = 0.0
    _took: float = 0.0

    def after_step(self, trainer: Any, step: int, extra: Any, must: bool) -> None:
        """Write one if it is due (or must be); all processes call it."""
        due = step % self.every == 0 if self.every else time.monotonic() - self._ended >= self._took / SHARE
        if trainer.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            agreed = [due]
            broadcast_object_list(agreed)  # clocks differ
            due = agreed[0]
        if step != self.saved and (due or must):
            self.write(trainer, step, extra)

    def write(self, trainer: Any, step: int, extra: Any) -> None:
        from fastppo.checkpoint import CheckpointError

        begun = time.monotonic()
        try:
            trainer.save_checkpoint(self.folder, keep=self.keep, extra=extra)
        except CheckpointError as error:
            then = (
                f"go on with: {go_on(self.folder.parent)}" if self.saved >= 0 else "start anew: no step was saved yet"
            )
            raise UserError(f"{error} Then {then}") from error
        self._ended = time.monotonic()
        self._took, self.saved = self._ended - begun, step

    def load(self, trainer: Any, path: Path) -> Any:
        """Bring `trainer` to where the checkpoint is; a Resumed (fastppo/trainer/state.py)."""
        from fastppo.checkpoint import CheckpointError

        try:
            back = trainer.load_checkpoint(path)
        except CheckpointError as error:
            raise UserError(f"--resume: {error}") from error
        self.saved = back.step
        return back


def go_on(run: Path) -> str:
    return f"fastppo train --resume {run}"


def take_resume(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """argv without --resume [PATH], and the path; "latest" where none is given."""
    rest, asked, words = [], None, list(argv)
    while words:
        word = words.pop(0)
        if word == "--resume":
            asked = words.pop(0) if words and not words[0].startswith("--") else "latest"
        elif word.startswith("--resume="):
            asked = word.partition("=")[2] or "latest"
        else:
            rest.append(word)
    return rest, asked


@dataclass(frozen=True)
class Where:
    """run: the folder that the run goes on in.   path: a checkpoint, or the folder with all of them."""

    run: Path
    path: Path


def find_run(asked: str, output_dir: Path | None) -> Where:
    """What --resume means: a run's folder, one of its checkpoints, or "latest" of --output-dir or of runs/."""
    path = Path(asked)
    if asked == "latest" and not path.exists():
        path = output_dir or _latest_run()
    if path.parent.name == FOLDER and (path / "manifest.json").exists():
        return Where(path.parent.parent, path)
    if path.name == FOLDER:
        path = path.parent
    if not path.is_dir():
        raise UserError(f"--resume: there is no folder {path}")
    if not (path / FOLDER).is_dir():
        raise UserError(
            f"--resume: {path} holds no checkpoints ({FOLDER}/step-...); give the folder of a run, or one of its checkpoints"
        )
    return Where(path, path / FOLDER)


def _latest_run() -> Path:
    runs = [path for path in Path("runs").glob(f"*/{FOLDER}") if path.is_dir()]
    if not runs:
        raise UserError("--resume: no run under runs/ has checkpoints; give its folder: --resume FOLDER")
    return max(runs, key=lambda path: path.stat().st_mtime).parent


def with_saved_options(argv: Sequence[str]) -> tuple[list[str], Where | None]:
    """argv as the run to go on with had it: its config.yaml unless --config names another, then the flags given now."""
    from fastppo.cli.options import take_config

    argv, asked = take_resume(argv)
    if asked is None:
        return argv, None
    place = find_run(asked, _output_dir(argv))
    _, config = take_config(argv)
    if config is None:
        if not (place.run / "config.yaml").is_file():
            raise UserError(f"--resume: {place.run} has no config.yaml: give the run's options, or --config FILE")
        argv = ["--config", str(place.run / "config.yaml"), *argv]
    return argv, place


def _output_dir(argv: Sequence[str]) -> Path | None:
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        name, equals, value = word.replace("_", "-").partition("=")
        if name == "--output-dir":
            return Path(word.partition("=")[2] if equals else following)
    return None


def answers_of(extra: Any, prompts: Sequence[Any], probes: Sequence[Any]) -> list[Any]:
    """The answers to the probes before training, from a checkpoint's `extra`. UserError where it does not fit this run."""
    from fastppo.cli.loop import Sample, fingerprint

    try:
        answers = [(str(text), float(score)) for text, score in extra["before"]]
        then = extra["prompts"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("--resume: the checkpoint was not written by fastppo train; load it from Python") from error
    if then != (now := fingerprint(prompts)):
        raise UserError(f"--resume: the run's prompts were others ({then}) than --dataset gives now ({now})")
    return [Sample(prompt, *answer) for prompt, answer in zip(probes, answers, strict=False)]
