"""`fastppo demo`: PPO from nothing in a few minutes. No network, no GPU.

A tiny language model learns to write short stories, as often happy as sad. PPO then teaches it to write happy ones:
the reward is the number of happy words less the number of sad words.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastppo.cli.errors import UserError
from fastppo.cli.options import parse, to_yaml_values


@dataclass(frozen=True)
class DemoOptions:
    """Train a small language model on stories, then watch PPO make its stories happy."""

    seed: int = 0
    """Seed of the corpus, the model and the sampling."""
    steps: int = 40
    """PPO steps of 32 stories each."""
    lm_steps: int = 300
    """Training steps of the language model before PPO."""
    output_dir: Path | None = None
    """Where the run goes; a new folder under runs/ when not given."""
    overwrite: bool = False
    """Write over a run that is already in --output-dir."""


BATCH, RESPONSE_TOKENS, STORIES = 32, 48, 6000


def use_one_thread() -> None:
    """The model is so small that a second thread brings little; on a busy machine its barriers cost most of the time."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)


def language_model(options: DemoOptions, console: Any) -> tuple[Any, Any]:
    """(model, tokenizer), trained on the stories while a progress bar runs."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fastppo.cli.stories import corpus
    from fastppo.cli.tiny_lm import new_model, train_language_model, train_tokenizer

    texts = [f"{opening} {rest}" for opening, rest in corpus(STORIES, options.seed)]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(options.seed)
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"1. A language model of {parameters:,} parameters learns to write stories from {len(texts):,} examples, "
        "as many happy as sad.",
        soft_wrap=True,
    )
    parts = (
        TextColumn("   "),
        BarColumn(40),
        TextColumn("loss {task.fields[loss]:.2f} nats/token"),
        TimeElapsedColumn(),
    )
    with Progress(*parts, console=console, transient=True) as progress:
        bar = progress.add_task("", total=options.lm_steps, loss=0.0)
        losses = []

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            progress.update(bar, completed=step, loss=loss)

        train_language_model(model, tokenizer, texts, options.lm_steps, options.seed, on_step)
    console.print(f"   Loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token.", soft_wrap=True)
    return model, tokenizer


def make_trainer(options: DemoOptions, model: Any, tokenizer: Any) -> Any:
    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

    config = PPOConfig(
        seed=options.seed,
        learning_rate=3e-4,
        batch_size=BATCH,
        mini_batch_size=BATCH // 4,
        ppo_epochs=4,
        # A word out of place costs about 6 nats, 1.2 at this coefficient: more than the 1 that it could earn.
        init_kl_coef=0.2,
        adap_kl_ctrl=False,
        max_grad_norm=1.0,
    )
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    return PPOTrainer(config, policy, create_reference_model(policy), tokenizer)


def story_prompts(tokenizer: Any, seed: int, count: int) -> list:
    """Openings of stories that the language model has not read."""
    import torch

    from fastppo.cli.loop import Prompt
    from fastppo.cli.stories import corpus

    openings = [opening for opening, _ in corpus(count, seed + 1_000_003)]
    return [Prompt(text, torch.tensor(tokenizer(text).input_ids)) for text in openings]


def happy_reward(prompts: Sequence, responses: Sequence[str]) -> list[float]:
    from fastppo.cli.stories import happiness

    return [happiness(response) for response in responses]


def run(argv: Sequence[str]) -> int:
    options = parse(DemoOptions, argv, "fastppo demo", __doc__)
    for name in ("steps", "lm_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}")
    from rich.console import Console

    from fastppo.cli.loop import LoopOptions
    from fastppo.cli.run_folder import RunFolder
    from fastppo.cli.screen import Screen
    from fastppo.cli.session import Session, quiet_libraries, run_session

    use_one_thread()
    console, started = Console(highlight=False), time.perf_counter()
    default = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    folder = RunFolder(options.output_dir or default, overwrite=options.overwrite)
    folder.write_config(to_yaml_values(options, leave_out=("output_dir", "overwrite")))
    with quiet_libraries():
        model, tokenizer = language_model(options, console)
        trainer = make_trainer(options, model, tokenizer)
    console.print("2. PPO teaches it to write happy ones. Reward: happy words less sad words.", soft_wrap=True)
    end = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    generation = {"max_new_tokens": RESPONSE_TOKENS, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    prompts = story_prompts(tokenizer, options.seed, 512 + 64)
    loop = LoopOptions(options.steps, {**generation, **end}, options.seed, probes=prompts[512:])
    title = f"fastppo demo, seed {options.seed}: happy words less sad words"
    session = Session(folder, Screen(options.steps, title), title)
    status = run_session(trainer, prompts[:512], happy_reward, loop, session)
    console.print(f"{time.perf_counter() - started:.0f} seconds in all.", soft_wrap=True)
    return status
