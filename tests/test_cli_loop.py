"""The loop and the run's folder with a trainer made of paper: order, records, and every way a run can end."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastppo.cli.errors import RewardError, UserError
from fastppo.cli.loop import LoopOptions, Prompt, Sample, Step, batches, run_loop
from fastppo.cli.run_folder import RunFolder, read_metrics
from fastppo.cli.screen import Screen, sparkline
from fastppo.cli.session import Session

PROMPTS = [Prompt(f"p{i}", torch.tensor([i])) for i in range(7)]


class PaperModel(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def save_pretrained(self, folder):
        (Path(folder) / "model.safetensors").write_text("weights")


class PaperTrainer:
    """Responds with the query plus one, takes any scores, and counts."""

    def __init__(self, fail_at: int | None = None, loss: float = 1.0):
        self.config = SimpleNamespace(batch_size=3, log_with=None)
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"), process_index=0, num_processes=1, unwrap_model=lambda model: model
        )
        words = SimpleNamespace(batch_decode=lambda rows, **_: [f" r{int(row[0])}" for row in rows])
        words.save_pretrained = lambda folder: (Path(folder) / "tokenizer.json").write_text("{}")
        self.model, self.tokenizer, self.steps, self.loss, self.fail_at = PaperModel(), words, 0, loss, fail_at

    def generate(self, queries, return_prompt, batch_size, **kwargs):
        assert not return_prompt and batch_size == len(queries) and kwargs == {"max_new_tokens": 1}
        return [query + 1 for query in queries]

    def step(self, queries, responses, scores):
        self.steps += 1
        if self.steps == self.fail_at:
            raise FloatingPointError("loss is nan for sequence 2")
        self.scores = scores
        return {"objective/kl": 0.5, "ppo/loss/total": self.loss, "ppo/policy/ratio": torch.ones(3).numpy()}


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def session(folder: Path, **kwargs) -> Session:
    console = Console(file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    return Session(RunFolder(folder, **kwargs), Screen(4, "paper", console), "paper")


def options(steps=4, probes=()):
    return LoopOptions(steps, {"max_new_tokens": 1}, seed=1, probes=probes)


def test_every_pass_has_every_prompt_once_and_ranks_share_it():
    source = batches(PROMPTS, 7, seed=0)
    first, second = next(source), next(source)
    assert sorted(p.text for p in first) == sorted(p.text for p in second) == [p.text for p in PROMPTS]
    assert first != second
    two = [next(batches(PROMPTS[:6], 3, seed=0, rank=rank, ranks=2)) for rank in (0, 1)]
    assert sorted(p.text for p in two[0] + two[1]) == [p.text for p in PROMPTS[:6]]
    assert len(next(batches(PROMPTS[:2], 5, seed=0))) == 5  # fewer prompts than a batch: they come again


def test_a_finished_run_has_everything(tmp_path):
    trainer = PaperTrainer()
    outcome = run_loop(trainer, PROMPTS, lengths, options(probes=PROMPTS[:2]), session(tmp_path / "run"))
    assert (outcome.done, outcome.ended, trainer.steps) == (4, "finished", 4)
    assert [s.response for s in outcome.before] == [s.response for s in outcome.after] == [" r1", " r2"]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["env/reward_mean"] == 3.0 and rows[0]["objective/kl"] == 0.5 and "ppo/policy/ratio" not in rows[0]
    assert rows[0]["perf/response_tokens_per_second"] > 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"metrics.jsonl", "tensorboard", "samples.json", "curves.png", "policy"}
    assert (tmp_path / "run/policy/model.safetensors").read_text() == "weights"
    assert len(json.loads((tmp_path / "run/samples.json").read_text())["last_step"]) == 3


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_loop(PaperTrainer(), PROMPTS, lengths, options(), session(tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.value for event in events.Scalars("env/reward_mean")] == [3.0] * 4


def test_a_reward_that_fails_later_leaves_what_was_trained(tmp_path):
    calls = []

    def breaks(prompts, responses):
        calls.append(1)
        if len(calls) == 3:
            raise RewardError("reward breaks raised KeyError")
        return lengths(prompts, responses)

    with pytest.raises(RewardError, match="breaks"):
        run_loop(PaperTrainer(), PROMPTS, breaks, options(), session(tmp_path / "run"))
    assert len(read_metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run/policy/model.safetensors").is_file() and (tmp_path / "run/curves.png").is_file()


@pytest.mark.parametrize(("trainer", "done"), [(PaperTrainer(fail_at=3), 2), (PaperTrainer(loss=float("nan")), 1)])
def test_a_diverged_loss_is_named_and_what_was_trained_is_saved(tmp_path, trainer, done):
    with pytest.raises(UserError, match="training diverged in step .*nan.*Lower the learning rate"):
        run_loop(trainer, PROMPTS, lengths, options(), session(tmp_path / "run"))
    assert len(read_metrics(tmp_path / "run")) == done and (tmp_path / "run/policy").is_dir()


def test_a_bug_keeps_its_own_exception_and_still_saves(tmp_path):
    def buggy(prompts, responses):
        return lengths(prompts, responses) if not list((tmp_path / "run/tensorboard").glob("*")) else {}["bug"]

    with pytest.raises(KeyError, match="bug"):
        run_loop(PaperTrainer(), PROMPTS, buggy, options(), session(tmp_path / "run"))
    assert (tmp_path / "run/policy").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_saves(tmp_path, number):
    def interrupts(prompts, responses):
        if len(read_metrics(tmp_path / "run")) == 1:
            os.kill(os.getpid(), number)
        return lengths(prompts, responses)

    before = signal.getsignal(number)
    outcome = run_loop(PaperTrainer(), PROMPTS, interrupts, options(), session(tmp_path / "run"))
    assert (outcome.done, outcome.ended, outcome.after) == (2, "interrupted", [])
    assert (tmp_path / "run/policy").is_dir() and signal.getsignal(number) is before


def test_a_second_interrupt_stops_in_the_middle_and_saves(tmp_path):
    def hangs(prompts, responses):
        if len(read_metrics(tmp_path / "run")) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Event().wait(20)
        return lengths(prompts, responses)

    trainer = PaperTrainer()
    outcome = run_loop(trainer, PROMPTS, hangs, options(), session(tmp_path / "run"))
    assert (outcome.done, outcome.ended, trainer.steps) == (1, "interrupted", 1)
    assert (tmp_path / "run/policy").is_dir()


def test_no_step_no_policy(tmp_path):
    def never(prompts, responses):
        raise RewardError("never")

    with pytest.raises(RewardError):
        run_loop(PaperTrainer(), PROMPTS, never, options(), session(tmp_path / "run"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl"}
    RunFolder(tmp_path / "run")  # and the folder may be used again: no run is in it


# --- the folder ------------------------------------------------------------------------------------------------------


def step(number=1, **metrics) -> Step:
    return Step(number, {"env/reward_mean": 1.0, **metrics}, [])


def written(path: Path, shown: Step, **kwargs) -> None:
    folder = RunFolder(path, **kwargs)
    folder.write_step(shown)
    folder.close()


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    written(tmp_path, step())
    with pytest.raises(UserError, match="already holds a run.*--overwrite"):
        RunFolder(tmp_path)
    written(tmp_path, step(5), overwrite=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [5]


def test_nan_is_null_and_a_cut_off_line_is_left_out(tmp_path):
    written(tmp_path, step(kl=float("nan")))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kl"')
    assert [row["kl"] for row in read_metrics(tmp_path)] == [None]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.close()
    folder.metrics = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left on device.*--output-dir"):
        folder.write_step(step())


def test_a_full_disk_under_tensorboard_is_named_once(tmp_path, monkeypatch):
    """tensorboard writes in a thread of its own, whose traceback would stand in the middle of the message."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    folder = RunFolder(tmp_path)
    folder.write_step(step())
    folder.board.flush()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(UserError, match="cannot write .*: No space left on device"):
        folder.write_step(step(2))
        folder.close()
    assert tracebacks == [] and threading.excepthook == tracebacks.append


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run: Not a directory"):
        RunFolder(tmp_path / "file/run")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write anywhere
        with pytest.raises(UserError, match="Permission denied"):
            RunFolder(locked / "run")


