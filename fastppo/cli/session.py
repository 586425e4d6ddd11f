"""A run as the user sees it: the folder it is written to and the screen it is shown on."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from fastppo.cli.checkpoints import Checkpoints, go_on
from fastppo.cli.loop import LoopOptions, Outcome, Prompt, Reward, Step, run_loop
from fastppo.cli.run_folder import RunFolder
from fastppo.cli.screen import Screen, before_and_after


class Session:
    """Records a run in `folder` and shows it on `screen`; processes other than the main one keep quiet."""

    def __init__(self, folder: RunFolder | None, screen: Screen, title: str, checkpoints: Checkpoints | None = None):
        self.folder, self.screen, self.title, self.checkpoints = folder, screen, title, checkpoints
        self.last: list = []

    def step(self, step: Step) -> None:
        self.last = step.samples
        if self.folder is not None:
            self.screen.step(step)
            self.folder.write_step(step)

    def notice(self, text: str) -> None:
        if self.folder is not None:
            self.screen.notice(text)

    def finish(self, trainer: Any, outcome: Outcome) -> None:
        """Save the policy first: it is what cannot be made again."""
        if self.folder is None:
            return
        self.screen.live.stop()
        if outcome.done == 0:
            self.folder.close()
            self.screen.say("No step was finished: there is nothing to save.")
            return
        if self.checkpoints is not None and outcome.at_once:
            # in the middle of a step the weights are no step's: what there is of a policy stays
            self.folder.close()
            none = "" if self.checkpoints.saved >= 0 else " There is no checkpoint yet."
            self.screen.say(f"Run interrupted in step {outcome.done + 1}, at once: that step is lost.{none}")
            self.say_how_to_go_on(outcome)
            return
        policy = self.folder.save_policy(trainer.accelerator.unwrap_model(trainer.model), trainer.tokenizer)
        if outcome.ended != "finished":
            self.screen.say(f"Run {outcome.ended} after step {outcome.done}; the policy so far is saved in {policy}")
            self.say_how_to_go_on(outcome)
        self.folder.write_samples(outcome, self.last)
        self.folder.write_curves(self.title)
        self.folder.close()

    def say_how_to_go_on(self, outcome: Outcome) -> None:
        if self.checkpoints is None or self.checkpoints.saved < 0:
            return
        self.screen.say(
            f"The last checkpoint is of step {self.checkpoints.saved}. Go on with: {go_on(self.folder.path)}"
        )

    def tell(self, outcome: Outcome) -> None:
        """What came of it, and where it is."""
        if self.folder is None or outcome.done == 0 or outcome.at_once and self.checkpoints is not None:
            return
        if outcome.before and outcome.after:
            self.screen.console.print(before_and_after(outcome.before, outcome.after))
        told = {
            "policy/": "the trained policy and its tokenizer, for from_pretrained",
            "curves.png": "reward, KL, entropy and throughput over the steps",
            "metrics.jsonl": "every number of every step",
            "samples.json": "answers before and after",
            "tensorboard/": "the same numbers for 'tensorboard --logdir'",
        }
        told["config.yaml"] = "the options, for --config; info.json: versions and machine"
        self.screen.say(f"Saved in {self.folder.path}:")
        for name, what in told.items():
            self.screen.say(f"  {name:<15}{what}")
        self.screen.say(f"A page of curves and samples: fastppo report {self.folder.path}")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """transformers' progress bars and advice would tear the live view apart; the prompts are ours, not a dataset's."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No dataset is provided")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def run_session(trainer: Any, prompts: list[Prompt], reward: Reward, options: LoopOptions, session: Session) -> int:
    """Run the loop, show the result; the exit status (130 after an interrupt, as shells expect)."""
    with session.screen, quiet_libraries():
        try:
            outcome = run_loop(trainer, prompts, reward, options, session)
        finally:
            for tracker in trainer.accelerator.trackers:  # of --log-with: what they hold back is sent now
                tracker.finish()
    session.tell(outcome)
    return 130 if outcome.ended == "interrupted" else 0
