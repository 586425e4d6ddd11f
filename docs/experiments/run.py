"""The runs behind docs/guides/hyperparameters.md and docs/guides/debugging.md: the demo's task, one setting changed at a time.

    python docs/experiments/run.py NAME [NAME...] [--seeds 0 1]     # without a name: lists them
    python docs/experiments/plot.py                                  # the figures and tables, from what is in data/

Each run is PPO on the demo's language model (trained once, kept under build/experiments) and leaves one small
data/NAME-seedN.jsonl beside this file: the metrics in KEPT of every step, and three of the last step's samples.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "build" / "experiments" / "model"
STEPS, LM_STEPS = 40, 300
KEPT = (
    "env/reward_mean", "objective/kl", "objective/kl_coef", "ppo/policy/entropy", "ppo/policy/clipfrac", "ppo/policy/policykl",
    "ppo/loss/value", "ppo/val/var_explained", "ppo/val/clipfrac", "tokens/responses_len_mean",
)  # fmt: skip


def count_happy(prompts: Sequence, responses: Sequence[str]) -> list[float]:
    """A careless reward: every happy word counts, also the tenth time."""
    from fastppo.cli.stories import HAPPY_WORDS

    return [float(sum(word.strip(".,!") in HAPPY_WORDS for word in text.split())) for text in responses]


def fifty_times(prompts: Sequence, responses: Sequence[str]) -> list[float]:
    """The demo's reward in a unit that the value head does not expect."""
    from fastppo.cli.demo import happy_reward

    return [50 * score for score in happy_reward(prompts, responses)]


@dataclass(frozen=True)
class Experiment:
    """settings: fields of PPOConfig over the demo's. reward: None is the demo's."""

    settings: dict[str, Any] = field(default_factory=dict)
    reward: Callable | None = None


EXPERIMENTS = {
    "base": Experiment(),
    "lr-3e-5": Experiment({"learning_rate": 3e-5}),
    "lr-3e-3": Experiment({"learning_rate": 3e-3}),
    "kl-0": Experiment({"init_kl_coef": 0.0}),
    "kl-1": Experiment({"init_kl_coef": 1.0}),
    "epochs-1": Experiment({"ppo_epochs": 1}),
    "epochs-12": Experiment({"ppo_epochs": 12}),
    "reward-hacking": Experiment({"init_kl_coef": 0.0}, count_happy),
    "kl-explosion": Experiment({"init_kl_coef": 0.0, "learning_rate": 1e-3, "ppo_epochs": 8}),
    "value-trouble": Experiment({"init_kl_coef": 10.0}, fifty_times),
    "value-scaled": Experiment({"use_score_scaling": True, "use_score_norm": True}, fifty_times),
}


def load_model() -> tuple[Any, Any]:
    """The demo's (model, tokenizer), trained once with seed 0."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastppo.cli.demo import DemoOptions, language_model

    if not (MODEL / "config.json").is_file():
        model, tokenizer = language_model(DemoOptions(seed=0, lm_steps=LM_STEPS), Console(stderr=True))
        tokenizer.save_pretrained(MODEL)
        model.save_pretrained(MODEL)
    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


def make_trainer(experiment: Experiment, seed: int) -> Any:
    from fastppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from fastppo.cli.demo import BATCH

    model, tokenizer = load_model()
    base = {"learning_rate": 3e-4, "batch_size": BATCH, "mini_batch_size": BATCH // 4, "ppo_epochs": 4}
    base |= {"init_kl_coef": 0.2, "adap_kl_ctrl": False, "max_grad_norm": 1.0, "seed": seed, "on_nonfinite": "skip"}
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    return PPOTrainer(PPOConfig(**{**base, **experiment.settings}), policy, None, tokenizer)


def run(name: str, seed: int, steps: int = STEPS) -> None:
    from fastppo.cli.demo import RESPONSE_TOKENS, happy_reward, story_prompts
    from fastppo.cli.loop import LoopOptions, ppo_steps

    experiment, started = EXPERIMENTS[name], time.perf_counter()
    trainer = make_trainer(experiment, seed)
    end = {"pad_token_id": trainer.tokenizer.pad_token_id, "eos_token_id": trainer.tokenizer.eos_token_id}
    generation = {"max_new_tokens": RESPONSE_TOKENS, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    options = LoopOptions(steps, {**generation, **end}, seed)
    lines, samples = [], []
    for step in ppo_steps(
        trainer, story_prompts(trainer.tokenizer, 0, 512), experiment.reward or happy_reward, options
    ):
        kept = {key: float(f"{step.metrics[key]:.5g}") for key in KEPT if key in step.metrics}
        lines.append(json.dumps({"step": step.number, **kept}))
        samples = [f"{s.prompt.text}{s.response}" for s in step.samples[:3]]
    (HERE / "data").mkdir(exist_ok=True)
    text = "\n".join([*lines, json.dumps({"samples": samples})]) + "\n"
    (HERE / "data" / f"{name}-seed{seed}.jsonl").write_text(text, encoding="utf-8")
    print(f"{name} seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown or not options.names:
        print(*(f"no experiment {name!r}" for name in unknown), "experiments:", *EXPERIMENTS, file=sys.stderr)
        return 2
    for seed in options.seeds:
        for name in options.names:
            run(name, seed, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