SAVE_WITHOUT_ROOM = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from safetensors.torch import save_file
from fastppo.cli.errors import UserError
from fastppo.cli.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
model = SimpleNamespace(save_pretrained=lambda to: save_file({"w": torch.zeros(1 << 16)}, Path(to) / "model.safetensors"))
try:
    folder.save_policy(model, SimpleNamespace(save_pretrained=lambda to: None))
except UserError as error:
    print(error)
"""


def test_a_policy_that_does_not_fit_leaves_no_half_of_it(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [sys.executable, "-c", SAVE_WITHOUT_ROOM, str(tmp_path / "run")]
    ran = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert "cannot write" in ran.stdout and "File too large" in ran.stdout, ran.stdout + ran.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl"}


# --- the screen ------------------------------------------------------------------------------------------------------


def test_sparkline_rises_with_its_values():
    assert sparkline([0, 1, 2, 3]) == "▁▃▅█" and sparkline([]) == "" and sparkline([2, 2]) == "▁▁"
    assert len(sparkline(list(range(1000)))) <= 48
    nan, inf = float("nan"), float("inf")
    assert sparkline([0, nan, 3, inf]) == "▁█" and sparkline([nan]) == ""  # a run that diverges is still shown


def test_the_screen_lets_go_of_old_samples():
    """It kept every step's texts: 9 KB a step for as long as a run lasted."""
    screen = Screen(9, "paper", Console(file=io.StringIO()))
    first = Sample(PROMPTS[0], " r", 1.0)
    gone = weakref.ref(first)
    screen.step(Step(1, {"env/reward_mean": 1.0}, [first]))
    del first
    assert gone() is not None  # shown
    screen.step(Step(2, {"env/reward_mean": 2.0}, []))
    assert gone() is None and screen.curves["env/reward_mean"] == [1.0, 2.0]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_screen_shows_the_numbers(terminal):
    console = Console(record=True, force_terminal=terminal, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    screen = Screen(9, "paper", console)
    shown = step(3, **{"objective/kl": 0.25})
    screen.step(Step(3, shown.metrics, [SimpleNamespace(prompt=PROMPTS[0], response=" r", score=1.0)]))
    screen.notice("stopping")
    console.print(screen.view())
    text = console.export_text()
    for part in ("+1.00", "0.25", "p0 r", "stopping", "KL"):
        assert part in text
    assert ("step 3/9  reward +1.00  KL 0.25" in text) is not terminal
