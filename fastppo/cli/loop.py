"""The PPO loop of `fastppo demo` and `fastppo train`: prompts -> responses -> scores -> step, recorded as it goes.

However it ends (all steps done, Ctrl-C, SIGTERM, a reward that fails), the policy as trained so far is saved.
"""

import math
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fastppo import distributed
from fastppo.cli.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """text: what the policy reads, as text. tokens: the same as 1-D int64. columns: the dataset's other columns."""

    text: str
    tokens: torch.Tensor
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    prompt: Prompt
    response: str
    score: float


@dataclass(frozen=True)
class Step:
    """One PPO step. number counts from 1. metrics: every scalar of PPOTrainer.step() and the names in `measured`."""

    number: int
    metrics: dict[str, float]
    samples: list[Sample]


@dataclass(frozen=True)
class LoopOptions:
    """steps: PPO steps. generation: keyword arguments of PPOTrainer.generate. seed: order of the prompts.
    probes: prompts that are answered before and after training. checkpoints: cli/checkpoints.py's; None writes none.
    resumed: (steps done, answers to the probes before training) of a run that goes on."""

    steps: int
    generation: Mapping[str, Any]
    seed: int = 0
    probes: Sequence[Prompt] = ()
    checkpoints: Any = None
    resumed: tuple[int, list[Sample]] | None = None


@dataclass(frozen=True)
class Outcome:
    """done: steps finished. ended: "finished", "interrupted", or "failed". before, after: answers to the probes.
    at_once: stopped in the middle of a step, by a second interrupt."""

    done: int
    ended: str
    before: list[Sample]
    after: list[Sample]
    at_once: bool = False


class Reward(Protocol):
    """Scores for prompts and their responses: one finite float each. Raises RewardError."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]: ...


class Recorder(Protocol):
    """Where a run is written to and shown: cli/run_folder.py and cli/screen.py."""

    def step(self, step: Step) -> None: ...
    def notice(self, text: str) -> None: ...
    def finish(self, trainer: Any, outcome: Outcome) -> None: ...


class Interrupts:
    """Inside `with`, the first Ctrl-C or SIGTERM asks for a stop after the current step; the second one stops at once."""

    def __init__(
        self,
        notice: Callable[[str], None],
        text: str = "Stopping after this step, then saving. Ctrl-C again stops at once and saves.",
    ):
        self.notice, self.text, self.asked, self.previous = notice, text, False, {}
        self.at_once = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
            self.previous = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        self.asked = True
        self.notice(self.text)

    def anywhere(self, accelerator: Any) -> bool:
        """Whether any process was asked: all stop after the same step."""
        if accelerator.num_processes > 1:
            self.asked = bool(distributed.table(accelerator, [self.asked]).any())
        return self.asked


def batches(prompts: Sequence[Prompt], size: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[list[Prompt]]:
    """Endless batches of `size` prompts, shuffled anew in every pass; `ranks` processes share each pass between them."""
    rng, waiting = random.Random(seed), []
    while True:
        while len(waiting) < size * ranks:
            waiting += rng.sample(range(len(prompts)), len(prompts))
        chosen, waiting = waiting[: size * ranks], waiting[size * ranks :]
        yield [prompts[i] for i in chosen[rank::ranks]]


def fingerprint(prompts: Sequence[Prompt]) -> dict[str, int]:
    """How many prompts and a checksum of their tokens: the order of the batches follows from both."""
    checksum = 0
    for prompt in prompts:
        checksum = zlib.crc32(prompt.tokens.cpu().long().numpy().tobytes(), checksum)
    return {"prompts": len(prompts), "crc32": checksum}


def respond(
    trainer: Any, prompts: Sequence[Prompt], generation: Mapping[str, Any]
) -> tuple[list, list[str], list[str]]:
    """(query tensors, response tensors, response texts) of one batch."""
    queries = [prompt.tokens.to(trainer.accelerator.device) for prompt in prompts]
    responses = trainer.generate(queries, return_prompt=False, batch_size=len(queries), **generation)
    return queries, responses, trainer.tokenizer.batch_decode(responses, skip_special_tokens=True)


def probe(trainer: Any, prompts: Sequence[Prompt], reward: Reward, generation: Mapping[str, Any]) -> list[Sample]:
    """Answers to `prompts`, with scores, without training on them."""
    if not prompts:
        return []
    _, _, texts = respond(trainer, prompts, generation)
    return [Sample(*each) for each in zip(prompts, texts, reward(prompts, texts), strict=True)]


def ppo_steps(trainer: Any, prompts: Sequence[Prompt], reward: Reward, options: LoopOptions) -> Iterator[Step]:
    """Generate, score and update `options.steps` times."""
    ranks = trainer.accelerator
    source = batches(prompts, trainer.config.batch_size, options.seed, ranks.process_index, ranks.num_processes)
    done = options.resumed[0] if options.resumed else 0
    for _ in range(done):
        next(source)
    for number in range(done + 1, options.steps + 1):
        batch, marks = next(source), [time.perf_counter()]
        queries, responses, texts = respond(trainer, batch, options.generation)
        marks.append(time.perf_counter())
        scores = reward(batch, texts)
        marks.append(time.perf_counter())
        scores_B = torch.tensor(scores, dtype=torch.float32)
        stats = trainer.step(queries, responses, list(scores_B.to(ranks.device)))
        marks.append(time.perf_counter())
        if trainer.config.log_with:
            columns = {"query": [prompt.text for prompt in batch], "response": texts}
            trainer.log_stats(stats, columns, list(scores_B.to(ranks.device)))
        metrics = scalars(stats) | measured(scores_B, sum(map(len, responses)), marks)
        yield Step(number, metrics, [Sample(*each) for each in zip(batch, texts, scores, strict=True)])


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a statistics dictionary that are one number."""
    return {name: float(value) for name, value in stats.items() if isinstance(value, (int, float))}


