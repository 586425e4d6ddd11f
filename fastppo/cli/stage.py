"""One stage on the command line (SFT, reward model, PPO): train, show, record, and go on where an earlier start ended."""

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from fastppo.cli.errors import UserError, one_line
from fastppo.cli.lock import joined
from fastppo.cli.loop import Interrupts, Step
from fastppo.cli.phases import Phases
from fastppo.cli.screen import Screen
from fastppo.cli.session import quiet_libraries
from fastppo.cli.stage_folder import CURVES, SAMPLES, StageFolder
from fastppo.cli.stage_options import Given, Stage
from fastppo.disk import CheckpointError
from fastppo.experimental.ppo.rewards import EndpointError
from fastppo.run_folder import checkpoints

STOPPING = "Stopping after this step, with a checkpoint. Ctrl-C again stops at once."


class Recorder(TrainerCallback):
    """Writes and shows every log line, and turns the first Ctrl-C into a checkpoint and a stop."""

    def __init__(self, folder: StageFolder, screen: Screen, interrupts: Interrupts, trainer: Any):
        self.folder, self.screen, self.interrupts, self.trainer = folder, screen, interrupts, trainer
        self.phases = Phases(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self.screen.total, self.screen.before = state.max_steps, state.global_step
        if not state.is_world_process_zero:
            return
        for reason in self.trainer.passed_over:
            self.screen.say(f"Passed over a checkpoint: {reason}")
        if state.global_step:
            self.screen.say(f"Going on after step {state.global_step}")
        self.folder.start_metrics(state.log_history)

    def on_step_begin(self, args, state, control, **kwargs):
        self.phases.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        if not any(name.startswith("eval_") for name in logs):
            logs = logs | self.phases.figures()
        self.folder.add_metrics(logs, state.global_step)
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
        self.screen.step(Step(state.global_step, numbers, []))

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupts.asked:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps or self.interrupts.asked:
            control.should_log = True  # the last numbers count, whatever --logging-steps is


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    import datasets

    shown = datasets.are_progress_bars_enabled() if hasattr(datasets, "are_progress_bars_enabled") else True
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'pin_memory' argument is set")
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """What libraries say about a model, rows or options that cannot work becomes one message."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(one_line(error, 600)) from error


def load_error(flag: str, source: str, error: Exception) -> UserError:
    known = "a folder here" if Path(source).is_dir() else "no folder here"
    return UserError(f"{flag}: {source} is {known} and could not be loaded: {one_line(error)}")


def check_model(source: str, flag: str = "--model") -> Any:
    """The model's configuration. Raises UserError, for its tokenizer too, before any data was read."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source)
        AutoTokenizer.from_pretrained(source)
        return config
    except (OSError, ValueError) as error:
        raise load_error(flag, source, error) from error


def adapter(options: Any, task: str) -> Any:
    if options.lora_rank is None:
        return None
    from peft import LoraConfig

    rank = options.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, task_type=task, target_modules="all-linear")


def run_stage(stage: Stage, given: Given) -> tuple[int, dict[str, Any]]:
    """(exit status, results): 0 when the stage is finished (by this start or an earlier one), 130 when interrupted."""
    state = joined()
    options, is_main = given.options, state.is_main_process
    options.output_dir = options.output_dir or Path("runs") / time.strftime(f"{stage.name}-%Y%m%d-%H%M%S")
    folder = StageFolder(options.output_dir, given.values, overwrite=options.overwrite, write=is_main)
    state.wait_for_everyone()
    if (results := folder.results) is not None:
        if is_main:
            print(f"{stage.name}: finished before, in {folder.path} (--overwrite starts anew)")
        return 0, results
    check_model(options.model)
    with quiet_libraries(), quiet_datasets():
        trainer = stage.build(options, given.configuration(stage.config_class))
        if is_main:
            folder.write_about()
        try:
            return train_and_save(stage, trainer, folder)
        except EndpointError as error:
            raise UserError(f"--reward: {error}. The same command goes on from the last checkpoint.") from error


def train_and_save(stage: Stage, trainer: Any, folder: StageFolder) -> tuple[int, dict[str, Any]]:
    title = f"fastppo {stage.name}: {folder.path}"
    screen = Screen(trainer.args.max_steps, title, columns=stage.columns)
    trainer.remove_callback(PrinterCallback)
    is_main = trainer.is_world_process_zero()
    if stage.probe and is_main and not (folder.path / SAMPLES).is_file():
        folder.write_json(SAMPLES, {"before": stage.probe(trainer)})
    with Interrupts(screen.notice, STOPPING) as interrupts:
        trainer.add_callback(Recorder(folder, screen, interrupts, trainer))
        with screen if is_main else contextlib.nullcontext(), curves_at_the_end(stage, folder, title, is_main):
            try:
                trainer.train(resume_from_checkpoint="auto")
                if not interrupts.asked and not evaluated_last(trainer):
                    trainer.evaluate()
            except KeyboardInterrupt:
                interrupts.asked = True
            except FloatingPointError as error:
                if str(error).startswith("score"):
                    raise UserError(f"{error}; --on-nonfinite skip would leave such batches out") from error
                raise UserError(f"training diverged: {error}. Lower the learning rate.") from error
            except CheckpointError as error:
                raise UserError(f"{error} The same command goes on from the last checkpoint.") from error
    if interrupts.asked:
        return interrupted(stage, screen, folder, is_main)
    return finished(stage, trainer, screen, folder)


@contextlib.contextmanager
def curves_at_the_end(stage: Stage, folder: StageFolder, title: str, is_main: bool) -> Iterator[None]:
    """However training ends, its plots are drawn; what ended it is told, not that they could not be written either."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError):
            if is_main:
                folder.write_curves(title, stage.panels, stage.step_name)
        raise
    if is_main:
        folder.write_curves(title, stage.panels, stage.step_name)


def evaluated_last(trainer: Any) -> bool:
    """Whether there is nothing to evaluate on, or the last step was evaluated already."""
    step = trainer.state.global_step
    done = any("eval_runtime" in x or "eval_objective/kl" in x for x in trainer.state.log_history if x["step"] == step)
    return trainer.eval_dataset is None or done


def interrupted(stage: Stage, screen: Screen, folder: StageFolder, is_main: bool) -> tuple[int, dict[str, Any]]:
    saved = checkpoints(folder.path)
    if is_main:
        where = f"{saved[-1]} is saved" if saved else "no step was saved"
        screen.say(f"{stage.name} interrupted: {where}. The same command goes on from there.")
    return 130, {}


def finished(stage: Stage, trainer: Any, screen: Screen, folder: StageFolder) -> tuple[int, dict[str, Any]]:
    if not trainer.is_world_process_zero():
        return 0, {}
    results = stage.results(folder.read_metrics())
    if stage.probe:
        import json

        before = json.loads((folder.path / SAMPLES).read_text(encoding="utf-8")).get("before", [])
        folder.write_json(SAMPLES, {"before": before, "after": stage.probe(trainer)})
    folder.save_model(trainer)
    folder.write_json("results.json", results)
    screen.say(f"{stage.name}: {told(results)}")
    for name, what in (("model/", "for from_pretrained"), (CURVES, "its plots"), ("metrics.jsonl", "every number")):
        screen.say(f"  {folder.path / name}  {what}")
    return 0, results


def told(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in results.items())