def measured(scores_B: torch.Tensor, tokens: int, marks: Sequence[float]) -> dict[str, float]:
    """What the loop sees itself; times in seconds."""
    generate, score, update = (b - a for a, b in zip(marks, marks[1:], strict=False))
    return {
        "env/reward_mean": scores_B.mean().item(),
        "env/reward_std": scores_B.std(correction=0).item(),
        "time/loop/generate": generate,
        "time/loop/reward": score,
        "time/loop/step": update,
        "perf/response_tokens_per_second": tokens / (marks[-1] - marks[0]),
    }


def diverged(step: int, why: str) -> UserError:
    return UserError(f"training diverged in step {step}: {why}. Lower the learning rate, or set --max-grad-norm 1.0.")


def train(
    trainer: Any, prompts: Sequence[Prompt], reward: Reward, options: LoopOptions, recorder: Recorder, run
) -> None:
    """The probes and the steps, each recorded and saved; what came of it goes into `run` as it happens."""
    if options.resumed:
        run.done, run.before = options.resumed
    else:
        run.before = probe(trainer, options.probes, reward, options.generation)
    extra = None
    if options.checkpoints is not None:
        extra = {"before": [[s.response, s.score] for s in run.before], "prompts": fingerprint(prompts)}
    for step in ppo_steps(trainer, prompts, reward, options):
        run.done = step.number
        recorder.step(step)
        if not math.isfinite(step.metrics.get("ppo/loss/total", 0.0)):
            raise diverged(run.done, f"the loss is {step.metrics['ppo/loss/total']}")
        stop = run.interrupts.anywhere(trainer.accelerator)
        if options.checkpoints is not None:
            options.checkpoints.after_step(trainer, run.done, extra, must=stop or run.done == options.steps)
        if stop:
            return
    run.after = probe(trainer, options.probes, reward, options.generation)


@dataclass
class Course:
    """A run on its way; see Outcome."""

    interrupts: Interrupts
    done: int = 0
    before: list[Sample] = field(default_factory=list)
    after: list[Sample] = field(default_factory=list)

    def outcome(self, failure: Exception | None) -> Outcome:
        ended = "failed" if failure else "interrupted" if self.interrupts.asked else "finished"
        return Outcome(self.done, ended, self.before, self.after, self.interrupts.at_once)


def run_loop(
    trainer: Any, prompts: Sequence[Prompt], reward: Reward, options: LoopOptions, recorder: Recorder
) -> Outcome:
    """Train, and save whatever was trained; a UserError or bug on the way is raised after the saving."""
    failure = None
    again = "saves" if options.checkpoints is None else "keeps the last checkpoint"
    with Interrupts(
        recorder.notice, f"Stopping after this step, then saving. Ctrl-C again stops at once and {again}."
    ) as asked:
        run = Course(asked)
        try:
            train(trainer, prompts, reward, options, recorder, run)
        except KeyboardInterrupt:
            asked.asked = True
        except FloatingPointError as error:
            failure = diverged(run.done + 1, str(error))
            failure.__cause__ = error
        except Exception as error:
            failure = error
        outcome = run.outcome(failure)
        try:
            recorder.finish(trainer, outcome)
        except Exception as error:
            raise failure or error from error
    if failure:
        raise failure
    return outcome
